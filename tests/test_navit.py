import collections
import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from jax.extend.core import jaxprs_in_params
from packed import L, N, P, image, pack

from navit_jax import config, models
from navit_jax.errors import ConfigError
from navit_jax.models import dropout
from navit_jax.models.attention import IMPLEMENTATIONS, packed_attention
from navit_jax.models.layers import layer_norm
from navit_jax.models.navit import NaViT
from navit_jax.models.stack import REMAT

HEADS, DEPTH, WIDTH = 2, 2, 16
# A row with one token and padding; a full row; all slots used; no slot used.
IMAGES = [image(1, (3, 4), 7), image(2, (5, 2)), image(3, (1, 1))]
FULL = image(4, (8, 5), L)
FOUR = [image(5, (2, 2)), image(6, (4, 7), 9), image(7, (6, 1), 2), image(8, (3, 3))]
ROWS = [IMAGES, [FULL], FOUR, []]
B = len(ROWS)
FACTORIZED = {"name": "factorized", "length": 8}


def scheme(**section):
    return section


SCHEMES = [
    *(
        scheme(name="learned_1d", side=5, filter=filter)
        for filter in ("bilinear", "antialias", "bicubic")
    ),
    scheme(name="learned_2d", length=8),
    *(
        scheme(name="factorized", length=8, combine=combine)
        for combine in ("sum", "stack", "product")
    ),
    *(
        scheme(name=name, length=8, coordinates="fractional")
        for name in ("factorized", "fourier", "sinusoidal", "rope")
    ),
    scheme(name="factorized", length=8, coordinates="aspect_preserving"),
    scheme(name="fourier", length=8),
    scheme(name="sinusoidal", length=8),
    scheme(name="rope", length=8),
]


def navit(positions=FACTORIZED, attention="dense", **arguments):
    return NaViT(
        "Ti/2",
        width=WIDTH,
        depth=DEPTH,
        num_heads=HEADS,
        mlp=24,
        positions=positions,
        attention=attention,
        **arguments,
    )


def fields(batch):
    return batch.patches, batch.coords, batch.segment_ids, batch.grids


def random_params(model):
    """Parameters of the right shapes, none of them 0 or 1."""
    shapes = jax.eval_shape(model.init, jax.random.key(0), *fields(pack(ROWS)))
    rng = np.random.default_rng(0)

    def fill(path, shape):
        scale = path[-1].key == "scale"
        return jnp.asarray(0.3 * rng.standard_normal(shape.shape) + scale, "float32")

    return jax.tree_util.tree_map_with_path(fill, shapes["params"])


@functools.cache
def built(model):
    def apply(params, batch, keys=None):
        return model.apply({"params": params}, *fields(batch), keys)

    return random_params(model), jax.jit(apply)


def encode(rows, model=None):
    params, apply = built(model or navit())
    return jax.tree.map(np.asarray, apply(params, pack(rows)))


def alone(model, params, one):
    positions = dict(model.positions)
    pooling = model.pooling
    return oracle.forward(
        jax.tree.map(np.float64, params),
        np.float64(one.patches),
        one.coords,
        one.grid,
        num_heads=HEADS,
        positions=positions,
        pooling=pooling,
    )


def assert_close(actual, expected):
    # The tolerance of the promise: float32 against float64.
    np.testing.assert_allclose(
        actual, expected, rtol=0, atol=1e-5 * abs(expected).max()
    )


MODELS = {
    **{"-".join(map(str, s.values())): navit(s) for s in SCHEMES},
    "mean": navit(pooling="mean"),
    "no qk norm": navit(qk_norm=False),
    "all biases": navit(bias_qkv=True, bias_ln=True),
    "no biases": navit(bias_mlp=False),
    "blocks": navit(attention="blocks"),
}


