import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from navit_jax.errors import ConfigError
from navit_jax.models.attention import packed_attention
from navit_jax.models.attention_blocks import blocks, count_scores
from navit_jax.models.attention_kernels import mha, splash

L, H, K = 150, 2, 8
# 150 divides by none of the blocks. Segment 2 of the last row is an image that failed
# to load: it keeps its number and has no token.
ROWS = {
    "one token": [1],
    "a full row of one image": [150],
    "many images and padding": [1, 40, 3, 64, 20, 10],
    "no image": [],
    "a full row": [5, 0, 1, 70, 74],
}
IMPLEMENTATIONS = ["dense", "blocks", "splash", "mha"]


def segments(lengths, L):
    ids = np.repeat(np.arange(1, len(lengths) + 1), lengths)
    return jnp.array(np.pad(ids, (0, L - len(ids))), jnp.int32)


IDS = jnp.stack([segments(lengths, L) for lengths in ROWS.values()])
REAL = np.asarray(IDS) > 0


def draw(seed, shape, dtype=jnp.float32):
    return tuple(
        jax.random.normal(key, shape, dtype)
        for key in jax.random.split(jax.random.key(seed), 4)
    )


INPUTS = draw(0, (*IDS.shape, H, K))


def images(ids):
    for row, values in enumerate(np.asarray(ids)):
        for image in np.unique(values[values > 0]):
            yield row, np.flatnonzero(values == image)


def oracle(q, k, v, gradient, ids, causal=False):
    """Output and gradients, by the formulas, of each image alone in float64."""
    q, k, v, gradient = (np.asarray(x, np.float64) for x in (q, k, v, gradient))
    out, to_q, to_k, to_v = (np.zeros(q.shape) for _ in range(4))
    scale = q.shape[-1] ** -0.5
    for row, tokens in images(ids):
        for head in range(q.shape[2]):
            at = row, tokens, head
            scores = q[at] @ k[at].T * scale
            if causal:
                scores[np.triu_indices(len(tokens), 1)] = -np.inf
            weights = np.exp(scores - scores.max(1, keepdims=True))
            weights /= weights.sum(1, keepdims=True)
            out[at] = weights @ v[at]
            to_v[at] = weights.T @ gradient[at]
            to_weights = gradient[at] @ v[at].T
            mean = (weights * to_weights).sum(1, keepdims=True)
            to_scores = weights * (to_weights - mean) * scale
            to_q[at], to_k[at] = to_scores @ k[at], to_scores.T @ q[at]
    return out, to_q, to_k, to_v


def with_gradients(attend):
    """(q, k, v, gradient, ids) -> output and gradients, compiled."""

    @jax.jit
    def run(q, k, v, gradient, ids):
        with jax.default_matmul_precision("highest"):
            out, back = jax.vjp(lambda q, k, v: attend(q, k, v, ids), q, k, v)
            return out, *back(gradient)

    return run


@functools.cache
def compiled(implementation):
    return with_gradients(
        lambda *args: packed_attention(*args, implementation, interpret=True)
    )


def assert_close(actual, expected, tolerance=1e-5):
    for a, e in zip(actual, expected, strict=True):
        assert np.abs(np.asarray(a, np.float64) - e).max() <= tolerance * abs(e).max()


def assert_equal_bits(actual, expected, where):
    for a, e in zip(actual, expected, strict=True):
        np.testing.assert_array_equal(np.asarray(a)[where], np.asarray(e)[where])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_every_token_attends_to_its_image_as_if_that_were_alone(implementation):
    actual = compiled(implementation)(*INPUTS, IDS)
    assert_close(actual, oracle(*INPUTS, IDS))
    for x in actual:
        assert not np.asarray(x)[~REAL].any()


def test_a_causal_token_attends_to_itself_and_what_is_before_it_in_its_image():
    attend = with_gradients(lambda *args: packed_attention(*args, causal=True))
    actual = attend(*INPUTS, IDS)
    assert_close(actual, oracle(*INPUTS, IDS, causal=True))
    for x in actual:
        assert not np.asarray(x)[~REAL].any()


@pytest.mark.parametrize("implementation", ["blocks", "splash", "mha"])
def test_what_is_not_causal_says_so(implementation):
    with pytest.raises(ConfigError, match=f"'{implementation}' is not causal"):
        packed_attention(*INPUTS[:3], IDS, implementation, causal=True)


@pytest.mark.parametrize("block", [7, 64, 4096])
def test_any_block_gives_the_same(block):
    run = with_gradients(lambda *args: blocks(*args, block))
    assert_close(run(*INPUTS, IDS), oracle(*INPUTS, IDS))


def test_blocks_agree_on_random_rows():
    run = with_gradients(lambda *args: blocks(*args, 16))
    for seed in range(12):
        rng = np.random.default_rng(seed)
        rows = []
        for _ in range(3):
            lengths = rng.integers(1, rng.integers(2, 60), 30)
            kept = lengths[lengths.cumsum() <= rng.integers(0, 129)]
            rows.append(segments(kept, 128))
        inputs = draw(seed, (3, 128, 1, 4))
        assert_close(run(*inputs, jnp.stack(rows)), oracle(*inputs, jnp.stack(rows)))


