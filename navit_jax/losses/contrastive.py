"""Contrastive losses over the image-text pairs of all devices, called in `shard_map`.

Texts go around the ring of devices (`losses/ring.py`). Logits exist c x c at a time and
the gradient computes them again: memory grows with the pairs, not with their square.
Time, memory and bytes against other forms: `python benchmarks/contrastive.py`.

n slots of this device, D embedding width, C chunks of c pairs.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from navit_jax.losses import ring as rings

# The score of what is no negative: exp of it is 0 beside any real score, and the
# difference of two of them is a number, as that of two infinities is not.
NEVER = -1e30


def softmax_loss(
    image: Float[Array, "n D"],
    text: Float[Array, "n D"],
    mask: Bool[Array, " n"],
    scale: Float[Array, ""] | float | int,
    *,
    axis_name: str | Sequence[str],
    chunk: int,
    dtype: str = "float32",
    grad_dtype: str = "float32",
) -> Float[Array, ""]:
    """Softmax over all texts for each image and over all images for each text (CLIP).

    The mean over all valid pairs of all devices, of both directions; 0 if there are
    none. What a slot without a pair holds, NaN included, touches nothing.

    Args:
      image: Embeddings, normalised by the caller.
      mask: The slot holds a pair.
      scale: Inverse temperature.
      axis_name: Mesh axes over which pairs are split; () on one device.
      chunk: Pairs a side of a block of logits.
      dtype: Of the embeddings in products and on the ring. With "float32" a TPU
        multiplies in several passes; "bfloat16" takes one.
      grad_dtype: Of the gradients of texts on the ring; sums are rounded to it at
        every device.
    """
    ring = rings.make(axis_name, chunk, dtype, grad_dtype, len(mask))
    peers = rings.find_peers(ring, mask)
    scale = _share(peers, scale)
    own = _softmax_sum(ring, peers, _float(image), _float(text), mask, scale)
    return lax.psum(own, ring.axes) / (2 * jnp.maximum(peers.counts.sum(), 1))


def sigmoid_loss(
    image: Float[Array, "n D"],
    text: Float[Array, "n D"],
    mask: Bool[Array, " n"],
    scale: Float[Array, ""] | float | int,
    bias: Float[Array, ""] | float | int,
    *,
    axis_name: str | Sequence[str],
    chunk: int,
    dtype: str = "float32",
    grad_dtype: str = "float32",
) -> Float[Array, ""]:
    """Each image with each text is a question of its own: one pair or not (SigLIP).

    The sum over all combinations divided by the valid pairs of all devices; 0 if there
    are none. Arguments as of `softmax_loss`; `bias` is added to every logit.
    """
    ring = rings.make(axis_name, chunk, dtype, grad_dtype, len(mask))
    peers = rings.find_peers(ring, mask)
    scale, bias = _share(peers, scale), _share(peers, bias)
    own = _sigmoid_sum(ring, peers, _float(image), _float(text), mask, scale, bias)
    return lax.psum(own, ring.axes) / jnp.maximum(peers.counts.sum(), 1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def clamp(x: Float[Array, ""], most: float | int) -> Float[Array, ""]:
    """The smaller one; past the end only a gradient that leads back counts.

    A gradient of 0 alone would keep there for ever what has stepped over the end.
    """
    return jnp.minimum(x, most)


def _clamp(x: Array, most: float | int) -> tuple[Array, Array]:
    return clamp(x, most), x


def _clamp_gradient(most: float | int, x: Array, gradient: Array) -> tuple[Array]:
    return (jnp.where((x < most) | (gradient > 0), gradient, 0),)


clamp.defvjp(_clamp, _clamp_gradient)


def _share(peers: rings.Peers, x: Any) -> Float[Array, ""]:
    """A number that all devices have, as this device's own.

    Its gradient here is then this device's part, and the sum over devices is left to
    `shard_map`, which knows whether it is due.
    """
    return jnp.asarray(x, jnp.float32) + 0 * peers.place


def _float(x: Array) -> Array:
    return x.astype(jnp.float32)


def _product(ring: rings.Ring, equation: str, x: Array, y: Array) -> Array:
    """Summed in float32, and of float32 embeddings with all digits."""
    # A TPU by itself would round what it multiplies to bfloat16.
    exact = "highest" if ring.dtype == "float32" else None
    kind = jnp.float32
    return jnp.einsum(equation, x, y, precision=exact, preferred_element_type=kind)


def _logits(ring: rings.Ring, u: Array, v: Array) -> Float[Array, "c c"]:
    return _product(ring, "iD,jD->ij", u, v)


def _pull(
    ring: rings.Ring, d_logits: Float[Array, "c c"], u: Array, v: Array
) -> tuple[Float[Array, "c D"], Float[Array, "c D"]]:
    """The gradients of u and v of the logits u v^T."""
    d_u = _product(ring, "ij,jD->iD", d_logits, _float(v))
    return d_u, _product(ring, "ij,iD->jD", d_logits, _float(u))


def _summary(scores: Float[Array, "c c"], axis: int) -> tuple[Array, Array]:
    """The largest score, and the sum of exp(score - largest)."""
    top = scores.max(axis)
    return top, jnp.exp(scores - jnp.expand_dims(top, axis)).sum(axis)


def _join(one: tuple[Array, Array], two: tuple[Array, Array]) -> tuple[Array, Array]:
    """One (largest, sum) of two; the logarithm of it has too few digits."""
    top = jnp.maximum(one[0], two[0])
    return top, one[1] * jnp.exp(one[0] - top) + two[1] * jnp.exp(two[0] - top)


def _add(one: Any, two: Any) -> Any:
    return jax.tree.map(jnp.add, one, two)


def _finish(
    positive: Float[Array, "C c"], negatives: tuple[Array, Array]
) -> tuple[Float[Array, "C c"], tuple[Array, Array], Float[Array, "C c"]]:
    """Loss, the softmax's (largest, 1 / sum), and the probability of the negatives.

    The positive stays apart until here: 1 - p and log p of a pair that is nearly
    certain would have no digits left.
    """
    top, rest = negatives
    largest = jnp.maximum(top, positive)
    rest = rest * jnp.exp(top - largest)
    loss = jnp.log1p(rest + jnp.expm1(positive - largest)) + (largest - positive)
    inverse = 1 / (rest + jnp.exp(positive - largest))
    return loss, (largest, inverse), rest * inverse


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _softmax_sum(
    ring: rings.Ring,
    peers: rings.Peers,
    image: Array,
    text: Array,
    mask: Array,
    scale: Array,
) -> Float[Array, ""]:
    """The losses of this device's images and texts, summed."""
    return _softmax_forward(ring, peers, image, text, mask, scale)[0]