@pytest.mark.parametrize("name", MODELS)
def test_packed_equals_alone(name):
    model = MODELS[name]
    params, apply = built(model)
    with jax.default_matmul_precision("highest"):
        out = jax.tree.map(np.asarray, apply(params, pack(ROWS)))
    for row, images in enumerate(ROWS):
        end = 0
        for slot, one in enumerate(images):
            start, end = end, end + len(one.patches)
            tokens, pooled = alone(model, params, one)
            assert_close(out["tokens"][row, start:end], tokens)
            assert_close(out["pooled"][row, slot], pooled)
        assert not out["tokens"][row, end:].any()
        assert not out["pooled"][row, len(images) :].any()


def test_order_row_and_offset_change_nothing_beyond_the_tolerance():
    out = encode(ROWS)["pooled"]
    moved = encode([[], [FOUR[3], IMAGES[2], IMAGES[0]], [IMAGES[1]], [FULL]])["pooled"]
    assert_close(moved[1, :3], np.stack([out[2, 3], out[0, 2], out[0, 0]]))
    assert_close(moved[2, 0], out[0, 1])
    assert_close(moved[3, 0], out[1, 0])


@pytest.mark.parametrize("kept", [0, 1, 2])
@pytest.mark.parametrize("value", [7.0, np.nan], ids=["noise", "nan"])
def test_other_images_and_padding_change_no_bit(kept, value):
    params, apply = built(navit())
    batch, before = pack(ROWS), encode(ROWS)
    patches = np.array(batch.patches)
    segments = batch.segment_ids
    others = (segments != kept + 1) if np.isfinite(value) else (segments == 0)
    # A NaN image may spoil its row; NaN in padding may not.
    patches[others] = value
    coords = np.where(others[..., None], 1, batch.coords)
    after = apply(params, batch.replace(patches=patches, coords=coords))
    np.testing.assert_array_equal(after["pooled"][:, kept], before["pooled"][:, kept])
    own = segments == kept + 1
    np.testing.assert_array_equal(after["tokens"][own], before["tokens"][own])


@pytest.mark.parametrize("attention", ["dense", "blocks"])
def test_a_nan_image_spoils_no_other_row(attention):
    model = navit(attention=attention)
    params, apply = built(model)
    batch = pack(ROWS)
    patches = np.array(batch.patches)
    patches[0, 0, 0] = np.nan
    after = apply(params, batch.replace(patches=patches))
    for name, before in encode(ROWS, model).items():
        assert np.isnan(after[name][0]).any()
        np.testing.assert_array_equal(after[name][1:], before[1:])


@functools.cache
def gradients(model):
    def pulled(params, patches, batch, weights):
        out = model.apply({"params": params}, *fields(batch.replace(patches=patches)))
        return (out["pooled"] * weights).sum()

    return jax.jit(jax.grad(pulled, (0, 1)))


def pull(one):
    """What the test's loss multiplies the pooled vector of an image with."""
    return np.random.default_rng(one.id).standard_normal(WIDTH)


def weights_of(rows):
    weights = np.zeros((B, N, WIDTH), np.float32)
    for row, images in enumerate(rows):
        for slot, one in enumerate(images):
            weights[row, slot] = pull(one)
    return weights


def gradient(rows, model=None, weights=None, padding=None):
    model = model or navit()
    batch, params = pack(rows), built(model)[0]
    if padding is not None:
        batch.patches[batch.segment_ids == 0] = padding
    weights = weights_of(rows) if weights is None else weights
    return gradients(model)(params, batch.patches, batch, weights)


def all_images():
    return [one for images in ROWS for one in images]


def test_the_gradient_of_packed_rows_is_the_sum_of_alone_gradients():
    packed, _ = gradient(ROWS)
    summed = jax.tree.map(np.zeros_like, packed)
    for one in all_images():
        summed = jax.tree.map(np.add, summed, gradient([[one], [], [], []])[0])
    jax.tree.map(assert_close, packed, summed)


