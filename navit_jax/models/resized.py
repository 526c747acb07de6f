"""Cuts packed images anew: each a square of another size, a row of its own.

For a model that was trained at one square size, such as the teacher of a student that
reads images of any shape. Stretched, as such models are used.

Shapes: B rows, L tokens a row, N image slots a row, P values a patch, S tokens of the
square, R = B N rows of one image.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt8


def resize(
    patches: UInt8[Array, "B L P"],
    coords: Int[Array, "B L 2"],
    segment_ids: Int[Array, "B L"],
    grids: Int[Array, "B N 2"],
    side: int,
    patch: int,
    max_side: int,
) -> tuple[
    UInt8[Array, "R S V"], Int[Array, "R S 2"], Int[Array, "R S"], Int[Array, "R 1 2"]
]:
    """Resizes every image to side x side pixels (antialiased bilinear).

    Args:
      side: Of the squares, in pixels; a multiple of `patch`.
      patch: Of the result; V = 3 patch^2. Patches given may have another.
      max_side: The longest side of a grid in the batch, in patches.

    Returns:
      Patches, coords, segment ids and grids of R = B N rows; that of an empty slot has
      no image. What was dropped of an image is black.
    """
    (B, L, P), N = patches.shape, grids.shape[1]
    own, edge = round((P // 3) ** 0.5), side // patch

    def one(slot, patches, coords, segment_ids, grid):
        mine = segment_ids == slot + 1
        # A place outside of the canvas is not written.
        rows = jnp.where(mine, coords[:, 0], max_side)
        canvas = jnp.zeros((max_side, max_side, own, own, 3), jnp.float32)
        pixels = patches.reshape(L, own, own, 3).astype(jnp.float32)
        canvas = canvas.at[rows, coords[:, 1]].set(pixels, mode="drop")
        canvas = canvas.swapaxes(1, 2).reshape(max_side * own, max_side * own, 3)
        down, across = (
            triangle_weights(size * own, max_side * own, side) for size in grid
        )
        square = jnp.einsum("Hh,hwc,Ww->HWc", down, canvas, across, precision="highest")
        square = jnp.clip(jnp.round(square), 0, 255).astype(jnp.uint8)
        cut = square.reshape(edge, patch, edge, patch, 3).swapaxes(1, 2)
        return cut.reshape(edge**2, patch * patch * 3), mine.any()

    def row(*arrays):
        # One after the other: the canvases of all slots at once would be large.
        slots = jnp.arange(N)
        patches, coords, segment_ids, own = arrays
        return jax.lax.map(
            lambda i: one(i, patches, coords, segment_ids, own[i]), slots
        )

    squares, there = jax.vmap(row)(patches, coords, segment_ids, grids)
    places = jnp.stack(jnp.divmod(jnp.arange(edge**2), edge), -1)
    return (
        squares.reshape(B * N, edge**2, -1),
        jnp.broadcast_to(places.astype(jnp.int32), (B * N, edge**2, 2)),
        jnp.broadcast_to(there.reshape(-1, 1), (B * N, edge**2)).astype(jnp.int32),
        jnp.full((B * N, 1, 2), edge, jnp.int32),
    )


def triangle_weights(
    size: Int[Array, ""], length: int, target: int
) -> Float[Array, "T h"]:
    """Weights [target length] that resize the first `size` of `length` places.

    A triangle as wide as the step between targets, two places at least, as `jax.image`
    with antialiasing and Pillow have it.
    """
    scale = jnp.maximum(size, 1) / target
    centres = (jnp.arange(target) + 0.5) * scale
    places = jnp.arange(length) + 0.5
    away = jnp.abs(centres[:, None] - places) / jnp.maximum(scale, 1)
    weights = jnp.where(places < size, jnp.maximum(1 - away, 0), 0)
    return weights / jnp.maximum(weights.sum(-1, keepdims=True), 1e-6)