def _softmax_forward(
    ring: rings.Ring,
    peers: rings.Peers,
    image: Array,
    text: Array,
    mask: Array,
    scale: Array,
) -> tuple[Float[Array, ""], Any]:
    images, texts = rings.compact(ring, image, mask), rings.compact(ring, text, mask)

    def block(u: Array, home: Any, v: Array, negative: Array, pair: Any) -> Any:
        rows, positive = home
        logits = scale * _logits(ring, u, v)
        if pair is not None:
            positive += jnp.where(pair, logits, 0).sum(1)
        scores = jnp.where(negative, logits, NEVER)
        return (_join(rows, _summary(scores, 1)), positive), _summary(scores, 0)

    zeros = jnp.zeros_like(images[..., 0], jnp.float32)
    empty = jnp.full_like(zeros, NEVER), zeros
    nothing = jax.tree.map(lambda x: x[0], empty)
    home = empty, zeros
    (rows, positive), columns = rings.go_around(
        ring, peers, block, _join, images, home, texts, empty, nothing
    )
    of_images, rows, wrong_text = _finish(positive, rows)
    of_texts, columns, wrong_image = _finish(positive, columns)
    kept = peers, images, texts, mask, scale, rows, columns, wrong_text + wrong_image
    return (of_images + of_texts).sum(), kept