@pytest.mark.parametrize("content", [9.0, np.nan])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_what_padding_holds_changes_no_bit(implementation, content):
    others = [jnp.where(REAL[..., None, None], x, content) for x in INPUTS]
    run = compiled(implementation)
    after = run(*others, IDS)
    assert_equal_bits(after, run(*INPUTS, IDS), where=slice(None))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_what_other_images_hold_changes_no_bit(implementation):
    run = compiled(implementation)
    before = run(*INPUTS, IDS)
    for image in (1, 2, 4):
        mine = np.asarray(IDS) == image
        others = [jnp.where(mine[..., None, None], x, 3 * x + 1) for x in INPUTS]
        assert_equal_bits(run(*others, IDS), before, where=mine)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_bfloat16_keeps_the_softmax_in_float32_and_stays_finite(implementation):
    inputs = draw(1, (*IDS.shape, H, K), jnp.bfloat16)
    actual = compiled(implementation)(*inputs, IDS)
    # A relative step of bfloat16 is 2^-8; weights and gradients are rounded once each.
    assert_close(actual, oracle(*inputs, IDS), tolerance=2e-2)
    assert all(x.dtype == jnp.bfloat16 for x in actual)
    # Where logits are of 1e10, mha's gradient recomputes some above their maximum by
    # rounding, and overflows; the others do not.
    huge = [x * (3e2 if implementation == "mha" else 3e4) for x in inputs[:2]]
    for x in compiled(implementation)(*huge, *inputs[2:], IDS):
        assert np.isfinite(np.asarray(x, np.float32)).all()


def test_a_bfloat16_gradient_does_not_stop_growing_over_many_blocks():
    q, k, v, gradient = draw(2, (1, 512, 1, K), jnp.bfloat16)
    # Queries and gradients of one sign: each block adds to the same side.
    inputs = 0 * q, k, v, abs(gradient)
    ids = jnp.ones((1, 512), jnp.int32)
    run = with_gradients(lambda *args: blocks(*args, 8))
    assert_close(run(*inputs, ids)[3:], oracle(*inputs, ids)[3:], tolerance=1e-2)


@pytest.mark.parametrize("implementation", ["dense", "blocks"])
def test_saturated_softmax_keeps_its_gradient(implementation):
    q, k, v, gradient = INPUTS
    inputs = 30 * q, 10 * k, v, gradient
    # Logits near 3000 have a float32 step of 2e-4, and so have the weights.
    assert_close(
        compiled(implementation)(*inputs, IDS), oracle(*inputs, IDS), tolerance=1e-3
    )


def pack(lengths, L):
    """Next fit in the order given."""
    rows, row = [], []
    for n in lengths:
        if sum(row) + n > L:
            rows.append(row)
            row = []
        row.append(n)
    return rows


def test_work_on_native_sizes_is_within_1_8_of_the_least():
    rng = np.random.default_rng(0)
    side, aspect = rng.uniform(64, 256, 300), rng.uniform(-1, 1, 300)
    stretch = 3 ** (aspect / 2)
    lengths = np.rint(side * stretch / 16) * np.rint(side / stretch / 16)
    rows = pack(np.maximum(lengths, 1).astype(int), 4096)
    count = jax.jit(count_scores)
    ids = jnp.stack([segments(row, 4096) for row in rows])
    least = sum(n**2 for row in rows for n in row)
    assert least <= count(ids) <= 1.8 * least


def test_only_pairs_of_blocks_that_share_an_image_are_visited():
    counted = jax.jit(functools.partial(count_scores, block=4))

    def pairs(*rows):
        return counted(jnp.stack([segments(row, 12) for row in rows])) // 4**2

    assert pairs([4, 4, 4], [12], []) == 3 + 9
    # A block ends with an image rather than in one that another block ends.
    assert pairs([2, 4, 4, 2], [], [2, 4, 4]) == 4 + 3
    # Small images share a block; a row does not continue the one before.
    assert pairs([1, 1, 2, 8], [12], [1, 3]) == (1 + 4) + 9 + 1


def gradient_memory(L, implementation):
    x = jax.ShapeDtypeStruct((1, L, 1, 8), jnp.float32)
    ids = jax.ShapeDtypeStruct((1, L), jnp.int32)
    run = with_gradients(lambda *a: packed_attention(*a, implementation))
    memory = run.lower(x, x, x, x, ids).compile().memory_analysis()
    return memory.temp_size_in_bytes


def test_memory_of_blocks_is_linear_in_the_length_of_a_row():
    assert gradient_memory(8192, "blocks") < 4.4 * gradient_memory(2048, "blocks")
    assert gradient_memory(8192, "blocks") < gradient_memory(8192, "dense") / 100


