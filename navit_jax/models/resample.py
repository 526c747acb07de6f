"""Resamples a learned grid of positions to the grid of each image, token by token.

Grid sizes are data: no size is compiled in, and only kept tokens cost anything. A
token's vector is one product of its filter weights with the table, [S] x [S D] for a
table of S = h w entries: no gather, so its gradient is summed in a fixed order.

Shapes: B rows, L tokens a row, h w sides of the table, D width.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from navit_jax.models.choices import pick


def resample(
    table: Float[Array, "h w D"],
    coords: Int[Array, "B L 2"],
    grids: Int[Array, "B L 2"],
    filter: str = "bilinear",
) -> Float[Array, "B L D"]:
    """Entry `coords` of the table resized to `grids`, for each token.

    Equal to resizing the whole table to the token's grid and reading it there, sample
    centres at (i + 0.5) / n but for "corners". A grid of the table's own size gives
    the table.

    Args:
      filter: "bilinear"; "antialias", bilinear with the triangle widened when the grid
        is smaller than the table (SigLIP 2); "bicubic", a = -0.75 with the border
        repeated (DINOv2); "bicubic_antialias", a = -0.5, widened alike (timm);
        "corners", bilinear with outermost samples on outermost entries (vit_jax).

    Raises:
      ConfigError: an unknown filter.
    """
    weigh = pick("model.positions.filter", filter, FILTERS)
    sides = jnp.maximum(grids, 1)
    index = jnp.clip(coords, 0, sides - 1)
    rows = weigh(index[..., 0], sides[..., 0], table.shape[0])
    columns = weigh(index[..., 1], sides[..., 1], table.shape[1])
    return _read(table, rows, columns)


def resample_at(
    table: Float[Array, "h w D"], places: Float[Array, "B L 2"]
) -> Float[Array, "B L D"]:
    """The table at any places (y, x), in fractions of its sides, by "bicubic".

    At the centres of a grid's cells it is `resample` with that grid. There is no
    gradient to a place.
    """
    both = []
    for axis in (0, 1):
        size = table.shape[axis]
        place = jax.lax.stop_gradient(jnp.clip(places[..., axis], 0, 1)) * size - 0.5
        below = jnp.floor(place)
        both.append(_interpolate(below.astype(jnp.int32), place - below, size))
    return _read(table, *both)


def _read(
    table: Float[Array, "h w D"],
    rows: Float[Array, "B L h"],
    columns: Float[Array, "B L w"],
) -> Float[Array, "B L D"]:
    weights = rows[..., :, None] * columns[..., None, :]
    return jnp.einsum("BLhw,hwD->BLD", weights, table, precision="highest")


def _source(
    index: Int[Array, "B L"], side: Int[Array, "B L"], size: int
) -> tuple[Int[Array, "B L"], Float[Array, "B L"]]:
    """The entry below the sample's centre, and the centre's distance from it."""
    # Whole numbers up to one division: the same place for every backend.
    numerator = (2 * index + 1) * size - side
    below = numerator // (2 * side)
    return below, (numerator - below * 2 * side) / (2 * side)


def _taps(
    below: Int[Array, "B L"], offset: int, size: int
) -> Float[Array, "B L {size}"]:
    return jax.nn.one_hot(jnp.clip(below + offset, 0, size - 1), size)


def _bilinear(
    index: Int[Array, "B L"], side: Int[Array, "B L"], size: int
) -> Float[Array, "B L {size}"]:
    below, rest = _source(index, side, size)
    rest = rest[..., None]
    return (1 - rest) * _taps(below, 0, size) + rest * _taps(below, 1, size)


def _bicubic(
    index: Int[Array, "B L"], side: Int[Array, "B L"], size: int
) -> Float[Array, "B L {size}"]:
    return _interpolate(*_source(index, side, size), size)


def _interpolate(
    below: Int[Array, "B L"], rest: Float[Array, "B L"], size: int
) -> Float[Array, "B L {size}"]:
    offsets = (-1, 0, 1, 2)
    taps = jnp.stack([_taps(below, offset, size) for offset in offsets], -1)
    weights = [_keys_kernel(jnp.abs(rest - offset)) for offset in offsets]
    return (taps * jnp.stack(weights, -1)[..., None, :]).sum(-1)


def _keys_kernel(x: Float[Array, "*S"], a: float = -0.75) -> Float[Array, "*S"]:
    """Keys' cubic convolution kernel for 0 <= x < 2."""
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = ((a * x - 5 * a) * x + 8 * a) * x - 4 * a
    return jnp.where(x <= 1, near, far)


def _antialias(
    index: Int[Array, "B L"], side: Int[Array, "B L"], size: int
) -> Float[Array, "B L {size}"]:
    distance, reach = _distances(index, side, size)
    weights = jnp.maximum(reach - distance, 0).astype(jnp.float32)
    return weights / weights.sum(-1, keepdims=True)


def _bicubic_antialias(
    index: Int[Array, "B L"], side: Int[Array, "B L"], size: int
) -> Float[Array, "B L {size}"]:
    distance, reach = _distances(index, side, size)
    x = distance / reach
    weights = jnp.where(x < 2, _keys_kernel(x, -0.5), 0)
    return weights / weights.sum(-1, keepdims=True)


def _corners(
    index: Int[Array, "B L"], side: Int[Array, "B L"], size: int
) -> Float[Array, "B L {size}"]:
    # A side of one sample reads the first entry.
    steps = jnp.maximum(side - 1, 1)[..., None]
    distance = jnp.abs(jnp.arange(size) * steps - (index * (size - 1))[..., None])
    return jnp.maximum(steps - distance, 0) / steps


def _distances(
    index: Int[Array, "B L"], side: Int[Array, "B L"], size: int
) -> tuple[Int[Array, "B L {size}"], Int[Array, "B L 1"]]:
    """Of each entry from the sample's centre, and the wider of the two spacings.

    In table entries, times 2 n: whole numbers.
    """
    entries = 2 * jnp.arange(size) + 1
    centre = (2 * index + 1) * size
    distance = jnp.abs(entries * side[..., None] - centre[..., None])
    return distance, 2 * jnp.maximum(size, side)[..., None]


FILTERS = {
    "bilinear": _bilinear,
    "antialias": _antialias,
    "bicubic": _bicubic,
    "bicubic_antialias": _bicubic_antialias,
    "corners": _corners,
}


class Learned1D(nn.Module):
    """ViT's table of one entry a patch, resampled per image (Table 3, row 1).

    Attributes:
      width: D.
      side: Entries a side of the table.
      columns: Entries a row of a table that is not square; None: `side`.
      length: The widest grid the plan lets through; resampling itself has no limit.
      filter: As in `resample`.
    """

    width: int
    side: int = 16
    columns: int | None = None
    length: int = 64
    filter: str = "bilinear"

    @nn.compact
    def __call__(
        self, coords: Int[Array, "B L 2"], grids: Int[Array, "B L 2"]
    ) -> Float[Array, "B L D"]:
        """The position of each token, in float32."""
        shape = (self.side, self.columns or self.side, self.width)
        table = self.param("table", nn.initializers.normal(0.02), shape)
        return resample(table, coords, grids, self.filter)