def test_the_gradient_is_the_slope_of_the_float64_model():
    model = navit()
    params = jax.tree.map(np.float64, built(model)[0])
    rng = np.random.default_rng(1)
    step = jax.tree.map(lambda p: 1e-6 * rng.standard_normal(p.shape), params)

    def loss(sign):
        moved = jax.tree.map(lambda p, s: p + sign * s, params, step)
        return sum(alone(model, moved, one)[1] @ pull(one) for one in all_images())

    products = jax.tree.map(lambda g, s: (g * s).sum(), gradient(ROWS)[0], step)
    slope = sum(jax.tree.leaves(products))
    np.testing.assert_allclose(slope, (loss(1) - loss(-1)) / 2, rtol=1e-4)


def test_gradients_into_other_images_and_padding_are_exactly_zero():
    weights = weights_of(ROWS)
    weights[:, :1] = 0
    weights[:, 2:] = 0
    _, patches = gradient(ROWS, weights=weights)
    own = pack(ROWS).segment_ids == 2
    assert not np.asarray(patches)[~own].any()
    assert np.abs(np.asarray(patches)[own]).min() > 0


def test_nan_in_padding_changes_no_bit_of_a_gradient():
    jax.tree.map(
        np.testing.assert_array_equal, gradient(ROWS, padding=np.nan), gradient(ROWS)
    )


def test_a_batch_without_an_image_has_zero_gradients():
    ones = np.ones((B, N, WIDTH), np.float32)
    for leaf in jax.tree.leaves(gradient([[], [], [], []], weights=ones)):
        np.testing.assert_array_equal(leaf, np.zeros_like(leaf))


@pytest.mark.parametrize("coordinates", ["absolute", "fractional"])
def test_equal_patches_under_different_grids_agree_when_absolute(coordinates):
    model = navit(scheme(name="factorized", length=8, coordinates=coordinates))
    one = image(9, (3, 4), 6)
    wide = dataclasses.replace(one, grid=(7, 8))
    out = encode([[one, wide], [], [], []], model)["pooled"][0]
    assert np.allclose(out[0], out[1], atol=1e-5) == (coordinates == "absolute")


@pytest.mark.parametrize("remat", [name for name in REMAT if name != "none"])
def test_remat_changes_no_gradient(remat):
    jax.tree.map(
        assert_close,
        gradient(ROWS, navit(remat=remat, scan=remat != "dots")),
        gradient(ROWS),
    )


def tally(jaxpr, counts):
    """How often each primitive stands in a program; kernels are not looked into."""
    for equation in jaxpr.eqns:
        counts[equation.primitive.name] += 1
        if equation.primitive.name != "pallas_call":
            for sub in jaxprs_in_params(equation.params):
                tally(sub, counts)
    return counts


@pytest.mark.parametrize("implementation", ["blocks", "mha", "splash"])
def test_by_default_only_what_is_cheap_is_computed_again(implementation, monkeypatch):
    attend = functools.partial(
        packed_attention, implementation=implementation, interpret=True
    )
    monkeypatch.setitem(IMPLEMENTATIONS, "kernel", attend)
    batch, ones = pack(ROWS), np.ones((B, N, WIDTH), np.float32)
    counts = {}
    for remat in ("none", NaViT.remat, "full"):
        model = navit(attention="kernel", remat=remat)
        traced = jax.make_jaxpr(gradients(model))
        program = traced(random_params(model), batch.patches, batch, ones)
        counts[remat] = tally(program.jaxpr, collections.Counter())
    costly = ("dot_general", "while", "pallas_call")
    everything, light, nothing = (
        [counts[remat][name] for name in costly]
        for remat in ("none", NaViT.remat, "full")
    )
    assert light == everything != nothing
    assert counts[NaViT.remat]["tanh"] > counts["none"]["tanh"]


class Norm(nn.Module):
    @nn.compact
    def __call__(self, x):
        return layer_norm(x, False, jnp.float32, "norm")


