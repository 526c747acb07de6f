import jax
import jax.numpy as jnp
import numpy as np
import pytest

from navit_jax.losses import classification as losses
from navit_jax.metrics import Mean, fold, hits, interval_by_group, masked

LABELS = jnp.array([[0, 2, -1], [1, -1, -1], [-1, -1, -1], [3, 3, -1]], jnp.int32)
TARGETS = np.array([[1, 0, 1, 0], [0, 1, 0, 0], [0, 0, 0, 0], [0, 0, 0, 1.0]])
LOGITS = jnp.float32(np.random.default_rng(0).normal(size=(4, 4)) * 3)


def test_sigmoid_loss_sums_each_class_as_its_own_question():
    p = 1 / (1 + np.exp(-np.float64(LOGITS)))
    expected = -(TARGETS * np.log(p) + (1 - TARGETS) * np.log(1 - p)).sum(-1)
    np.testing.assert_allclose(losses.sigmoid_loss(LOGITS, LABELS), expected, rtol=1e-5)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_softmax_loss_shares_the_probability_among_labels(smoothing):
    logits = np.float64(LOGITS)
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    targets = TARGETS / np.maximum(TARGETS.sum(-1, keepdims=True), 1)
    targets = (1 - smoothing) * targets + smoothing / 4
    got = losses.softmax_loss(LOGITS, LABELS, smoothing)
    np.testing.assert_allclose(got, -(targets * log_p).sum(-1), rtol=1e-5, atol=1e-6)


def test_the_best_class_hits_if_it_is_any_of_the_labels():
    scores = jnp.array([[0, 0, 9, 0], [0, 0, 9, 0], [9, 0, 0, 0], [0, 0, 0, 9.0]])
    np.testing.assert_array_equal(hits(scores, LABELS), [1, 0, 0, 1])


def test_a_mean_over_parts_is_the_mean_of_the_whole_and_never_reads_what_is_masked():
    values = jnp.array([1.0, jnp.nan, 4.0, 7.0])
    mask = jnp.array([True, False, True, True])
    parts = [fold(masked(values[i:j], mask[i:j])) for i, j in ((0, 3), (3, 4))]
    assert (parts[0] + parts[1]).result() == pytest.approx(4.0)
    assert np.isnan(Mean(total=0.0, weight=0.0).result())
    gradient = jax.grad(lambda v: fold(masked(v, mask)).total)(values)
    np.testing.assert_array_equal(gradient, [1, 0, 1, 1])


def test_the_interval_counts_groups_and_not_their_copies():
    rng = np.random.default_rng(1)
    right = (rng.random(300) < 0.4).astype(np.float64)
    alone = interval_by_group(right, np.ones(300), np.arange(300))
    # The normal approximation of a share of 300 independent images.
    half = 1.96 * np.sqrt(right.mean() * (1 - right.mean()) / 300)
    np.testing.assert_allclose(alone, right.mean() + np.array([-half, half]), atol=0.01)
    copies = np.repeat(right, 4), np.ones(1200), np.repeat(np.arange(300), 4)
    np.testing.assert_allclose(interval_by_group(*copies), alone, atol=1e-12)