def test_the_gradient_keeps_inputs_output_and_one_number_a_query():
    q, k, v, _ = INPUTS
    _, back = jax.vjp(lambda q, k, v: blocks(q, k, v, IDS), q, k, v)
    kept = sum(x.size for x in jax.tree.leaves(back))
    assert kept <= 4 * q.size + IDS.size * H + IDS.size


class Layer(nn.Module):
    implementation: str

    @nn.compact
    def __call__(self, tokens, ids):
        q, k, v = nn.DenseGeneral((3, 2, 4))(tokens).transpose(2, 0, 1, 3, 4)
        attended = packed_attention(q, k, v, ids, self.implementation)
        return tokens + attended.reshape(tokens.shape), None


def test_blocks_run_under_scanned_and_rematerialised_layers():
    def gradients(implementation):
        scanned = nn.scan(
            nn.remat(Layer),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=nn.broadcast,
            length=3,
        )(implementation)
        tokens = draw(2, (*IDS.shape, 8))[0]
        params = jax.jit(scanned.init)(jax.random.key(0), tokens, IDS)
        loss = lambda params: (scanned.apply(params, tokens, IDS)[0] ** 2).sum()  # noqa: E731
        with jax.default_matmul_precision("highest"):
            return jax.tree.leaves(jax.jit(jax.grad(loss))(params))

    assert_close(gradients("blocks"), [np.asarray(x) for x in gradients("dense")])


@pytest.mark.parametrize(
    "implementation, B, H",
    [
        ("blocks", 8, 2),
        ("splash", 8, 2),
        ("mha", 8, 2),
        ("blocks", 5, 2),
        ("blocks", 8, 3),
    ],
)
def test_on_a_mesh_each_device_attends_for_its_own_rows_and_heads(implementation, B, H):
    mesh = jax.make_mesh((2, 2, 2), ("replica", "fsdp", "tensor"), (AxisType.Auto,) * 3)
    ids = jnp.stack([IDS[row % len(IDS), -80:] for row in range(B)])
    inputs = draw(3, (B, 80, H, K))
    rows = ("replica", "fsdp") if B % 4 == 0 else None
    heads = "tensor" if H % 2 == 0 else None
    whole = NamedSharding(mesh, PartitionSpec(rows, None, heads))
    placed = [jax.device_put(x, whole) for x in inputs]
    placed += [jax.device_put(ids, NamedSharding(mesh, PartitionSpec(rows)))]
    run = with_gradients(
        lambda *a: packed_attention(*a, implementation, interpret=True)
    )
    with jax.set_mesh(mesh):
        text = run.lower(*placed).compile().as_text()
        actual = run(*placed)
    assert_close(actual, oracle(*inputs, ids))
    assert "all-gather" not in text
    if rows and heads:
        assert f"f32[{B // 4},80,{H // 2},{K}]" in text
        assert "all-reduce" not in text
        assert all(x.sharding.is_equivalent_to(whole, 4) for x in actual)


def test_inside_a_shard_map_it_does_not_split_again():
    mesh = jax.make_mesh((2,), ("fsdp",), (AxisType.Auto,), devices=jax.devices()[:2])
    q, k, v, _ = draw(4, (8, L, H, K))
    ids = jnp.stack([IDS[2]] * 8)
    rows = PartitionSpec("fsdp")
    with jax.set_mesh(mesh):
        split = jax.shard_map(
            lambda *a: packed_attention(*a, "blocks"),
            in_specs=rows,
            out_specs=rows,
            check_vma=False,
        )
        out = jax.jit(split)(q, k, v, ids)
    assert_close([out], [np.asarray(packed_attention(q, k, v, ids, "dense"))])


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("attend, platform", [(splash, "tpu"), (mha, "cuda")])
def test_kernels_lower_for_their_platform_on_a_machine_without(attend, platform, dtype):
    if platform == "cuda" and jax.__version_info__ >= (0, 11):
        pytest.skip("from jax 0.11 on, Triton kernels are lowered only beside a GPU")
    x = jax.ShapeDtypeStruct((1, 300, 3, 64), dtype)
    ids = jax.ShapeDtypeStruct((1, 300), jnp.int32)
    traced = with_gradients(attend).trace(x, x, x, x, ids)
    assert "custom_call" in traced.lower(lowering_platforms=(platform,)).as_text()


@pytest.mark.parametrize(
    "implementation, platform", [("splash", "tpu"), ("mha", "gpu")]
)
def test_a_kernel_of_another_backend_is_refused(implementation, platform):
    message = f"{implementation!r} is a kernel for {platform}, and this computes on cpu"
    with pytest.raises(ConfigError, match=message):
        packed_attention(*INPUTS[:3], IDS, implementation)


def test_an_unknown_implementation_is_refused_by_name():
    with pytest.raises(ConfigError, match="'block': did you mean 'blocks'"):
        packed_attention(*INPUTS[:3], IDS, "block")


def test_auto_is_blocks_on_the_cpu():
    auto = packed_attention(*INPUTS[:3], IDS)
    np.testing.assert_array_equal(auto, packed_attention(*INPUTS[:3], IDS, "blocks"))
