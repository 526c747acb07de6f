"""The losses on a ring of devices against the formulas over all pairs in float64."""

import functools
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from navit_jax import hlo
from navit_jax.losses import contrastive

sys.path.append(str(pathlib.Path(__file__).parent.parent / "benchmarks"))

import contrastive_forms

WIDTH, SLOTS, CHUNK = 16, 48, 5  # slots of all devices
LOSSES = ("softmax", "sigmoid")
NAMES = "loss", "image", "text", "scale", "bias"


def by_formula(kind, image, text, mask, *numbers):
    """Loss and gradients of the valid pairs, in float64; zeros for other slots."""
    u, v = image[mask].astype(np.float64), text[mask].astype(np.float64)
    scale, bias = (*map(float, numbers), 0.0)[:2]
    pairs, eye = max(len(u), 1), np.eye(len(u))
    cosines = u @ v.T
    logits = scale * cosines + bias
    if kind == "softmax":
        to_text, to_image = (np.logaddexp.reduce(logits, axis) for axis in (1, 0))
        loss = (to_text + to_image - 2 * np.diag(logits)).sum() / (2 * pairs)
        d_logits = np.exp(logits - to_text[:, None]) + np.exp(logits - to_image)
        d_logits = (d_logits - 2 * eye) / (2 * pairs)
    else:
        signs = 2 * eye - 1
        loss = np.logaddexp(0, -signs * logits).sum() / pairs
        d_logits = -signs / (1 + np.exp(signs * logits)) / pairs
    d_image, d_text = np.zeros(image.shape), np.zeros(text.shape)
    d_image[mask], d_text[mask] = scale * d_logits @ v, scale * d_logits.T @ u
    parts = loss, d_image, d_text, (d_logits * cosines).sum(), d_logits.sum()
    return dict(zip(NAMES[: 3 + len(numbers)], parts, strict=False))


def place(loss, num_numbers, mesh, axes, check=True):
    """A loss of one device's slots as one of all slots, over the mesh."""
    if mesh is None:
        return loss
    specs = (P(axes),) * 3 + (P(),) * num_numbers
    return jax.shard_map(
        loss, mesh=mesh, in_specs=specs, out_specs=P(), check_vma=check
    )


def named(values, gradients):
    return dict(zip(NAMES, (values, *gradients), strict=False))


@functools.cache
def on_ring(kind, devices, chunk=CHUNK, **dtypes):
    """Loss and all gradients, compiled for a number of devices; 0 is without a mesh."""
    loss = {"softmax": contrastive.softmax_loss, "sigmoid": contrastive.sigmoid_loss}
    axes, mesh = (("x",), line(devices)) if devices else ((), None)
    one = functools.partial(loss[kind], axis_name=axes, chunk=chunk, **dtypes)
    return differentiate(kind, place(one, 1 + (kind == "sigmoid"), mesh, axes))


def differentiate(kind, loss):
    numbers = (3, 4) if kind == "sigmoid" else (3,)
    run = jax.jit(jax.value_and_grad(loss, (0, 1, *numbers)))
    return lambda *inputs: named(*jax.device_get(run(*inputs)))


def line(devices):
    kinds = (AxisType.Auto,)
    return jax.make_mesh((devices,), ("x",), kinds, devices=jax.devices()[:devices])


def unit(x):
    return (x / np.linalg.norm(x, axis=-1, keepdims=True)).astype(np.float32)


def draw(mask, kind="softmax", scale=10.0, seed=0):
    """Unit embeddings of the valid pairs, what must not be read in the other slots."""
    rng = np.random.default_rng(seed)
    image, text = unit(rng.normal(size=(2, len(mask), WIDTH)))
    image[~mask], text[~mask] = np.nan, np.inf
    numbers = (scale, -5.0)[: 1 + (kind == "sigmoid")]
    return image, text, mask, *map(np.float32, numbers)


def some(valid):
    mask = np.zeros(SLOTS, bool)
    mask[valid] = True
    return mask


