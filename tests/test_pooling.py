import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

from navit_jax.models import pooling

B, L, N, D, H = 2, 12, 3, 8, 2
# Tokens of images 1 and 2 and padding; a row without any image.
SEGMENT_IDS = jnp.array([[1, 1, 1, 1, 1, 2, 2, 0, 0, 0, 0, 0], [0] * L])
TOKENS = jax.random.normal(jax.random.key(0), (B, L, D))
MASKS = pooling.image_masks(SEGMENT_IDS, N)
POOL = pooling.AttentionPool(
    num_heads=H, hidden=16, bias_qkv=True, bias_ln=True, bias_mlp=True, dtype="float32"
)


@functools.cache
def params():
    shapes = jax.eval_shape(POOL.init, jax.random.key(1), TOKENS, MASKS)
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda s: jnp.array(rng.standard_normal(s.shape)), shapes)


@jax.jit
def pool(tokens):
    return POOL.apply(params(), tokens, MASKS)


def test_mean_pool_averages_each_image_and_gives_zeros_for_empty_slots():
    expected = [TOKENS[0, :5].mean(0), TOKENS[0, 5:7].mean(0), np.zeros(D)]
    pooled = pooling.mean_pool(TOKENS, MASKS)
    np.testing.assert_allclose(pooled[0], expected, rtol=1e-5)
    np.testing.assert_array_equal(pooled[1], np.zeros((N, D)))


def test_attention_pool_equals_the_formula_image_by_image():
    p = jax.tree.map(np.float64, params()["params"])
    for slot, own in enumerate([slice(0, 5), slice(5, 7)]):
        x = np.float64(TOKENS[0, own])
        query = oracle.heads(p["query"], p["probe"])
        key, value = oracle.heads(p["key"], x), oracle.heads(p["value"], x)
        z = oracle.merge(p["out"], oracle.attend(query, key, value))
        expected = z + oracle.mlp(p["mlp"], oracle.norm(p["norm"], z))
        actual = pool(TOKENS)[0, slot]
        np.testing.assert_allclose(actual, expected[0], atol=1e-5 * abs(expected).max())


@pytest.mark.parametrize(
    "others", [slice(0, 5), slice(7, 12)], ids=["image", "padding"]
)
def test_an_image_sees_neither_other_images_nor_padding(others):
    after = pool(TOKENS.at[:, others].set(9.0))
    np.testing.assert_array_equal(pool(TOKENS)[:, 1], after[:, 1])


def test_empty_slots_are_zero_and_without_gradient():
    pooled = pool(TOKENS)
    np.testing.assert_array_equal(pooled[0, 2], np.zeros(D))
    np.testing.assert_array_equal(pooled[1], np.zeros((N, D)))

    def total(params, tokens):
        pooled = POOL.apply(params, tokens, MASKS)
        return pooled[0, 2].sum() + pooled[1].sum()

    for leaf in jax.tree.leaves(jax.jit(jax.grad(total, (0, 1)))(params(), TOKENS)):
        np.testing.assert_array_equal(leaf, np.zeros_like(leaf))


def test_huge_scores_of_one_image_do_not_flush_those_of_another():
    # One peak a row instead of one an image would give the second image 0 / 0.
    scores = jnp.where(SEGMENT_IDS == 1, 3e4, -3e4)[..., None].repeat(H, -1)
    values = TOKENS.reshape(B, L, H, D // H)
    pooled = pooling.segment_attend(scores, values, MASKS).reshape(B, N, D)
    expected = pooling.mean_pool(TOKENS, MASKS)
    np.testing.assert_allclose(pooled, expected, atol=1e-6)


def test_nothing_of_the_size_slots_times_tokens_is_as_wide_as_the_model():
    jaxpr = jax.make_jaxpr(pool)(TOKENS)
    sizes = [
        np.prod(v.aval.shape) for eqn in equations(jaxpr.jaxpr) for v in eqn.outvars
    ]
    assert max(sizes) < B * N * L * D


def equations(jaxpr):
    for eqn in jaxpr.eqns:
        yield eqn
        for inner in jax.tree.leaves(
            list(eqn.params.values()), is_leaf=lambda x: hasattr(x, "jaxpr")
        ):
            if hasattr(inner, "jaxpr"):
                yield from equations(inner.jaxpr)