def test_a_norm_is_right_far_from_zero():
    x = np.float32(3000 + np.random.default_rng(0).standard_normal((2, 3, 4, 64)))
    exact = np.float64(x) - np.float64(x).mean(-1, keepdims=True)
    exact /= np.sqrt((exact**2).mean(-1, keepdims=True) + 1e-6)
    normed, _ = Norm().init_with_output(jax.random.key(0), jnp.asarray(x))
    # A mean of float32 is off by 1e-4; one pass, E x^2 - (E x)^2, would be off by 1.
    np.testing.assert_allclose(normed, exact, atol=1e-3)


def test_unrolled_blocks_have_the_same_parameters_and_values():
    unrolled = navit(scan=False)
    jax.tree.map(np.testing.assert_array_equal, built(unrolled)[0], built(navit())[0])
    jax.tree.map(assert_close, encode(ROWS, unrolled), encode(ROWS))


def keys_of(batch, seed=0):
    fold = jax.random.fold_in
    each = jax.vmap(jax.vmap(lambda index: fold(jax.random.key(seed), index)))
    return each(batch.image_ids[..., 1])


def test_what_is_dropped_goes_with_the_image_and_its_key():
    params, apply = built(navit(drop_path=0.5, dropout=0.2))
    one, two = pack(ROWS), pack([[FOUR[3], IMAGES[1]], [], [IMAGES[0]], [FULL]])
    first = apply(params, one, keys_of(one))["pooled"]
    moved = apply(params, two, keys_of(two))["pooled"]
    assert_close(
        np.stack([moved[0, 0], moved[0, 1], moved[2, 0], moved[3, 0]]),
        np.stack([first[2, 3], first[0, 1], first[0, 0], first[1, 0]]),
    )
    other = apply(params, one, keys_of(one, seed=1))["pooled"]
    assert np.abs(other - first).max() > 1e-2
    without = apply(params, one)["pooled"]
    assert_close(np.asarray(without), encode(ROWS)["pooled"])
    assert np.abs(without - first).max() > 1e-2


def test_drop_path_drops_whole_images_at_its_rate_and_keeps_the_mean():
    M, depth, rate = 4000, 3, 0.6
    keys = jax.random.split(jax.random.key(0), (1, M))
    slots, coords = jnp.arange(M)[None], jnp.zeros((1, M, 2), int)
    scales = dropout.draw(keys, slots, coords, depth, rate, 0.0)["scales"]
    assert scales.shape == (depth, 1, M, 2)
    for layer, expected in enumerate([0, rate / 2, rate]):
        for branch in range(2):
            kept = scales[layer, 0, :, branch]
            # Five standard deviations of a mean of 4000 draws.
            assert abs((kept == 0).mean() - expected) < 0.04
            assert abs(kept.mean() - 1) < 0.1
    both = ((scales[2, 0] == 0).all(-1)).mean()
    assert abs(both - rate**2) < 0.04, "the two branches are drawn apart"


def test_dropout_drops_entries_at_its_rate():
    draws = {"keys": jax.random.split(jax.random.key(0), (1, 500))}
    ones = jnp.ones((1, 500, 64))
    dropped = dropout.residual(ones, 0, draws, 0.25)
    assert abs((dropped == 0).mean() - 0.25) < 0.02
    np.testing.assert_allclose(dropped.max(), 1 / 0.75, rtol=1e-6)
    assert (dropped != dropout.residual(ones, 1, draws, 0.25)).any()


def test_bfloat16_keeps_parameters_in_float32_and_stays_near():
    model = navit(dtype="bfloat16")
    shapes = jax.eval_shape(model.init, jax.random.key(0), *fields(pack(ROWS)))
    assert {leaf.dtype for leaf in jax.tree.leaves(shapes)} == {np.dtype("float32")}
    out, exact = encode(ROWS, model), encode(ROWS)
    assert {str(leaf.dtype) for leaf in out.values()} == {"bfloat16"}
    # Eight bits of mantissa through two blocks.
    error = np.abs(np.float32(out["pooled"]) - exact["pooled"]).max()
    assert error < 0.05 * np.abs(exact["pooled"]).max()


