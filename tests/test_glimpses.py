"""Tokens that read their boxes as patches of a ViT, against that ViT and its table."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from packed import image, pack
from small_sparseformer import BATCH, ONCE, apply, build, row, start, trace, untrained

from navit_jax.errors import ConfigError
from navit_jax.models import rois
from navit_jax.models.navit import NaViT
from navit_jax.models.resample import resample, resample_at
from navit_jax.models.sparseformer_sizes import named, token_macs

# Six tokens, 3 x 2, of 2 x 2 points, each the mean of 2 x 2 pixels.
GLIMPSE = {"glimpse": 2, "glimpse_pool": 2, "table": 5, "latents": 6}
VIT = NaViT(
    "S/2",
    width=16,
    depth=1,
    num_heads=2,
    mlp=32,
    positions={"name": "learned_1d", "side": 5, "filter": "bicubic"},
    pooling="class",
    bias_qkv=True,
    bias_ln=True,
    class_token=True,
    qk_norm=False,
)

# 8 x 12 pixels, so 4 x 6 of them once halved: 2 x 3 patches.
PICTURES = [image(1, (4, 6)), image(2, (4, 6))]


@pytest.mark.parametrize("attributes", [{}, {"maps": "canvas", "max_side": 6}])
def test_it_starts_as_the_vit_on_the_picture_of_as_many_patches(attributes):
    vit, expected = _see()
    model = build("v2", ONCE | GLIMPSE, **attributes)
    own = untrained(build("v2", ONCE | GLIMPSE))["params"]
    parts = {k: vit[f"{k}_embedding"] for k in ("patch", "position")}
    glimpses = {f"{k}_embedding": part for k, part in parts.items()}
    params = own | {k: vit[k] for k in ("blocks", "norm", "class_token")}
    params["glimpses"] = own["glimpses"] | glimpses
    found = apply(model, _pack(PICTURES), {"params": params})
    np.testing.assert_allclose(found["pooled"], expected["pooled"], atol=1e-5)
    # Tokens of boxes go down each column in turn, patches along each row.
    tokens = found["tokens"][:, :6].reshape(2, 3, 2, -1).swapaxes(1, 2)
    patches = expected["tokens"][:, :6].reshape(2, 2, 3, -1)
    np.testing.assert_allclose(tokens, patches, atol=1e-5)


def _pack(pictures):
    return jax.tree.map(jnp.asarray, pack([[each] for each in pictures]))


@functools.cache
def _see():
    """The ViT's parameters, with noise, and what it says of the halved pictures."""
    shown = row(_pack([_halve(each) for each in PICTURES]))

    @jax.jit
    def draw(key):
        params = VIT.init(key, *shown)
        leaves, tree = jax.tree.flatten(params)
        waves = [jnp.sin(jnp.arange(x.size)).reshape(x.shape) for x in leaves]
        noisy = [x + 0.3 * wave for x, wave in zip(leaves, waves, strict=True)]
        params = jax.tree.unflatten(tree, noisy)
        return params["params"], VIT.apply(params, *shown)

    return draw(jax.random.key(2))


def _halve(whole):
    """The picture of half the sides, each pixel the mean of four."""
    h, w = (2 * side for side in whole.grid)
    pixels = whole.patches.reshape(h // 2, w // 2, 2, 2, 3).swapaxes(1, 2)
    means = pixels.reshape(h // 2, 2, w // 2, 2, 3).mean((1, 3))
    cut = means.reshape(h // 4, 2, w // 4, 2, 3).swapaxes(1, 2).reshape(-1, 12)
    half = image(0, (h // 4, w // 4))
    return type(half)(whole.id, cut, half.coords, half.grid)


def test_what_is_seen_moves_boxes_and_a_box_what_is_seen():
    model = build("v2", ONCE | GLIMPSE)
    params = start(model)["params"]

    def total(glimpses, rois):
        own = {**params["glimpses"], **glimpses}
        tables = {**params["tables"], "rois": rois}
        changed = {"params": {**params, "glimpses": own, "tables": tables}}
        return jnp.sin(model.apply(changed, *row(BATCH))["pooled"]).sum()

    slope = jax.jit(jax.grad(total, (0, 1)))
    silent = {"gain": jnp.zeros(16)}
    # With no gain the focused tokens reach nothing but the boxes.
    of_gain, of_boxes = slope(silent, params["tables"]["rois"])
    assert of_gain["gain"].any()
    assert of_boxes.any()
    own = params["glimpses"]["patch_embedding"]
    blind = {"patch_embedding": jax.tree.map(jnp.zeros_like, own)}
    assert not slope(silent | blind, params["tables"]["rois"])[1].any()


@pytest.mark.parametrize("filter", ["bilinear", "bicubic"])
def test_a_table_at_the_centres_of_a_grid_is_the_table_of_that_grid(filter):
    table = jax.random.normal(jax.random.key(0), (5, 7, 3))
    for h, w in ((2, 3), (5, 7), (9, 4)):
        coords = np.stack(np.mgrid[:h, :w], -1).reshape(1, -1, 2)
        grids = np.broadcast_to([h, w], coords.shape)
        places = ((coords + 0.5) / grids).astype(np.float32)
        np.testing.assert_allclose(
            resample_at(table, jnp.asarray(places), filter),
            resample(table, jnp.asarray(coords), jnp.asarray(grids), filter),
            atol=1e-4,
        )


def test_a_filter_that_depends_on_a_grid_has_no_places():
    with pytest.raises(ConfigError, match="antialias"):
        resample_at(jnp.zeros((2, 2, 1)), jnp.zeros((1, 1, 2)), "antialias")


@pytest.mark.parametrize("count, sides", [(6, (3, 2)), (9, (3, 3)), (7, (7, 1))])
def test_boxes_start_side_by_side(count, sides):
    cells = rois.cell_grid(count)
    expected = [
        (x / sides[0], y / sides[1], (x + 1) / sides[0], (y + 1) / sides[1])
        for x in range(sides[0])
        for y in range(sides[1])
    ]
    np.testing.assert_allclose(cells, expected, atol=1e-6)


def test_a_pool_that_leaves_pixels_over_is_refused():
    with pytest.raises(ConfigError, match=r"glimpse_pool=3 .* patch side 2"):
        trace(build("v2", {**GLIMPSE, "glimpse_pool": 3}))


def test_its_patches_are_counted():
    shapes = [named("v2_micro/2", {"glimpse": g})[0] for g in (0, 2)]
    macs = [token_macs(shape, 6) for shape in shapes]
    assert macs[1] - macs[0] == 6 * (2 * 2 * 3) * 128
