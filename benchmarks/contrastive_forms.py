"""Other ways to compute the contrastive losses, for comparison in tests and benchmarks.

They take what `navit_jax.losses.contrastive` takes, but no NaN in slots without a pair.
n slots of a device, M of all devices, D embedding width.
"""

import jax
import jax.numpy as jnp
from jax import lax

NEVER = -1e30


def dense(image, text, mask, scale, *, axis_name):
    """Gathers texts; all logits [n M] of a device's images at once, plain gradient.

    The cheapest form with full logits: one product, column sums summed over devices.
    """
    texts, masks = lax.all_gather((text, mask), axis_name, tiled=True)
    logits = scale * image @ texts.T
    rows = jax.nn.logsumexp(jnp.where(masks, logits, NEVER), 1)
    logits = jnp.where(mask[:, None], logits, NEVER)
    top = lax.stop_gradient(lax.pmax(lax.stop_gradient(logits).max(0), axis_name))
    columns = jnp.log(lax.psum(jnp.exp(logits - top).sum(0), axis_name)) + top
    columns = _own(columns, mask, axis_name)
    return _mean(rows + columns - 2 * scale * (image * text).sum(-1), mask, axis_name)


def gather_both(image, text, mask, scale, *, axis_name):
    """Gathers both modalities; logits [n M] twice, as public parallel losses do."""
    images, texts, masks = lax.all_gather((image, text, mask), axis_name, tiled=True)
    rows, columns = (
        jax.nn.logsumexp(jnp.where(masks, scale * own @ others.T, NEVER), 1)
        for own, others in ((image, texts), (text, images))
    )
    return _mean(rows + columns - 2 * scale * (image * text).sum(-1), mask, axis_name)


def gather_chunks(image, text, mask, scale, *, axis_name, chunk):
    """Gathers texts; logits [n chunk] again in the backward pass by `checkpoint`.

    `chunk` must divide n.
    """
    texts, masks = lax.all_gather((text, mask), axis_name, tiled=True)

    @jax.checkpoint
    def step(state, piece):
        top, total = state
        v, valid = piece
        logits = scale * image @ v.T
        scores = jnp.where(valid, logits, NEVER)
        new = jnp.maximum(top, lax.stop_gradient(scores.max(1)))
        total = total * jnp.exp(top - new) + jnp.exp(scores - new[:, None]).sum(1)
        scores = jnp.where(mask[:, None], logits, NEVER)
        largest = lax.stop_gradient(scores).max(0)
        return (new, total), (largest, jnp.exp(scores - largest).sum(0))

    start = jnp.full_like(image[:, 0], NEVER), jnp.zeros_like(image[:, 0])
    pieces = texts.reshape(-1, chunk, texts.shape[-1]), masks.reshape(-1, chunk)
    (top, total), (own_top, sums) = lax.scan(step, start, pieces)
    rows = jnp.log(total) + top
    column_top = lax.stop_gradient(lax.pmax(lax.stop_gradient(own_top), axis_name))
    columns = lax.psum(sums * jnp.exp(own_top - column_top), axis_name)
    columns = _own((jnp.log(columns) + column_top).reshape(-1), mask, axis_name)
    return _mean(rows + columns - 2 * scale * (image * text).sum(-1), mask, axis_name)


def dense_sigmoid(image, text, mask, scale, bias, *, axis_name):
    """Gathers texts; all logits [n M] of a device's images at once, plain gradient."""
    texts, masks = lax.all_gather((text, mask), axis_name, tiled=True)
    place = lax.axis_index(axis_name) * len(mask) + jnp.arange(len(mask))
    signs = jnp.where(place[:, None] == jnp.arange(len(masks)), 1, -1)
    losses = jax.nn.softplus(-signs * (scale * image @ texts.T + bias))
    return 2 * _mean(jnp.where(masks, losses, 0).sum(1), mask, axis_name)


def sigmoid_blocks(image, text, mask, scale, bias, *, axis_name):
    """Texts around the ring, a block [n n] a hop, plain gradient with `checkpoint`."""
    size, eye = lax.axis_size(axis_name), jnp.eye(len(mask))

    @jax.checkpoint
    def block(v, valid, signs):
        logits = signs * (scale * image @ v.T + bias)
        both = mask[:, None] & valid
        return jnp.where(both, jax.nn.softplus(-logits), 0).sum(1)

    def hop(state, _):
        v, valid = lax.ppermute(
            state, axis_name, [(k, (k + 1) % size) for k in range(size)]
        )
        return (v, valid), block(v, valid, -1)

    _, losses = lax.scan(hop, (text, mask), length=size - 1)
    total = block(text, mask, 2 * eye - 1) + losses.sum(0)
    return 2 * _mean(total, mask, axis_name)


def _own(columns, mask, axis_name):
    """Of numbers about all texts those about this device's."""
    start = lax.axis_index(axis_name) * len(mask)
    return lax.dynamic_slice_in_dim(columns, start, len(mask))


def _mean(losses, mask, axis_name):
    """Half the mean over all valid pairs."""
    total = lax.psum(jnp.where(mask, losses, 0).sum(), axis_name)
    return total / (2 * jnp.maximum(lax.psum(mask.sum(), axis_name), 1))
