"""Where each token stands: absolute, fractional, or aspect-preserving coordinates.

Shapes: B rows, L tokens a row, A axes of a grid.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from navit_jax.models.choices import pick


def locate(
    coords: Int[Array, "B L A"],
    grids: Int[Array, "B L A"],
    length: int,
    coordinates: str,
    fraction: str,
) -> Float[Array, "B L A"]:
    """Places each token among the entries of a table of `length`, in float32.

    Absolute coordinates are the indices themselves, clipped to the table. Fractional
    ones span it: 0 is the first entry, 1 the last, so a place lies between two entries
    (NaViT section 3.4, figure 17).

    Args:
      coords: The patch's indices in its image's grid.
      grids: The grid of the token's image; anything at padding.
      length: Entries of the table.
      coordinates: "absolute"; "fractional", of the image's side along the axis; or
        "aspect_preserving", of the longer side for rows and columns alike (a frame
        index stays a fraction of the frames).
      fraction: Where a patch stands in its side of n patches: "centre" (i + 0.5) / n,
        "start" i / n, "corners" i / (n - 1).

    Returns:
      Places in [0, length - 1].

    Raises:
      ConfigError: an unknown value of `coordinates` or `fraction`.
    """
    sides_of = pick("model.positions.coordinates", coordinates, COORDINATES)
    fraction_of = pick("model.positions.fraction", fraction, FRACTIONS)
    if sides_of is None:
        places = coords.astype(jnp.float32)
    else:
        places = fraction_of(coords, sides_of(jnp.maximum(grids, 1))) * (length - 1)
    # Wider grids are kept out by the plan; one that gets here reads the last entry.
    return jnp.clip(places, 0, length - 1)


def _own_sides(grids: Int[Array, "B L A"]) -> Int[Array, "B L A"]:
    return grids


def _longer_sides(grids: Int[Array, "B L A"]) -> Int[Array, "B L A"]:
    return grids.at[..., -2:].set(grids[..., -2:].max(-1, keepdims=True))


def _centre(index: Int[Array, "*S"], side: Int[Array, "*S"]) -> Float[Array, "*S"]:
    # Whole numbers up to one division, so that a place is rounded once.
    return (2 * index + 1) / (2 * side)


def _start(index: Int[Array, "*S"], side: Int[Array, "*S"]) -> Float[Array, "*S"]:
    return index / side


def _corners(index: Int[Array, "*S"], side: Int[Array, "*S"]) -> Float[Array, "*S"]:
    return index / jnp.maximum(side - 1, 1)


COORDINATES = {
    "absolute": None,
    "fractional": _own_sides,
    "aspect_preserving": _longer_sides,
}
FRACTIONS = {"centre": _centre, "start": _start, "corners": _corners}