MASKS = {
    "half of them": np.random.default_rng(1).random(SLOTS) < 0.5,
    "all": some(slice(None)),
    "none on the first devices": some(slice(SLOTS // 2, None)),
    "one on each second place": some(slice(None, None, 2)),
    "one in all": some(17),
    "none in all": some([]),
}


def assert_near(found, expected, tolerance=1e-5):
    for name, value in expected.items():
        error = np.abs(found[name] - value).max()
        assert error <= tolerance * np.abs(value).max(), (name, error)


@pytest.mark.parametrize("devices", [0, 1, 2, 4, 8])
@pytest.mark.parametrize("kind", LOSSES)
def test_loss_and_gradients_are_those_over_all_valid_pairs(kind, devices):
    for name, mask in MASKS.items():
        inputs = draw(mask, kind)
        found = on_ring(kind, devices)(*inputs)
        try:
            assert_near(found, by_formula(kind, *inputs))
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from error
        for gradient in (found["image"], found["text"]):
            assert (gradient[~mask] == 0).all(), name


@pytest.mark.parametrize(
    "kind, check", [("softmax", True), ("softmax", False), ("sigmoid", True)]
)
def test_pairs_may_be_split_over_two_of_three_axes(kind, check):
    mesh = jax.make_mesh((2, 2, 2), ("replica", "fsdp", "tensor"), (AxisType.Auto,) * 3)
    axes = "replica", "fsdp"
    loss = getattr(contrastive, f"{kind}_loss")
    one = functools.partial(loss, axis_name=axes, chunk=CHUNK)
    run = differentiate(kind, place(one, 1 + (kind == "sigmoid"), mesh, axes, check))
    inputs = draw(MASKS["half of them"], kind)
    assert_near(run(*inputs), by_formula(kind, *inputs))


@pytest.mark.parametrize("chunk", [1, 6, 1000])
def test_any_chunk_gives_the_same(chunk):
    inputs = draw(MASKS["half of them"])
    found = on_ring("softmax", 8, chunk)(*inputs)
    assert_near(found, by_formula("softmax", *inputs))


@pytest.mark.parametrize("kind", LOSSES)
def test_equal_pairs_share_and_their_order_changes_nothing(kind):
    image, text, mask, *numbers = draw(MASKS["all"], kind)
    image[1::3], text[2::3] = image[::3], text[::3]
    inputs = image, text, mask, *numbers
    expected = by_formula(kind, *inputs)
    assert_near(on_ring(kind, 8)(*inputs), expected)
    order = np.random.default_rng(2).permutation(SLOTS)
    moved = on_ring(kind, 8)(*(x[order] for x in inputs[:3]), *numbers)
    for name in ("image", "text"):
        expected[name] = expected[name][order]
    assert_near(moved, expected)


@pytest.mark.parametrize("kind", LOSSES)
def test_what_lies_beside_the_pairs_changes_no_bit(kind):
    image, text, mask, *numbers = draw(MASKS["half of them"], kind)
    found = on_ring(kind, 4)(image, text, mask, *numbers)
    image[~mask], text[~mask] = 1, image[mask][0]
    other = on_ring(kind, 4)(image, text, mask, *numbers)
    for name, value in found.items():
        np.testing.assert_array_equal(value, other[name])


def test_a_pair_that_is_no_number_is_not_hidden():
    for kind in LOSSES:
        image, *rest = draw(MASKS["all"], kind)
        image[3] = np.nan
        assert np.isnan(on_ring(kind, 4)(image, *rest)["loss"])


@pytest.mark.parametrize("noise", [0, 0.02])
def test_nearly_certain_pairs_are_as_exact_as_with_all_logits_at_once(noise):
    one = functools.partial(contrastive_forms.dense, axis_name="x")
    dense = differentiate("softmax", place(one, 1, line(1), "x"))
    forms = {"dense": dense} | {n: on_ring("softmax", n) for n in (1, 8)}
    errors = {form: {name: [] for name in NAMES[:4]} for form in forms}
    for seed in range(5):
        image, _, mask, _ = draw(MASKS["all"], seed=seed)
        rng = np.random.default_rng(seed)
        image[1::2] = unit(image[::2] + 0.2 * rng.normal(size=image[::2].shape))
        text = unit(image + noise * rng.normal(size=image.shape))
        inputs = image, text, mask, np.float32(100)
        expected = by_formula("softmax", *inputs)
        for form, run in forms.items():
            for name, value in run(*inputs).items():
                error = np.abs(value - expected[name]).max()
                errors[form][name].append(error / np.abs(expected[name]).max())
    # What a logit of 100 is rounded by is common to both, and may hit either more.
    for name, slack in (("loss", 1), ("image", 1.2), ("text", 1.2), ("scale", 1)):
        limit = slack * np.median(errors["dense"][name])
        for devices in (1, 8):
            assert np.median(errors[devices][name]) <= limit, (name, devices, errors)


def test_the_loss_of_certain_pairs_keeps_its_digits():
    image, _, *rest, _ = draw(MASKS["all"])
    inputs = image, image, *rest, np.float32(40)
    expected = by_formula("softmax", *inputs)
    assert expected["loss"] < 1e-5
    # A logit of 40 is rounded by 2e-6, a sum of 16 products by some more.
    assert_near(on_ring("softmax", 8)(*inputs), expected, tolerance=2e-5)


@pytest.mark.parametrize("kind", LOSSES)
def test_the_loss_alone_is_that_which_comes_with_gradients(kind):
    inputs = draw(MASKS["half of them"], kind)
    loss = getattr(contrastive, f"{kind}_loss")
    alone = jax.jit(functools.partial(loss, axis_name=(), chunk=CHUNK))(*inputs)
    np.testing.assert_allclose(alone, on_ring(kind, 0)(*inputs)["loss"], rtol=1e-6)


@pytest.mark.parametrize("kind", LOSSES)
def test_half_precision_is_that_of_the_embeddings_and_of_sums_sent(kind):
    image, text, mask, *numbers = draw(MASKS["half of them"], kind)
    rounded = (np.asarray(x, jnp.bfloat16).astype(np.float32) for x in (image, text))
    expected = by_formula(kind, *rounded, mask, *numbers)
    inputs = image, text, mask, *numbers
    # Sums stay in float32: only the embeddings are rounded, and those once.
    found = on_ring(kind, 8, dtype="bfloat16")(*inputs)
    assert_near(found, expected)
    both = on_ring(kind, 8, dtype="bfloat16", grad_dtype="bfloat16")(*inputs)
    np.testing.assert_array_equal(both["image"], found["image"])
    assert (both["text"] != found["text"]).any()
    error = np.abs(both["text"] - expected["text"]).max()
    assert error <= 0.02 * np.abs(expected["text"]).max()  # 8 roundings of 2^-9


def test_embeddings_of_a_half_precision_tower_get_gradients_of_their_own_kind():
    image, text, mask, scale = draw(MASKS["all"])
    inputs = image.astype(jnp.bfloat16), text.astype(jnp.bfloat16), mask, scale
    found = on_ring("softmax", 8)(*inputs)
    assert found["image"].dtype == found["text"].dtype == jnp.bfloat16
    assert_near(found, by_formula("softmax", *inputs), tolerance=2**-8)


def test_a_chunk_holds_at_least_one_pair():
    with pytest.raises(ValueError, match="chunk=0: take 1 or more"):
        on_ring("softmax", 0, chunk=0)(*draw(MASKS["all"]))


@pytest.mark.parametrize("name", ["dense", "gather_both", "gather_chunks"])
def test_what_it_is_compared_with_is_the_same_loss(name):
    options = {"chunk": 3} if name == "gather_chunks" else {}
    form = getattr(contrastive_forms, name)
    one = functools.partial(form, axis_name="x", **options)
    image, text, mask, scale = draw(MASKS["half of them"])
    inputs = np.nan_to_num(image), np.nan_to_num(text, posinf=0), mask, scale
    run = differentiate("softmax", place(one, 1, line(8), "x"))
    assert_near(run(*inputs), by_formula("softmax", *inputs))


@pytest.mark.parametrize("name", ["dense_sigmoid", "sigmoid_blocks"])
def test_what_the_sigmoid_is_compared_with_is_the_same_loss(name):
    one = functools.partial(getattr(contrastive_forms, name), axis_name="x")
    image, text, mask, *numbers = draw(MASKS["half of them"], "sigmoid")
    inputs = np.nan_to_num(image), np.nan_to_num(text, posinf=0), mask, *numbers
    run = differentiate("sigmoid", place(one, 2, line(8), "x"))
    assert_near(run(*inputs), by_formula("sigmoid", *inputs))


def lowered(loss, slots, width, numbers=1):
    """Loss and gradients over 8 devices of so many slots each, not compiled."""
    shapes = [(8 * slots, width)] * 2 + [(8 * slots,)] + [()] * numbers
    kinds = [np.float32] * 2 + [bool] + [np.float32] * numbers
    inputs = map(jax.ShapeDtypeStruct, shapes, kinds)
    run = jax.value_and_grad(place(loss, numbers, line(8), "x"), (0, 1, 3))
    return jax.jit(run).lower(*inputs)


def compiled(*arguments):
    return lowered(*arguments).compile()


def ring_of(kind, chunk, **dtypes):
    loss = getattr(contrastive, f"{kind}_loss")
    return functools.partial(loss, axis_name="x", chunk=chunk, **dtypes)


@pytest.mark.parametrize("kind", LOSSES)
def test_no_device_ever_holds_the_embeddings_of_all(kind):
    slots, width, chunk = 64, 32, 16
    program = compiled(ring_of(kind, chunk), slots, width, 1 + (kind == "sigmoid"))
    found = hlo.read(program.as_text())
    assert {c.kind for c in found} == {"collective-permute", "all-reduce"}
    for one in found:
        piece = chunk * width if one.kind == "collective-permute" else 8
        assert one.size <= 4 * piece, one
    dense = functools.partial(contrastive_forms.dense, axis_name="x")
    found = hlo.read(compiled(dense, slots, width).as_text())
    assert ("all-gather", 4 * 8 * slots * width, 1) in {each[:3] for each in found}


@pytest.mark.parametrize("kind", LOSSES)
def test_only_as_many_chunks_travel_as_the_data_fill(kind):
    text = compiled(ring_of(kind, 16), 64, 32, 1 + (kind == "sigmoid")).as_text()
    one, four = (
        sum(c.size * c.times for c in hlo.read(text, chunks)) for chunks in (1, 4)
    )
    # All but the few numbers that all devices sum.
    assert one >= 7 * 16 * 32 * 4
    assert four >= 3.9 * one


@pytest.mark.parametrize("kind", LOSSES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_no_product_of_float32_embeddings_may_be_rounded(kind, dtype):
    numbers = 1 + (kind == "sigmoid")
    text = lowered(ring_of(kind, 16, dtype=dtype), 64, 32, numbers).as_text()
    products = [line for line in text.splitlines() if "stablehlo.dot_general" in line]
    exact = [line for line in products if "precision = [HIGHEST, HIGHEST]" in line]
    assert len(products) >= 3
    assert (len(exact) == len(products)) == (dtype == "float32")


@pytest.mark.parametrize("kind", LOSSES)
def test_memory_grows_with_the_pairs_not_with_their_square(kind):
    numbers = 1 + (kind == "sigmoid")
    small, large = (
        compiled(ring_of(kind, 16), slots, 32, numbers).memory_analysis()
        for slots in (64, 256)
    )
    assert large.temp_size_in_bytes <= 4.4 * small.temp_size_in_bytes


@pytest.mark.parametrize(
    "kind, dtype, most",
    [
        ("softmax", "float32", 0.8),
        ("softmax", "bfloat16", 0.55),
        ("sigmoid", "float32", 0.55),
    ],
)
def test_fewer_bytes_are_sent_than_by_gathering_both_modalities(kind, dtype, most):
    slots, width, numbers = 64, 512, 1 + (kind == "sigmoid")
    program = compiled(ring_of(kind, slots, dtype=dtype), slots, width, numbers)
    sent = sum(c.size * c.times for c in hlo.read(program.as_text()))
    # Two gathered, and their gradients scattered back, from 7 others, in float32.
    assert sent <= most * 2 * 2 * 7 * slots * width * 4
