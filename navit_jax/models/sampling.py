"""Reads feature maps at points between their cells, by bilinear weights.

What was measured, of each implementation with its backward pass: docs/sparseformer.md,
by `python benchmarks/sampling.py`.

Shapes: B rows, Q latent tokens a row, K points a token, C channels, M tiles a row,
N image slots a row; t is cells a side of a tile.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from navit_jax.models.choices import pick
from navit_jax.models.device_rows import find_platform
from navit_jax.models.feature_maps import Maps, find_origins, take
from navit_jax.models.rois import clamp_gradient

# By platform; others as "gpu".
AUTO = {"cpu": "gather", "gpu": "gather", "tpu": "neighbours"}
# Latent tokens whose weights over all cells `matmul` holds at once.
CHUNK = 8
# (down, right), in the order in which `prepare` lays them.
CORNERS = (0, 0), (0, 1), (1, 0), (1, 1)


class Taps(NamedTuple):
    """Of each point and axis, (y, x): the cell before it, and how far from that it is.

    Attributes:
      below: [B Q K 2]
      rest: [B Q K 2] in [0, 1)
      sizes: [B Q 1 2] cells of the map.
    """

    below: Array
    rest: Array
    sizes: Array


def lookup(
    maps: Maps,
    slots: Int[Array, "B Q"],
    points: Float[Array, "B Q K 2"],
    padding: str,
    implementation: str = "auto",
    gradient_clamp: float | int = 0.0,
) -> Float[Array, "B Q K C"]:
    """The value of each token's map at its points, in float32.

    Cell i of n is the interval [i / n, (i + 1) / n], its value that at the centre
    (`grid_sample` with align_corners=False). A point that is not a number reads as one
    before the first cell. There is no gradient to the coordinate of a point beyond the
    border's cells.

    Args:
      maps: Of `prepare` with the same implementation.
      slots: Of the image that each token looks at.
      points: (x, y), in fractions of the image.
      padding: "zeros" or "border": what is outside of the map.
      implementation: "gather" (of the four cells one by one), "neighbours" (of 2 x 2
        at once), "matmul" (a product with the weights of all cells, by chunks), or
        "auto".
      gradient_clamp: As in `sparseformer.SparseFormer`; 0 for none.

    Raises:
      ConfigError: an unknown padding or implementation.
    """
    read = pick("model.lookup", choose(implementation), LOOKUPS)
    ends = pick("model.shape.padding", padding, PADDINGS)
    sizes = take(maps.sizes, slots)[:, :, None]
    if gradient_clamp:
        limits = gradient_clamp / jnp.maximum(sizes[..., ::-1], 1)
        points = clamp_gradient(points, limits)
    places = points[..., ::-1].astype(jnp.float32) * sizes - 0.5
    low, high = ends(sizes)
    # Comparisons of what is not a number are false.
    places = jnp.where(places > low, places, low)
    places = jnp.where(places < high, places, high)
    below = jax.lax.stop_gradient(jnp.floor(places))
    taps = Taps(below.astype(jnp.int32), places - below, sizes)
    return read(maps, slots, taps)


def prepare(maps: Maps, implementation: str = "auto") -> Maps:
    """What `lookup` needs of the maps once, for all its calls."""
    if choose(implementation) != "neighbours":
        return maps
    # Beside each cell those to the right of it and below: [B M t t 4 C].
    here = jnp.arange(maps.cells.shape[1])
    slots = jnp.maximum(maps.slots, 0)
    right = _shift(maps.cells, here + jnp.ones_like(slots), 3)
    both = jnp.concatenate([maps.cells, right], -1)
    under = _shift(both, here + take(maps.columns, slots), 2)
    return maps._replace(cells=jnp.concatenate([both, under], -1))


def _shift(
    cells: Float[Array, "B M t t C"], tiles: Int[Array, "B M"], axis: int
) -> Float[Array, "B M t t C"]:
    """The next cell along an axis; the last one's is the first of the next tile.

    Args:
      tiles: The next of each; beyond the map's border anything.
    """
    t, M = cells.shape[axis], cells.shape[1]
    first = jax.lax.slice_in_dim(cells, 0, 1, axis=axis)
    rest = jax.lax.slice_in_dim(cells, 1, t, axis=axis)
    return jnp.concatenate([rest, take(first, jnp.minimum(tiles, M - 1))], axis)


def choose(implementation: str) -> str:
    """The implementation that "auto" stands for on the devices of the mesh.

    Not `jax.lax.platform_dependent`: what `prepare` gives differs in shape.
    """
    if implementation != "auto":
        return implementation
    return AUTO.get(find_platform(), AUTO["gpu"])


def _gather(
    maps: Maps, slots: Int[Array, "B Q"], taps: Taps
) -> Float[Array, "B Q K C"]:
    cells, weights = _weigh_corners(taps.below, taps)
    slots = jnp.broadcast_to(slots[..., None, None], cells.shape[:-1])
    # One gather, whose gradient is one scatter into one map of zeros, not four.
    index = _index(maps, slots, cells[..., 0], cells[..., 1])
    return _combine(_flatten(maps), index, weights)


def _neighbours(
    maps: Maps, slots: Int[Array, "B Q"], taps: Taps
) -> Float[Array, "B Q K C"]:
    # The corner of four cells that are in the map, but where it has one row or column.
    corner = jnp.clip(taps.below, 0, jnp.maximum(taps.sizes - 2, 0))
    slots = jnp.broadcast_to(slots[..., None], corner.shape[:-1])
    index = _index(maps, slots, corner[..., 0], corner[..., 1])
    return _combine(_flatten(maps), index, _weigh_corners(corner, taps)[1])


@jax.custom_vjp
def _combine(
    cells: Float[Array, "B F _"],
    index: Int[Array, "B Q K *corners"],
    weights: Float[Array, "B Q K 4"],
) -> Float[Array, "B Q K C"]:
    """The weighted sum of four cells, which are read one by one or all at once.

    The gradient of cells is summed in float32, whatever their dtype.
    """
    return _combine_forward(cells, index, weights)[0]


def _combine_forward(cells: Array, index: Array, weights: Array) -> tuple[Array, Any]:
    values = take(cells, index).reshape(*weights.shape, -1)
    parts = [weights[..., i, None] * values[..., i, :] for i in range(len(CORNERS))]
    return sum(parts[1:], parts[0]), (cells, index, weights, values)


def _combine_backward(kept: Any, gradient: Array) -> tuple[Array, None, Array]:
    cells, index, weights, values = kept
    of_weights = jnp.einsum("BQKiC,BQKC->BQKi", values, gradient, precision="highest")
    of_values = weights[..., None] * gradient[..., None, :]
    wide = jax.ShapeDtypeStruct(cells.shape, of_values.dtype)
    (of_cells,) = jax.linear_transpose(lambda x: take(x, index), wide)(
        of_values.reshape(*index.shape, -1)
    )
    return of_cells.astype(cells.dtype), None, of_weights


_combine.defvjp(_combine_forward, _combine_backward)


def _weigh_corners(
    corner: Int[Array, "B Q K 2"], taps: Taps
) -> tuple[Int[Array, "B Q K 4 2"], Float[Array, "B Q K 4"]]:
    """The four cells from a corner on, and the weight of each; 0 outside of the map."""
    cells = corner[..., None, :] + jnp.array(CORNERS)
    wide = Taps(*(each[..., None, :] for each in taps))
    weights = jnp.where(_inside(cells, wide.sizes), _weigh(cells, wide), 0)
    return cells, weights.prod(-1)


def _matmul(
    maps: Maps, slots: Int[Array, "B Q"], taps: Taps
) -> Float[Array, "B Q K C"]:
    t, flat = maps.cells.shape[2], _flatten(maps)
    # Of each tile: places of its rows, and of its columns.
    places = find_origins(maps)[..., None, :] + jnp.arange(t)[:, None]

    @jax.checkpoint
    def read(token: tuple[Array, Taps]) -> Array:
        slot, taps = token
        # [B K M t 2]: weights of rows and columns of cells.
        wide = Taps(*(each[:, :, None, None] for each in taps))
        inside = _inside(places[:, None], wide.sizes)
        inside &= (maps.slots == slot[:, None])[:, None, :, None, None]
        weights = jnp.where(inside, _weigh(places[:, None], wide), 0)
        weights = weights[..., :, None, 0] * weights[..., None, :, 1]
        weights = weights.reshape(*weights.shape[:2], -1)
        # In float32 where the cells are: weights of lower precision are other places.
        return jnp.einsum(
            "BKF,BFC->BKC",
            weights,
            flat.astype(jnp.float32),
            precision="highest",
        )

    tokens = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), (slots, taps))
    return jnp.moveaxis(jax.lax.map(read, tokens, batch_size=CHUNK), 0, 1)


LOOKUPS: dict[str, Callable[..., Array]] = {
    "gather": _gather,
    "neighbours": _neighbours,
    "matmul": _matmul,
}
# The places between which something but 0 or the border's cell is read.
PADDINGS: dict[str, Callable[[Array], tuple[Array | float, Array]]] = {
    "zeros": lambda sizes: (-1.0, sizes.astype(jnp.float32)),
    "border": lambda sizes: (0.0, jnp.maximum(sizes - 1, 0).astype(jnp.float32)),
}


def _flatten(maps: Maps) -> Array:
    B, M, t, _, C = maps.cells.shape
    return maps.cells.reshape(B, M * t * t, C)


def _index(maps: Maps, slots: Array, rows: Array, columns: Array) -> Array:
    """Where cells of maps are among all cells; of places outside, of one inside."""
    t, M = maps.cells.shape[2], maps.cells.shape[1]
    sizes = take(maps.sizes, slots)
    rows = jnp.clip(rows, 0, jnp.maximum(sizes[..., 0] - 1, 0))
    columns = jnp.clip(columns, 0, jnp.maximum(sizes[..., 1] - 1, 0))
    tile = take(maps.starts, slots) + columns // t
    tile += rows // t * take(maps.columns, slots)
    return (jnp.minimum(tile, M - 1) * t + rows % t) * t + columns % t


def _inside(cells: Array, sizes: Array) -> Array:
    return (cells >= 0) & (cells < sizes)


def _weigh(cells: Array, taps: Taps) -> Array:
    """How much each place counts, by axis, for a point."""
    first = jnp.where(cells == taps.below, 1 - taps.rest, 0)
    return jnp.where(cells == taps.below + 1, taps.rest, first)
