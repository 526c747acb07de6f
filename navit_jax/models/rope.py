"""Rotary positions on a grid: queries and keys turn by angles of their coordinates.

Shapes: B rows, L tokens a row, A axes of a grid, H heads, K head width.
"""

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from navit_jax.models.coordinates import locate


class Rope(nn.Module):
    """Axial rotary embedding (Su et al. 2021) of rows and columns.

    The K / 2 pairs of a head are divided among the axes, the first axes taking what
    is left over; of the m pairs of an axis, pair i turns by place x base^(-i/m).

    Attributes:
      width: Pairs of a head, K / 2.
      length: The widest grid the plan lets through, and the scale of fractional
        coordinates: they span 0 .. length - 1.
      coordinates: As in `coordinates.locate`.
      fraction: As in `coordinates.locate`.
      base: Sets the slowest turn.
    """

    width: int
    length: int = 64
    coordinates: str = "absolute"
    fraction: str = "centre"
    base: float = 10000.0

    def __call__(
        self, coords: Int[Array, "B L A"], grids: Int[Array, "B L A"]
    ) -> Float[Array, "B L W"]:
        """Angles of each pair in radians, float32; W = K / 2."""
        places = locate(coords, grids, self.length, self.coordinates, self.fraction)
        A = coords.shape[-1]
        shares = [len(share) for share in np.array_split(np.arange(self.width), A)]
        angles = [
            places[..., a, None] * jnp.asarray(self._speeds(pairs))
            for a, pairs in enumerate(shares)
        ]
        return jnp.concatenate(angles, -1)

    def _speeds(self, pairs: int) -> np.ndarray:
        return (self.base ** -(np.arange(pairs) / max(pairs, 1))).astype(np.float32)


def rotate(
    heads: Float[Array, "B L H K"], angles: Float[Array, "B L W"]
) -> Float[Array, "B L H K"]:
    """Turns the pairs (i, i + K / 2) of each head by the token's angles, in float32."""
    cos, sin = jnp.cos(angles)[:, :, None], jnp.sin(angles)[:, :, None]
    first, second = jnp.split(heads.astype(jnp.float32), 2, axis=-1)
    turned = [first * cos - second * sin, second * cos + first * sin]
    return jnp.concatenate(turned, -1).astype(heads.dtype)
