"""Losses of a student's vector against its teacher's, one number an image.

D width; C classes of the teacher's head.
"""

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

EPS = 1e-6


def cosine(
    student: Float[Array, "*S D"], teacher: Float[Array, "*S D"]
) -> Float[Array, "*S"]:
    """1 - the cosine of the angle between them; 1 where either is 0."""
    return 1 - optax.cosine_similarity(student, teacher, epsilon=EPS)


def l2(
    student: Float[Array, "*S D"], teacher: Float[Array, "*S D"]
) -> Float[Array, "*S"]:
    """The squared error, averaged over the width: length counts as well as angle."""
    return jnp.square(student - teacher).mean(-1)


def smooth_l1(
    student: Float[Array, "*S D"], teacher: Float[Array, "*S D"]
) -> Float[Array, "*S"]:
    """Huber's loss at 1 of the standardized vectors, averaged over the width."""
    return optax.huber_loss(_standardize(student), _standardize(teacher)).mean(-1)


def kl(
    student: Float[Array, "*S C"], teacher: Float[Array, "*S C"]
) -> Float[Array, "*S"]:
    """KL divergence of the student's softmax from the teacher's; takes logits."""
    return optax.losses.kl_divergence_with_log_targets(
        jax.nn.log_softmax(student), jax.nn.log_softmax(teacher)
    )


def _standardize(vectors: Float[Array, "*S D"]) -> Float[Array, "*S D"]:
    """A layer norm without scale and bias."""
    return jax.nn.standardize(vectors, epsilon=EPS)


LOSSES = {"cosine": cosine, "l2": l2, "smooth_l1": smooth_l1, "kl": kl}