@pytest.mark.parametrize("qk_norm", [True, False])
def test_bfloat16_is_finite_with_huge_activations_and_scores(qk_norm):
    params, apply = built(navit(dtype="bfloat16", qk_norm=qk_norm))
    keys = ("query", "key")
    params = jax.tree_util.tree_map_with_path(
        lambda path, p: 1e6 * p if path[-2].key in keys else p, params
    )
    batch = pack(ROWS)
    for leaf in apply(params, batch.replace(patches=1e6 * batch.patches)).values():
        assert np.isfinite(np.float32(leaf)).all()


def test_pixels_are_normalised_to_one_on_the_device():
    params, apply = built(navit())
    batch = pack(ROWS)
    pixels = np.random.default_rng(0).integers(0, 256, (B, L, P), np.uint8)
    floats = (pixels / 127.5 - 1).astype(np.float32)
    assert (floats.min(), floats.max()) == (-1, 1)
    assert_close(
        np.asarray(apply(params, batch.replace(patches=pixels))["pooled"]),
        np.asarray(apply(params, batch.replace(patches=floats))["pooled"]),
    )


def test_without_pooling_there_are_only_tokens():
    model = navit(pooling="none")
    shapes = jax.eval_shape(
        model.init_with_output, jax.random.key(0), *fields(pack(ROWS))
    )
    assert set(shapes[0]) == {"tokens"}
    assert "pool" not in shapes[1]["params"]


def count(size, **arguments):
    side = models.patch_size(size)
    batch = pack([[]])
    patches = jnp.zeros((1, L, side * side * 3), jnp.uint8)
    model = NaViT(size, **arguments)
    shapes = jax.eval_shape(model.init, jax.random.key(0), patches, *fields(batch)[1:])
    return sum(leaf.size for leaf in jax.tree.leaves(shapes))


@pytest.mark.parametrize(
    "size, published", [("B/16", 86_567_656), ("L/16", 304_326_632)]
)
def test_a_model_has_the_parameters_of_vit_but_for_what_navit_changes(size, published):
    D, depth, H, mlp = models.spec(size)
    # ViT at 224 px with 1000 classes: head, class token and 14 x 14 + 1 positions,
    # biases of query, key, value and of layer norms; then two norms of 64 a block.
    without = 1000 * (D + 1) + D + 197 * D + 3 * depth * D + (2 * depth + 1) * D
    backbone = published - without + depth * 2 * 64
    tables = 2 * 64 * D
    pool = 4 * D * D + 2 * D + 2 * D * mlp + mlp + D + D
    assert D // H == 64
    assert count(size, pooling="none") == backbone + tables
    assert count(size, pooling="map") == backbone + tables + pool
    assert count(size, pooling="none", positions={"name": "rope"}) == backbone


def test_a_config_section_builds_the_model():
    section = {"name": "navit", "size": "Ti/8", "positions": {"name": "rope"}}
    model = config.build(section, models.MODELS, "model")
    assert (model.spec, model.max_side) == (models.spec("Ti/8"), 64)
    assert model == NaViT("Ti/8", positions={"name": "rope"})
    assert hash(model) == hash(NaViT("Ti/8", positions={"name": "rope"}))


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"size": "X/16"}, "model.size='X/16'.*Known: B, H"),
        ({"size": "B"}, "model.size='B': write a name and a patch side"),
        ({"size": "B/16", "num_heads": 7}, "num_heads=7: the width 768"),
        ({"pooling": "max"}, "model.pooling='max': did you mean 'map'"),
        ({"remat": "all"}, "model.remat='all'"),
        ({"dtype": "float16"}, "model.dtype='float16'"),
        ({"positions": {"name": "factorised"}}, "did you mean 'factorized'"),
        ({"positions": {}}, "model.positions.name=None"),
    ],
)
def test_wrong_attributes_are_named(arguments, message):
    model = NaViT(**arguments)
    with pytest.raises(ConfigError, match=message):
        jax.eval_shape(model.init, jax.random.key(0), *fields(pack([[]])))
