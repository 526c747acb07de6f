"""Attention that visits only pairs of blocks that share an image, in both directions.

Shapes: B rows, L tokens a row, H heads, K head width; Z tokens of all rows (B x L),
S tokens of a block.

Speed is its purpose. The rows are read as one sequence of Z tokens. Blocks of queries
end where an image ends, if one does within S tokens; the keys of a block are the
contiguous range of its images, from the first token of the first one. On images of
side 64 to 256 in rows of 4096 `count_scores` gives 1.41 times the least work, which is
the sum of n x n over images of n tokens (`python benchmarks/attention.py`). Softmax
runs over the key blocks with a running maximum and sum (FlashAttention, algorithm 1);
the gradient recomputes the scores and keeps only the log of each query's sum.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple, TypeVar, cast

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

# Finite: the difference of two infinities would be NaN.
MASKED = -1e30
# No token of a block of queries, or one of padding; no key has this image.
NOTHING = -1

Carry = TypeVar("Carry")


class Window(NamedTuple):
    """S consecutive tokens of the sequence, and whose they are.

    Attributes:
      begin: Position of the first.
      images: Number of the image of each; not positive where the token does not count.
    """

    begin: Int[Array, ""]
    images: Int[Array, " S"]


class Plan(NamedTuple):
    """What the loops look up at a token.

    Attributes:
      images: Number of its image, from 1, over all rows; 0 is padding.
      first: First token of its image.
      stop: End of the block of queries that begins at it.
      last: End of the last image of that block.
      resume: [Z + 1] The token itself, or if it is padding, the next that is not.
    """

    images: Int[Array, " Z"]
    first: Int[Array, " Z"]
    stop: Int[Array, " Z"]
    last: Int[Array, " Z"]
    resume: Int[Array, " _"]


def _plan(segment_ids: Int[Array, "B L"], block: int) -> Plan:
    ids = segment_ids.reshape(-1)
    Z, L = ids.size, segment_ids.shape[1]
    at = jnp.arange(Z)
    begins = (ids != jnp.roll(ids, 1)) | ((at % L == 0) & (ids > 0)) | (at == 0)
    images = jnp.where(ids > 0, jnp.cumsum(begins), 0)
    first = lax.cummax(jnp.where(begins, at, 0))
    ends = jnp.roll(begins, -1)
    end = lax.cummin(jnp.where(ends, at + 1, Z), reverse=True)
    # A block ends with its row, so that a NaN in one row stays there.
    full = jnp.minimum(at + block, (at // L + 1) * L)
    cut = jnp.append(first, Z)[full]
    # Either the image goes on after a full block, or the block ends with an image.
    stop = jnp.where(cut <= at, full, cut)
    resume = jnp.append(jnp.where(ids > 0, at, end), Z)
    return Plan(images, first, stop, end[stop - 1], resume)


def _visit(
    segment_ids: Int[Array, "B L"],
    block: int,
    step: Callable[[Window, Callable[[Array], Window], Array, Carry], Carry],
    carry: Carry,
) -> Carry:
    """Calls `step(queries, keys, num_keys, carry)` for each block of queries.

    `keys(j)` is the j-th of the `num_keys` windows of keys that share an image with it.
    """
    plan = _plan(segment_ids, block)
    Z = plan.images.size

    def window(wanted: Array, stop: Array, other: int) -> Window:
        # lax.dynamic_slice would move a slice that reaches over the end, silently.
        begin = jnp.minimum(wanted, Z - block)
        at = begin + jnp.arange(block)
        images = lax.dynamic_slice_in_dim(plan.images, begin, block)
        ours = (at >= wanted) & (at < stop) & (images > 0)
        return Window(begin, jnp.where(ours, images, other))

    def body(state: tuple[Array, Carry]) -> tuple[Array, Carry]:
        at, carry = state
        first, stop, last = plan.first[at], plan.stop[at], plan.last[at]
        queries = window(at, stop, NOTHING)
        num_keys = (last - first + block - 1) // block
        carry = step(
            queries, lambda j: window(first + j * block, last, 0), num_keys, carry
        )
        return plan.resume[stop], carry

    return lax.while_loop(lambda s: s[0] < Z, body, (plan.resume[0], carry))[1]


def count_scores(segment_ids: Int[Array, "B L"], block: int = 64) -> Int[Array, ""]:
    """Counts the (query, key) pairs `blocks` computes for one head, as its loops run.

    The least possible is the sum of n x n over images of n tokens.
    """
    block = min(block, segment_ids.shape[1])
    zero = jnp.zeros((), jnp.int32)
    step = lambda _queries, _keys, num_keys, total: total + num_keys * block**2  # noqa: E731
    return _visit(segment_ids, block, step, zero)


def _read(x: Float[Array, "Z H K"], window: Window) -> Float[Array, "H S K"]:
    """The tokens of a window, heads first; zeros where a token does not count.

    Zeros, because padding may hold NaN, and NaN times a weight of zero is NaN.
    """
    x = lax.dynamic_slice_in_dim(x, window.begin, window.images.size)
    return jnp.where((window.images > 0)[:, None, None], x, 0).swapaxes(0, 1)


def _add(
    x: Float[Array, "Z H *k"], more: Float[Array, "H S *k"], window: Window
) -> Float[Array, "Z H *k"]:
    """Adds to the tokens of a window."""
    more = more.swapaxes(0, 1).astype(x.dtype)
    ours = (window.images > 0).reshape(-1, *(1,) * (x.ndim - 1))
    more = jnp.where(ours, more, 0)
    more += lax.dynamic_slice_in_dim(x, window.begin, window.images.size)
    return lax.dynamic_update_slice_in_dim(x, more, window.begin, 0)


_dot = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)

Residuals = tuple[Array, Array, Array, Array, Array, Array]


def blocks(
    q: Float[Array, "B L H K"],
    k: Float[Array, "B L H K"],
    v: Float[Array, "B L H K"],
    segment_ids: Int[Array, "B L"],
    block: int = 64,
) -> Float[Array, "B L H K"]:
    """Attention within each image, by loops over the blocks that hold its tokens.

    The tokens of an image must be contiguous in their row; padding may be anywhere.
    Time grows with the sum of n x n, memory with L. L need not divide by the block. The
    gradient is in reverse mode only, and once.

    Args:
      segment_ids: 1.. for images, 0 for padding, which gives and gets exactly 0.
      block: Tokens of a block, of queries and of keys.
    """
    block = min(block, segment_ids.shape[1])
    return cast(Array, _blocks(q, k, v, segment_ids, block))


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _blocks(q: Array, k: Array, v: Array, segment_ids: Array, block: int) -> Array:
    return _forward(q, k, v, segment_ids, block)[0]


def _forward(
    q: Float[Array, "B L H K"],
    k: Float[Array, "B L H K"],
    v: Float[Array, "B L H K"],
    segment_ids: Int[Array, "B L"],
    block: int,
) -> tuple[Float[Array, "B L H K"], Residuals]:
    (H, K), S = q.shape[2:], block
    flat_q, flat_k, flat_v = (x.reshape(-1, H, K) for x in (q, k, v))

    def step(queries, keys, num_keys, carry):
        query = _read(flat_q, queries)

        def over_keys(j, state):
            maximum, total, weighted = state
            window = keys(j)
            same = queries.images[:, None] == window.images
            scores = _dot("HSK,HsK->HSs", query, _read(flat_k, window)) * K**-0.5
            scores = jnp.where(same, scores, MASKED)
            higher = jnp.maximum(maximum, scores.max(-1))
            weights = jnp.where(same, jnp.exp(scores - higher[..., None]), 0)
            shrink = jnp.exp(maximum - higher)
            total = total * shrink + weights.sum(-1)
            weighted = weighted * shrink[..., None]
            weighted += _dot(
                "HSs,HsK->HSK", weights.astype(v.dtype), _read(flat_v, window)
            )
            return higher, total, weighted

        start = jnp.full((H, S), MASKED), jnp.zeros((H, S)), jnp.zeros((H, S, K))
        maximum, total, weighted = lax.fori_loop(0, num_keys, over_keys, start)
        # Rows that are another block's, or padding, have seen no key: they add 0.
        seen = total > 0
        total = jnp.where(seen, total, 1)
        out, logsum = carry
        mean = weighted / total[..., None]
        own = jnp.where(seen, maximum + jnp.log(total), 0)
        return _add(out, mean, queries), _add(logsum, own, queries)

    carry = jnp.zeros_like(flat_q), jnp.zeros(flat_q.shape[:2])
    out, logsum = _visit(segment_ids, S, step, carry)
    out = checkpoint_name(out.reshape(q.shape), "attended")
    logsum = checkpoint_name(logsum, "attended")
    return out, (q, k, v, segment_ids, out, logsum)


def _backward(
    block: int, residuals: Residuals, gradient: Float[Array, "B L H K"]
) -> tuple[Array, Array, Array, None]:
    q, k, v, segment_ids, out, logsum = residuals
    (H, K), S = q.shape[2:], block
    flat_q, flat_k, flat_v, flat_out, flat_gradient = (
        x.reshape(-1, H, K) for x in (q, k, v, out, gradient)
    )

    def step(queries, keys, num_keys, carry):
        to_q, to_k, to_v = carry
        query, grad = _read(flat_q, queries), _read(flat_gradient, queries)
        normal = lax.dynamic_slice_in_dim(logsum, queries.begin, S).T[:, None]
        # The sum over keys of weight x gradient of the weight.
        common = _dot("HSK,HSK->HS", grad, _read(flat_out, queries))[:, None]

        # Keys come first in the scores, so that only one of the five products (that of
        # to_query) sums over both first dimensions, the CPU's slow case by 1.4 times.
        def over_keys(j, state):
            to_query, to_k, to_v = state
            window = keys(j)
            key, value = _read(flat_k, window), _read(flat_v, window)
            same = window.images[:, None] == queries.images
            scores = _dot("HsK,HSK->HsS", key, query) * K**-0.5
            # Recomputed, a huge score may be rounded to above the maximum.
            weights = jnp.exp(jnp.minimum(scores - normal, 0))
            weights = jnp.where(same, weights, 0)
            to_v = _add(
                to_v, _dot("HsS,HSK->HsK", weights.astype(q.dtype), grad), window
            )
            to_weights = _dot("HsK,HSK->HsS", value, grad)
            to_scores = (weights * (to_weights - common) * K**-0.5).astype(q.dtype)
            to_k = _add(to_k, _dot("HsS,HSK->HsK", to_scores, query), window)
            to_query += _dot("HsS,HsK->HSK", to_scores, key)
            return to_query, to_k, to_v

        start = jnp.zeros((H, S, K)), to_k, to_v
        to_query, to_k, to_v = lax.fori_loop(0, num_keys, over_keys, start)
        return _add(to_q, to_query, queries), to_k, to_v

    # A key's gradient is summed over blocks of queries, so not in bfloat16.
    sums = jnp.zeros(flat_k.shape, jnp.float32)
    carry = jnp.zeros_like(flat_q), sums, sums
    to_q, to_k, to_v = (
        x.reshape(q.shape).astype(q.dtype) for x in _visit(segment_ids, S, step, carry)
    )
    return to_q, to_k, to_v, None


_blocks.defvjp(_forward, _backward)
