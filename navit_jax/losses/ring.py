"""Takes what belongs to one of two modalities once around the ring of devices.

Images stay on their device; texts visit all others in chunks, and what is found about a
text goes with it and ends at home. Valid pairs are put first, and only as many chunks
travel as the fullest device fills: bytes follow its pairs, work their square, both in
whole chunks, not the slots.

n slots of this device, D embedding width, K devices, C chunks of c pairs.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int


class Ring(NamedTuple):
    """The mesh axes around which texts go, pairs of a chunk, and the dtypes sent."""

    axes: tuple[str, ...]
    chunk: int
    dtype: str
    grad_dtype: str


class Peers(NamedTuple):
    """Valid pairs of each device of the ring, [K], and this device's place in it."""

    counts: Array
    place: Array


def make(
    axis_name: str | Sequence[str], chunk: int, dtype: str, grad_dtype: str, slots: int
) -> Ring:
    """The ring over the axes; a chunk is not longer than a device's slots.

    Raises:
      ValueError: chunk < 1.
    """
    if chunk < 1:
        raise ValueError(f"chunk={chunk}: take 1 or more pairs")
    axes = (axis_name,) if isinstance(axis_name, str) else tuple(axis_name)
    return Ring(axes, min(chunk, slots), dtype, grad_dtype)


def find_peers(ring: Ring, mask: Bool[Array, " n"]) -> Peers:
    """Tells every device how many valid pairs each has."""
    place = lax.axis_index(ring.axes)
    own = jnp.arange(lax.axis_size(ring.axes)) == place
    return Peers(lax.psum(own * mask.sum(), ring.axes), place)


def compact(
    ring: Ring, x: Float[Array, "n D"], mask: Bool[Array, " n"]
) -> Float[Array, "C c D"]:
    """Valid rows first, zeros behind them up to whole chunks."""
    order = jnp.argsort(~mask, stable=True)
    rows = jnp.where(mask[order, None], x[order], 0).astype(ring.dtype)
    rows = jnp.pad(rows, ((0, -len(mask) % ring.chunk), (0, 0)))
    return rows.reshape(-1, ring.chunk, x.shape[-1])


def spread(x: Float[Array, "C c D"], mask: Bool[Array, " n"]) -> Float[Array, "n D"]:
    """Rows back to their slots, zeros in the others."""
    rows = x.reshape(-1, x.shape[-1])[jnp.cumsum(mask) - 1]
    return jnp.where(mask[:, None], rows.astype(jnp.float32), 0)


def _send(axes: tuple[str, ...], x: Array) -> Array:
    """To the next device of the ring."""
    size = lax.axis_size(axes)
    half = x.dtype.itemsize == 2
    # As integers: XLA's CPU backend would widen a bfloat16 to send it.
    sent = lax.bitcast_convert_type(x, jnp.uint16) if half else x
    sent = lax.ppermute(sent, axes, [(k, (k + 1) % size) for k in range(size)])
    return lax.bitcast_convert_type(sent, x.dtype) if half else sent


def go_around(
    ring: Ring,
    peers: Peers,
    block: Callable[..., tuple[Any, Any]],
    merge: Callable[[Any, Any], Any],
    images: Any,
    home: Any,
    texts: Any,
    found: Any,
    nothing: Any,
) -> tuple[Any, Any]:
    """Shows each chunk of all devices' texts to each chunk of this one's images.

    A chunk is sent on while it is worked on, and what other devices found about it
    arrives meanwhile.

    Args:
      block: Takes a chunk of `images`, of `home` and of `texts`, then which of their
        [c c] combinations are valid negatives and, where own texts meet own images,
        which are one pair; gives the chunk of `home` anew, and a finding.
      merge: Makes one finding of two about the same texts.
      home: Leaves [C c ...]; what becomes known about images.
      texts: Leaves [C c ...]; sent around.
      found: Leaves [C c ...]; findings about own texts to begin with.
      nothing: Leaves [c ...]; the finding that `merge` ignores.

    Returns:
      `home`, and the findings of all devices about own texts.
    """
    size = lax.axis_size(ring.axes)
    own, chunks = peers.counts[peers.place], -(-peers.counts // ring.chunk)

    def send(tree: Any) -> Any:
        return jax.tree.map(lambda x: _send(ring.axes, x), tree)

    def visit(hop: Any, state: Any, first: bool = False, last: bool = False) -> Any:
        guest = (peers.place - hop) % size

        def meet(j: Int[Array, ""], state: Any) -> Any:
            home, texts, found = state
            text, before = _chunk((texts, found), j)
            coming = text if last else send(text)
            before = before if first else send(before)
            column = j * ring.chunk + jnp.arange(ring.chunk)

            def add(i: Int[Array, ""], state: Any) -> Any:
                home, finding = state
                row = i * ring.chunk + jnp.arange(ring.chunk)
                valid = (row < own)[:, None] & (column < peers.counts[guest])
                same = row[:, None] == column
                negative, pair = (valid & ~same, same) if first else (valid, None)
                mine, theirs = _chunk((images, home), i)
                theirs, new = block(mine, theirs, text, negative, pair)
                return _put(home, theirs, i), merge(finding, new)

            rows = jnp.where(j < chunks[guest], chunks[peers.place], 0)
            home, new = lax.fori_loop(0, rows, add, (home, nothing))
            return home, _put(texts, coming, j), _put(found, merge(before, new), j)

        return lax.fori_loop(0, chunks.max(), meet, state)

    state = visit(0, (home, texts, found), first=True, last=size == 1)
    if size > 2:
        state = lax.fori_loop(1, size - 1, visit, state)
    if size > 1:
        state = visit(size - 1, state, last=True)
    home, _, found = state
    if size > 1:
        found = lax.fori_loop(
            0, chunks.max(), lambda j, x: _put(x, send(_chunk(x, j)), j), found
        )
    return home, found


def _chunk(tree: Any, j: Int[Array, ""]) -> Any:
    return jax.tree.map(lambda x: lax.dynamic_index_in_dim(x, j, keepdims=False), tree)


def _put(tree: Any, piece: Any, j: Int[Array, ""]) -> Any:
    return jax.tree.map(
        lambda x, y: lax.dynamic_update_index_in_dim(x, y.astype(x.dtype), j, 0),
        tree,
        piece,
    )
