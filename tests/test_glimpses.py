"""Tokens that read their boxes as patches of a ViT, against that ViT and its table."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from packed import image, pack
from small_sparseformer import ONCE, apply, build, row, untrained

from navit_jax.errors import ConfigError
from navit_jax.models import rois
from navit_jax.models.feature_maps import HALO, Maps, cut_tiles
from navit_jax.models.glimpses import Glimpses, lay_pixels
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


SHAPE = named("v2_micro/4", {"width": 5, "num_heads": 1, "glimpse": 3, "table": 4})[0]
SHAPE = SHAPE._replace(glimpse_pool=2, pixel_mean=(0.4, 0.5, 0.6), pixel_std=(0.2,) * 3)
# Of four tokens: within the picture, partly out of it, turned over, and padding.
ROIS = [(0.1, 0.2, 0.7, 0.5), (0.8, -0.4, 1.6, 0.3), (0.6, 0.9, 0.1, 0.2), (0, 0, 1, 1)]
IDS = [[2, 1, 2, 0], [0, 0, 0, 0]]


def _lay():
    """Two pictures of 8 x 12 and 12 x 4 pixels in a row; the next row has none."""
    rng = np.random.default_rng(0)
    pictures = [
        rng.integers(0, 256, s + (3,)).astype(np.uint8) for s in ((8, 12), (12, 4))
    ]
    cut = [p.reshape(p.shape[0] // 4, 4, p.shape[1] // 4, 4, 3) for p in pictures]
    patches = np.concatenate([p.swapaxes(1, 2).reshape(-1, 48) for p in cut])
    coords = np.concatenate(
        [np.stack(np.mgrid[:h, :w], -1).reshape(-1, 2) for h, w in GRIDS]
    )
    ids = np.array([[1] * 6 + [2] * 3, [0] * 9], np.int32)
    grids = jnp.array([GRIDS, [[0, 0], [0, 0]]])
    both = np.stack([patches, patches]), np.stack([coords, coords])
    pixels, maps = cut_tiles(*map(jnp.asarray, both), jnp.asarray(ids), grids, 4, 4)
    return pictures, lay_pixels(pixels, maps, grids, 4, SHAPE)


GRIDS = (2, 3), (3, 1)


def _apply(maps, params, rois, **changes):
    given = {"lookup": "gather", "gradient_clamp": 0.0, "dtype": jnp.float32} | changes
    tokens = jnp.ones((2, 4, 5), given["dtype"])
    model = Glimpses(SHAPE, **given)
    ids = jnp.array(IDS)
    if params is None:
        params = jax.jit(model.init)(jax.random.key(0), tokens, rois, ids, maps)
        return jax.tree.map(lambda x: x + 0.1, params)
    return model.apply(params, tokens, rois, ids, maps)


@pytest.mark.parametrize("lookup", ["gather", "neighbours"])
def test_a_glimpse_is_what_a_loop_reads_of_the_picture(lookup):
    pictures, maps = _lay()
    rois = jnp.array([ROIS, ROIS], jnp.float32)
    params = _apply(maps, None, rois)
    found = _apply(maps, params, rois, lookup=lookup)
    own = jax.tree.map(lambda x: np.asarray(x, np.float64), params["params"])
    for token, slot in enumerate((1, 0, 1)):
        x0, y0, x1, y1 = ROIS[token]
        patch = []
        for i, j in np.ndindex(3, 3):
            at = y0 + (i + 0.5) / 3 * (y1 - y0), x0 + (j + 0.5) / 3 * (x1 - x0)
            patch.append(_read(pictures[slot], *at))
        expected = np.concatenate(patch) @ own["patch_embedding"]["kernel"]
        expected += own["patch_embedding"]["bias"] + own["gain"]
        centre = jnp.array([[[(y0 + y1) / 2, (x0 + x1) / 2]]])
        table = params["params"]["position_embedding"]["table"]
        expected += np.asarray(resample_at(table, centre))[0, 0]
        np.testing.assert_allclose(found[0, token], expected, atol=1e-4)


def _read(picture, y, x):
    """Bilinear, of means of 2 x 2 pixels, the border repeated; by a loop in float64."""
    h, w = picture.shape[0] // 2, picture.shape[1] // 2
    cells = picture.reshape(h, 2, w, 2, 3).astype(np.float64).mean((1, 3)) / 255
    cells = (cells - SHAPE.pixel_mean) / SHAPE.pixel_std
    y, x = np.clip(y * h - 0.5, 0, h - 1), np.clip(x * w - 0.5, 0, w - 1)
    total = np.zeros(3)
    for i, j in np.ndindex(h, w):
        total += max(0, 1 - abs(y - i)) * max(0, 1 - abs(x - j)) * cells[i, j]
    return total


def test_gradients_of_boxes_are_kept_small_and_what_is_no_picture_spoils_none():
    _, maps = _lay()
    rois = jnp.array([ROIS, ROIS], jnp.float32)
    params = _apply(maps, None, rois)
    # What is in no tile of a picture may be anything.
    lost = maps._replace(
        cells=jnp.where((maps.slots < 0)[..., None, None, None], jnp.nan, maps.cells)
    )

    @functools.partial(jax.jit, static_argnums=2)
    def slope(params, rois, clamp):
        def total(params, rois):
            out = _apply(lost, params, rois, gradient_clamp=clamp)
            return jnp.where(jnp.array(IDS)[..., None] > 0, 1e3 * out, 0).sum()

        return jax.grad(total, (0, 1))(params, rois)

    free, kept = slope(params, rois, 0.0), slope(params, rois, 0.5)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves((free, kept)))
    assert np.abs(free[1]).max() > 100
    # Of 9 points half count for a corner; cells (x, y) of each token's map.
    cells = np.array([(2, 6), (6, 4), (2, 6)])
    most = 4.5 * 0.5 / np.tile(cells, 2)
    assert (np.abs(kept[1])[0, :3] <= most * 1.001).all()
    assert np.asarray(kept[1])[0, :3].any()
    assert not np.asarray(kept[1])[1].any()


def test_a_picture_without_a_map_has_no_pixels():
    _, maps = _lay()
    pixels, grids = jnp.zeros((2, 9, 11, 11, 3)), jnp.array([GRIDS, GRIDS])
    there = maps._replace(sizes=jnp.array([[[2, 3], [0, 0]], [[0, 0], [3, 1]]]))
    found = lay_pixels(pixels, there, grids, 4, SHAPE)
    assert found.sizes.tolist() == [[[4, 6], [0, 0]], [[0, 0], [6, 2]]]


def test_tokens_keep_their_dtype():
    _, maps = _lay()
    rois = jnp.array([ROIS, ROIS], jnp.float32)
    params = _apply(maps, None, rois)
    assert _apply(maps, params, rois, dtype=jnp.bfloat16).dtype == jnp.bfloat16


def test_a_table_at_the_centres_of_a_grid_is_the_table_of_that_grid():
    table = jax.random.normal(jax.random.key(0), (5, 7, 3))
    for h, w in ((2, 3), (5, 7), (9, 4)):
        coords = np.stack(np.mgrid[:h, :w], -1).reshape(1, -1, 2)
        grids = np.broadcast_to([h, w], coords.shape)
        places = ((coords + 0.5) / grids).astype(np.float32)
        np.testing.assert_allclose(
            resample_at(table, jnp.asarray(places)),
            resample(table, jnp.asarray(coords), jnp.asarray(grids), "bicubic"),
            atol=1e-4,
        )


@pytest.mark.parametrize("count, sides", [(6, (3, 2)), (9, (3, 3)), (7, (7, 1))])
def test_boxes_start_side_by_side(count, sides):
    cells = rois.cell_grid(count)
    expected = [
        (x / sides[0], y / sides[1], (x + 1) / sides[0], (y + 1) / sides[1])
        for x in range(sides[0])
        for y in range(sides[1])
    ]
    np.testing.assert_allclose(cells, expected, atol=1e-6)


@pytest.mark.parametrize("pool, patch", [(4, 6), (0, 4), (3, 6)])
def test_a_pool_that_leaves_pixels_over_is_refused(pool, patch):
    w = 4 * -(-patch // 4) + HALO
    pixels, grids = jnp.zeros((1, 1, w, w, 3)), jnp.ones((1, 1, 2), jnp.int32)
    maps = Maps(*[jnp.zeros((1, 1, 2), jnp.int32)] * 5)
    with pytest.raises(
        ConfigError, match=f"glimpse_pool={pool} .* patch side, {patch},"
    ):
        lay_pixels(pixels, maps, grids, patch, SHAPE._replace(glimpse_pool=pool))


def test_places_beyond_a_table_are_its_border():
    table = jax.random.normal(jax.random.key(0), (5, 7, 3))
    found = resample_at(table, jnp.array([[[-3.0, 0.4], [0.2, 9.0]]]))
    border = resample_at(table, jnp.array([[[0.0, 0.4], [0.2, 1.0]]]))
    np.testing.assert_array_equal(found, border)


def test_its_patches_are_counted():
    shapes = [named("v2_micro/2", {"glimpse": g})[0] for g in (0, 2)]
    macs = [token_macs(shape, 6) for shape in shapes]
    assert macs[1] - macs[0] == 6 * (2 * 2 * 3) * 128
