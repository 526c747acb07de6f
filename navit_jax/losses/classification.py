"""Losses of one image against its labels, summed over classes, not over images.

C classes; K labels an image may have, -1 where it has fewer.
"""

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int


def multi_hot(labels: Int[Array, "*S K"], num_classes: int) -> Float[Array, "*S C"]:
    """1 at each label, 0 elsewhere; -1 is no label, a label given twice counts once."""
    return jax.nn.one_hot(labels, num_classes, dtype=jnp.float32).max(-2)


def sigmoid_loss(
    logits: Float[Array, "*S C"], labels: Int[Array, "*S K"]
) -> Float[Array, "*S"]:
    """Sigmoid cross-entropy, each class an independent question (section 3.1)."""
    targets = multi_hot(labels, logits.shape[-1])
    return optax.sigmoid_binary_cross_entropy(logits, targets).sum(-1)


def softmax_loss(
    logits: Float[Array, "*S C"],
    labels: Int[Array, "*S K"],
    label_smoothing: float | int = 0.0,
) -> Float[Array, "*S"]:
    """Softmax cross-entropy; several labels of an image share its probability equally.

    Args:
      label_smoothing: Share of the probability spread over all classes.
    """
    targets = multi_hot(labels, logits.shape[-1])
    targets /= jnp.maximum(targets.sum(-1, keepdims=True), 1)
    targets = optax.smooth_labels(targets, label_smoothing)
    return optax.softmax_cross_entropy(logits, targets)
