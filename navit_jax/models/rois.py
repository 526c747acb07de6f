"""The boxes that latent tokens look at: where they start, how they move, their points.

A box is (x0, y0, x1, y1) in fractions of the image's valid part. All of it is float32.

Shapes: B rows, Q latent tokens a row, S points a token, D width.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32

WHOLE = (0.0, 0.0, 1.0, 1.0)
# No box is near these unless it is lost: then it stays a number. Corners; log of sizes.
FARTHEST, STEEPEST = 1e4, 20.0
# Below the rounding of any variance that matters.
TINY = 1e-20


def factor(count: int) -> tuple[int, int]:
    """Columns and rows, as near as can be, of a grid of `count`: 48 is 8 x 6."""
    rows = next(n for n in range(math.isqrt(count), 0, -1) if count % n == 0)
    return count // rows, rows


def half_grid(count: int) -> Float32[np.ndarray, "count 4"]:
    """Boxes of half the sides that start on a grid of `factor`; x is the slow index.

    The last ends at the other corner. All differ, which the code of the papers has for
    square counts alone: there those beyond a square grid are the whole image.
    """
    columns, rows = factor(count)
    x, y = np.meshgrid(_starts(columns), _starts(rows), indexing="ij")
    corner = np.stack([x.ravel(), y.ravel()], -1)
    return np.concatenate([corner, corner + 0.5], -1).astype(np.float32)


def cell_grid(count: int) -> Float32[np.ndarray, "count 4"]:
    """The cells of a grid of `factor`, side by side; x is the slow index."""
    columns, rows = factor(count)
    x, y = np.meshgrid(np.arange(columns), np.arange(rows), indexing="ij")
    cells = np.stack([x.ravel(), y.ravel(), x.ravel() + 1, y.ravel() + 1], -1)
    return (cells / (columns, rows, columns, rows)).astype(np.float32)


def _starts(num: int) -> np.ndarray:
    return np.linspace(0, 0.5, num) if num > 1 else np.array([0.25])


def resize_table(table: Float[Array, "own D"], count: int) -> Float[Array, "count D"]:
    """The table of another number of tokens, bilinear between those of its own grid.

    The grids' corners fall on each other; a table of its own size is itself.
    """
    if count == len(table):
        return table
    weights = [
        _weigh(new, old)
        for new, old in zip(factor(count), factor(len(table)), strict=True)
    ]
    return jnp.dot(jnp.kron(*weights), table, precision="highest")


def _weigh(num: int, own: int) -> Float[Array, "num own"]:
    middle = (own - 1) / 2
    places = np.linspace(0, own - 1, num) if num > 1 else np.array([middle])
    distance = np.abs(places[:, None] - np.arange(own))
    return jnp.asarray(np.maximum(1 - distance, 0), jnp.float32)


def settle(rois: Float[Array, "*S 4"], clamp: bool = False) -> Float[Array, "*S 4"]:
    """The boxes, numbers in any case: what is none becomes the whole image.

    Args:
      clamp: Whether corners stay within the image.
    """
    known = jnp.isfinite(rois).all(-1, keepdims=True)
    low, high = (0.0, 1.0) if clamp else (-FARTHEST, FARTHEST)
    return jnp.clip(jnp.where(known, rois, jnp.array(WHOLE)), low, high)


def adjust(
    rois: Float[Array, "*S 4"], logits: Float[Array, "*S 4"]
) -> Float[Array, "*S 4"]:
    """Moves centres by (tx, ty) sides, scales sides by exp of (tw, th)."""
    centre, sides = _split(rois)
    centre += logits[..., :2] * sides
    sides *= jnp.exp(jnp.clip(logits[..., 2:], -STEEPEST, STEEPEST))
    return jnp.concatenate([centre - sides / 2, centre + sides / 2], -1)


def _split(rois: Array) -> tuple[Array, Array]:
    first, last = rois[..., :2], rois[..., 2:]
    return (first + last) / 2, jnp.abs(last - first)


def point_grid(num_points: int) -> Float32[np.ndarray, "S 2"]:
    """Offsets (x, y) at which points start: a regular grid in a box of side 1.

    x is the fast index; the grid is that of `factor`.
    """
    columns, rows = factor(num_points)
    y, x = np.meshgrid(
        (np.arange(rows) + 0.5) / rows - 0.5,
        (np.arange(columns) + 0.5) / columns - 0.5,
        indexing="ij",
    )
    return np.stack([x.ravel(), y.ravel()], -1).astype(np.float32)


def place_points(
    rois: Float[Array, "B Q 4"], offsets: Float[Array, "B Q S 2"], eps: float = 1e-5
) -> Float[Array, "B Q S 2"]:
    """Points (x, y) of the boxes: offsets of 1 standard deviation are 1/3 of a side.

    The offsets of a token are centred and divided by 3 times their deviation, by axis.
    """
    centre, sides = _split(rois)
    offsets = offsets - offsets.mean(-2, keepdims=True)
    spare = max(offsets.shape[-2] - 1, 1)
    variance = jnp.square(offsets).sum(-2, keepdims=True) / spare
    # The root of 0 has no gradient.
    deviation = jnp.sqrt(variance + TINY)
    offsets /= 3 * (deviation + eps)
    return centre[..., None, :] + offsets * sides[..., None, :]


def encode(rois: Float[Array, "B Q 4"], width: int) -> Float[Array, "B Q {width}"]:
    """Sines and cosines of the corners; no gradient to the boxes.

    Of each corner's frequencies, from 1 to 128 half turns a side of the image, those of
    even number are sines and the others cosines.
    """
    frequencies = jnp.exp(jnp.linspace(0, math.log(128), width // 4))
    angles = jax.lax.stop_gradient(rois)[..., None] * jnp.pi * frequencies
    parts = [jnp.sin(angles[..., 0::2]), jnp.cos(angles[..., 1::2])]
    return jnp.concatenate(parts, -1).reshape(*rois.shape[:-1], width)


@jax.custom_vjp
def clamp_gradient(
    points: Float[Array, "*S 2"], limits: Float[Array, "*R 2"]
) -> Float[Array, "*S 2"]:
    """The points; each entry of the gradient to them is kept within +-limits."""
    return points


def _forward(points: Array, limits: Array) -> tuple[Array, Array]:
    return points, limits


def _backward(limits: Array, gradient: Array) -> tuple[Array, Array]:
    return jnp.clip(gradient, -limits, limits), jnp.zeros_like(limits)


clamp_gradient.defvjp(_forward, _backward)
