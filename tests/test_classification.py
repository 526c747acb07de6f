import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from navit_jax.batch import PackedBatch
from navit_jax.tasks.classification import Classification

B, N, C, D = 2, 4, 5, 5
RNG = np.random.default_rng(0)
# Also slots without an image have a vector, and a label: neither may count.
VECTORS = 3 * RNG.standard_normal((B, N, D))
KERNEL, BIAS = RNG.standard_normal((D, C)), RNG.standard_normal(C)
# One label; two; none; an image that failed. No slot; several; one; no image.
LABELS = [
    [[2, -1, -1], [0, 3, -1], [-1, -1, -1], [1, -1, -1]],
    [[4, -1, -1], [1, 2, 4], [0, -1, -1], [3, 1, -1]],
]
MASK = [[True, True, True, False], [False, True, True, False]]
COUNTED = [(0, 0), (0, 1), (1, 1), (1, 2)]
BATCH = PackedBatch(
    patches=jnp.zeros((B, 1, 1), jnp.uint8),
    coords=jnp.zeros((B, 1, 2), jnp.int32),
    segment_ids=jnp.ones((B, 1), jnp.int32),
    grids=jnp.ones((B, N, 2), jnp.int32),
    image_mask=jnp.array(MASK),
    image_ids=jnp.zeros((B, N, 2), jnp.uint32),
    targets={"labels": jnp.array(LABELS, jnp.int32)},
)
PARAMS = {"head": {"dense": {"kernel": jnp.float32(KERNEL), "bias": jnp.float32(BIAS)}}}


class Encoder(nn.Module):
    """Has encoded already."""

    def __call__(self, *_):
        return {"pooled": jnp.float32(VECTORS)}


def loss_of(logits, labels, loss_name, smoothing):
    """Of one image, by the definitions, class by class."""
    labels = {label for label in labels if label >= 0}
    if loss_name == "sigmoid":
        p = 1 / (1 + np.exp(-logits))
        return -sum(np.log(p[c] if c in labels else 1 - p[c]) for c in range(C))
    log_p = logits - np.log(np.exp(logits).sum())
    share = [(c in labels) / len(labels) for c in range(C)]
    smooth = [(1 - smoothing) * s + smoothing / C for s in share]
    return -sum(t * lp for t, lp in zip(smooth, log_p, strict=True))


@pytest.mark.parametrize(
    "loss_name, smoothing", [("sigmoid", 0.0), ("softmax", 0.0), ("softmax", 0.2)]
)
def test_loss_and_accuracy_are_means_over_the_labelled_images(loss_name, smoothing):
    losses, right = np.zeros((B, N)), np.zeros((B, N))
    for at in COUNTED:
        logits = VECTORS[at] @ KERNEL + BIAS
        labels = LABELS[at[0]][at[1]]
        losses[at] = loss_of(logits, labels, loss_name, smoothing)
        right[at] = int(logits.argmax()) in labels
    assert 0 < right.sum() < 4

    task = Classification(Encoder(), C, loss_name, smoothing)
    weights = task.weights(BATCH)
    assert weights == {"images": 4}
    loss, means = task.loss(PARAMS, BATCH, jax.random.key(0), weights)
    np.testing.assert_allclose(loss, losses.sum() / 4, rtol=1e-5)
    # A micro-batch is divided by the images of the whole batch.
    part, _ = task.loss(PARAMS, BATCH, jax.random.key(0), {"images": jnp.float32(10)})
    np.testing.assert_allclose(part, losses.sum() / 10, rtol=1e-5)
    by_image = task.metrics(PARAMS, BATCH)
    for name, expected in (("loss", losses), ("accuracy", right)):
        np.testing.assert_allclose(means[name].result(), expected.sum() / 4, rtol=1e-5)
        np.testing.assert_allclose(by_image[name].total, expected, rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(by_image[name].weight, losses > 0)


def test_a_batch_without_a_labelled_image_has_no_loss_and_no_gradient():
    task = Classification(Encoder(), C)
    empty = dataclasses.replace(BATCH, targets={"labels": jnp.full((B, N, 3), -1)})

    def loss(params):
        return task.loss(params, empty, jax.random.key(0), task.weights(empty))[0]

    value, gradient = jax.value_and_grad(loss)(PARAMS)
    assert value == 0
    assert not any(leaf.any() for leaf in jax.tree.leaves(gradient))


@pytest.mark.parametrize(
    "arguments, probability",
    [
        ({}, 1 / C),
        ({"loss_name": "softmax"}, 1 / C),
        ({"head_bias": -10.0}, 1 / (1 + np.exp(10))),
    ],
)
def test_training_starts_at_the_rate_of_one_label_in_c(arguments, probability):
    task = Classification(Encoder(), C, **arguments)
    params = task.init(jax.random.key(0), BATCH)
    found = task.outputs(params, BATCH)["probabilities"]
    np.testing.assert_allclose(found, np.full((B, N, C), probability), rtol=1e-5)