def _softmax_backward(ring: rings.Ring, kept: Any, gradient: Float[Array, ""]) -> Any:
    peers, images, texts, mask, scale, rows, columns, wrong = kept

    def block(mine: Any, d_u: Array, theirs: Any, negative: Array, _: Any) -> Any:
        u, (row_top, row_inverse) = mine
        v, (column_top, column_inverse) = theirs
        scores = jnp.where(negative, scale * _logits(ring, u, v), NEVER)
        d_logits = jnp.exp(scores - row_top[:, None]) * row_inverse[:, None]
        d_logits += jnp.exp(scores - column_top) * column_inverse
        more, d_v = _pull(ring, d_logits, u, v)
        return d_u + more, d_v

    d_images = -wrong[..., None] * _float(texts)
    d_texts = (-wrong[..., None] * _float(images)).astype(ring.grad_dtype)
    nothing = jnp.zeros_like(d_images[0])
    d_images, d_texts = rings.go_around(
        ring, peers, block, _add, (images, rows), d_images, (texts, columns), d_texts,
        nothing,
    )  # fmt: skip
    d_scale = (_float(images) * d_images).sum() * gradient
    d_image, d_text = rings.spread(d_images, mask), rings.spread(d_texts, mask)
    gradient = gradient * scale
    return None, d_image * gradient, d_text * gradient, None, d_scale


_softmax_sum.defvjp(_softmax_forward, _softmax_backward)


def _sigmoid_pass(
    ring: rings.Ring, peers: rings.Peers, inputs: tuple[Array, ...], differentiate: bool
) -> tuple[Float[Array, ""], Any]:
    """The losses of this device's images, summed, and the gradients if wanted.

    A logit's gradient needs no other logit, so one ring does both.
    """
    image, text, mask, scale, bias = inputs
    images, texts = rings.compact(ring, image, mask), rings.compact(ring, text, mask)

    def block(u: Array, home: Any, v: Array, negative: Array, _: Any) -> Any:
        logits = jnp.where(negative, scale * _logits(ring, u, v) + bias, NEVER)
        new = jax.nn.softplus(logits).sum(1)
        if not differentiate:
            return home + new, ()
        d_logits = jax.nn.sigmoid(logits)
        d_u, d_v = _pull(ring, d_logits, u, v)
        return _add(home, (new, d_logits.sum(1), d_u)), d_v

    logits = scale * (_float(images) * _float(texts)).sum(-1) + bias
    valid = jnp.arange(logits.size).reshape(logits.shape) < peers.counts[peers.place]
    home, found, nothing = jnp.where(valid, jax.nn.softplus(-logits), 0), (), ()
    if differentiate:
        d_logits = jnp.where(valid, -jax.nn.sigmoid(-logits), 0)
        home = home, d_logits, d_logits[..., None] * _float(texts)
        found = (d_logits[..., None] * _float(images)).astype(ring.grad_dtype)
        nothing = jnp.zeros_like(home[2][0])
    home, found = rings.go_around(
        ring, peers, block, _add, images, home, texts, found, nothing
    )
    if not differentiate:
        return home.sum(), None
    losses, d_bias, d_images = home
    d_scale = (_float(images) * d_images).sum()
    d_image, d_text = (
        rings.spread(d_images, mask) * scale,
        rings.spread(found, mask) * scale,
    )
    return losses.sum(), (d_image, d_text, d_scale, d_bias.sum())


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _sigmoid_sum(
    ring: rings.Ring, peers: rings.Peers, *inputs: Array
) -> Float[Array, ""]:
    """The losses of this device's images, summed."""
    return _sigmoid_pass(ring, peers, inputs, differentiate=False)[0]


def _sigmoid_forward(ring: rings.Ring, peers: rings.Peers, *inputs: Array) -> Any:
    return _sigmoid_pass(ring, peers, inputs, differentiate=True)


def _sigmoid_backward(_: rings.Ring, kept: Any, gradient: Float[Array, ""]) -> Any:
    d_image, d_text, d_scale, d_bias = jax.tree.map(lambda x: x * gradient, kept)
    return None, d_image, d_text, None, d_scale, d_bias


_sigmoid_sum.defvjp(_sigmoid_forward, _sigmoid_backward)
