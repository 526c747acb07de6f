"""The early convolution, on each image of a packed row as if it were alone.

An image's map has a cell for each 4 x 4 pixels, ceil(ceil(h / 2) / 2) of them a side.
Maps are kept in tiles of t x t cells, and each tile is computed from its own window of
4 t + 7 pixels, so that what a map costs follows the patches that are there.

Shapes: B rows, L tokens a row, N image slots a row, P values a patch, M tiles a row,
C channels; t is cells a side of a tile, w pixels a side of its window.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt8

from navit_jax.models.navit import normalise
from navit_jax.models.pooling import image_masks

# Pixels that a tile's first cell reads before its own: of the pool 2, of the conv 3.
BEFORE = 5
# What the window has more than 4 t pixels.
HALO = 7
EPS = 1e-5
# Places of a convolution that a CPU unfolds at once.
PLACES = 16384
Pixels = UInt8[Array, "B M w w 3"] | Float[Array, "B M w w 3"]


class Maps(NamedTuple):
    """The maps of a row's images: an image's tiles stand together, row by row.

    Attributes:
      cells: [B M t t C]; what lies outside of its image is never read.
      slots: [B M] the image slot of each tile; -1 of none.
      starts: [B N] the first tile of each image.
      columns: [B N] tiles in a row of tiles.
      sizes: [B N 2] rows and columns of cells; 0 of a slot without a map.
    """

    cells: Array
    slots: Array
    starts: Array
    columns: Array
    sizes: Array


def take(values: Array, index: Array) -> Array:
    """values[b, index[b]] for each row b, so that rows stay on their devices."""
    return jax.vmap(lambda v, i: v[i])(values, index)


def cut_tiles(
    patches: UInt8[Array, "B L P"] | Float[Array, "B L P"],
    coords: Int[Array, "B L 2"],
    segment_ids: Int[Array, "B L"],
    grids: Int[Array, "B N 2"],
    patch: int,
    max_side: int,
) -> tuple[Pixels, Maps]:
    """A window for each token: tiles as many as patches, of ceil(patch / 4) cells.

    An image of which patches are missing, or not in the order of their coordinates, has
    no map.

    Returns:
      The windows, anything outside of their image, and the maps without `cells`.
    """
    (B, L), N = segment_ids.shape, grids.shape[1]
    t = -(-patch // 4)
    masks = image_masks(segment_ids, N)
    starts = jnp.argmax(masks, -1)
    slots = jnp.maximum(segment_ids - 1, 0)
    sides = jnp.maximum(take(grids, slots), 1)
    first, columns = take(starts, slots), sides[..., 1]
    place = jnp.arange(L) - first
    tile = jnp.stack([place // columns, place % columns], -1)
    misplaced = masks & (coords != tile).any(-1)[:, None]
    whole = ~misplaced.any(-1) & (masks.sum(-1) == grids.prod(-1))

    window = 4 * t * tile[..., None] - BEFORE + jnp.arange(4 * t + HALO)
    window = jnp.clip(window, 0, patch * sides[..., None] - 1)
    y, x = window[..., 0, :, None], window[..., 1, None, :]
    token = first[..., None, None] + y // patch * columns[..., None, None] + x // patch
    index = jnp.minimum(token, L - 1) * patch**2 + y % patch * patch + x % patch
    pixels = take(patches.reshape(B, L * patch**2, 3), index)
    maps = Maps(
        cells=jnp.zeros((B, L, t, t, 0)),
        slots=segment_ids - 1,
        starts=starts,
        columns=grids[..., 1],
        sizes=jnp.where(whole[..., None], count_cells(patch * grids), 0),
    )
    return pixels, maps


def lay_canvases(
    patches: UInt8[Array, "B L P"] | Float[Array, "B L P"],
    coords: Int[Array, "B L 2"],
    segment_ids: Int[Array, "B L"],
    grids: Int[Array, "B N 2"],
    patch: int,
    max_side: int,
) -> tuple[Pixels, Maps]:
    """A canvas for each slot, of `max_side` patches a side: a map is one tile.

    A patch that is missing is 0, black; one outside of the canvas is lost.
    """
    B, N, S = len(segment_ids), grids.shape[1], max_side
    side = S * patch
    t = -(-side // 4)
    inside = (segment_ids > 0) & (coords < S).all(-1)
    cell = ((segment_ids - 1) * S + coords[..., 0]) * S + coords[..., 1]
    cell = jnp.where(inside, cell, N * S * S)
    empty = jnp.zeros((N * S * S, patches.shape[-1]), patches.dtype)
    laid = jax.vmap(lambda cell, own: empty.at[cell].set(own, mode="drop"))(
        cell, patches
    )
    laid = laid.reshape(B, N, S, S, patch, patch, 3).swapaxes(3, 4)
    laid = laid.reshape(B, N, side, side, 3)
    around = (BEFORE, 4 * t + HALO - BEFORE - side)
    pixels = jnp.pad(laid, ((0, 0), (0, 0), around, around, (0, 0)))
    present = image_masks(segment_ids, N).any(-1)
    slots = jnp.broadcast_to(jnp.arange(N), (B, N))
    maps = Maps(
        cells=jnp.zeros((B, N, t, t, 0)),
        slots=jnp.where(present, slots, -1),
        starts=slots,
        columns=jnp.ones((B, N), slots.dtype),
        sizes=jnp.where(present[..., None], count_cells(patch * grids), 0),
    )
    return pixels, maps


CUTS: dict[str, Callable[..., tuple[Any, Maps]]] = {
    "tiles": cut_tiles,
    "canvas": lay_canvases,
}


def count_cells(pixels: Any) -> Any:
    """Cells of a side of so many pixels."""
    return ((pixels + 1) // 2 + 1) // 2


def find_origins(maps: Maps) -> Int[Array, "B M 2"]:
    """The first cell, (row, column), of each tile in the map of its image."""
    t, M = maps.cells.shape[2], maps.slots.shape[1]
    slots = jnp.maximum(maps.slots, 0)
    place = jnp.arange(M) - take(maps.starts, slots)
    columns = jnp.maximum(take(maps.columns, slots), 1)
    return t * jnp.stack([place // columns, place % columns], -1)


class Stem(nn.Module):
    """Convolution 7 x 7 / 2, ReLU, maximum 3 x 3 / 2, and channels normalised.

    As in SparseFormer's code: no factors after the norm, and its order is last. Equal
    to that of the image alone between zeros, since what is outside of it is 0 before
    each of the two.

    Attributes:
      channels: C.
      mean, std: As in `navit.normalise`.
    """

    channels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    dtype: Any

    @nn.compact
    def __call__(
        self, pixels: Pixels, maps: Maps, sides: Int[Array, "B N 2"]
    ) -> Float[Array, "B M t t C"]:
        """The cells of each window.

        Args:
          pixels: A window for each tile.
          sides: Pixels of each slot's image.
        """
        B, M, w = pixels.shape[:3]
        own = jnp.where(
            (maps.slots < 0)[..., None], 0, take(sides, jnp.maximum(maps.slots, 0))
        )
        origins = find_origins(maps)
        line = normalise(pixels.reshape(B, M, w * w * 3), self.mean, self.std)
        pixels = line.reshape(pixels.shape)
        inside = _within(4 * origins - BEFORE, w, own)
        pixels = jnp.where(inside, pixels, 0)
        conv = nn.Conv(
            self.channels,
            (7, 7),
            (2, 2),
            padding="VALID",
            kernel_init=nn.initializers.variance_scaling(2, "fan_out", "normal"),
            bias_init=_uniform(147**-0.5),
            dtype=self.dtype,
            conv_general_dilated=convolve,
            name="conv",
        )
        x = nn.relu(conv(pixels.reshape(B * M, w, w, 3)))
        side = x.shape[1]
        inside = _within(2 * origins - 1, side, (own + 1) // 2)
        # After the ReLU, zeros are to a maximum what is not there.
        x = jnp.where(inside.reshape(B * M, side, side, 1), x, 0)
        x = _max_pool(_max_pool(x, 1), 2).astype(jnp.float32)
        x -= x.mean(-1, keepdims=True)
        x *= jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + EPS)
        return x.reshape(B, M, *x.shape[1:]).astype(self.dtype)


def convolve(
    lhs: Float[Array, "W w w 3"],
    rhs: Float[Array, "7 7 3 C"],
    window_strides: Any,
    padding: Any,
    **others: Any,
) -> Float[Array, "W s s C"]:
    """As `jax.lax.conv_general_dilated`, for strides of 2 and no padding.

    On a CPU it is a product with unfolded pixels, a few windows at a time: XLA's own
    takes more time a window there the more windows there are.
    """
    whole = functools.partial(
        jax.lax.conv_general_dilated,
        window_strides=window_strides,
        padding=padding,
        **others,
    )
    return jax.lax.platform_dependent(lhs, rhs, cpu=_unfold, default=whole)


def _unfold(
    pixels: Float[Array, "W w w 3"], kernel: Float[Array, "7 7 3 C"]
) -> Float[Array, "W s s C"]:
    side = (pixels.shape[1] - 7) // 2 + 1
    reach = 2 * side - 1

    @jax.checkpoint
    def read(window: Float[Array, "w w 3"]) -> Float[Array, "s s C"]:
        seen = [
            window[y : y + reach : 2, x : x + reach : 2]
            for y in range(7)
            for x in range(7)
        ]
        line = kernel.reshape(-1, kernel.shape[-1])
        return jnp.concatenate(seen, -1) @ line

    return jax.lax.map(read, pixels, batch_size=max(1, PLACES // side**2))


def _max_pool(x: Array, axis: int) -> Array:
    """The largest of 3 places, every second one; XLA derives its own pooling slowly."""
    parts = [
        jax.lax.slice_in_dim(x, first, x.shape[axis] - 2 + first, 2, axis)
        for first in range(3)
    ]
    return functools.reduce(jnp.maximum, parts)


def _within(first: Array, num: int, sides: Array) -> Array:
    """[B M num num 1]: which of `num` places a side from `first` are in the image."""
    places = first[..., None] + jnp.arange(num)
    inside = (places >= 0) & (places < sides[..., None])
    return (inside[..., 0, :, None] & inside[..., 1, None, :])[..., None]


def _uniform(reach: float) -> Callable[..., Array]:
    def init(key: Any, shape: Any, dtype: Any = jnp.float32) -> Array:
        return jax.random.uniform(key, shape, dtype, -reach, reach)

    return init
