"""Positions of patches: every scheme of NaViT's Table 3, and rotary ones.

Each takes the coordinates of tokens and the grid of each token's image, and gives
float32 vectors [B L D], which are added to the patch embedding (`rope` gives angles
instead). Rows of the paper's Table 3 by config:

| row | scheme | `name` and arguments |
|---|---|---|
| 1 | learned 1D | `learned_1d` |
| 2 | learned 2D | `learned_2d` |
| 3, 4, 5 | factorized absolute | `factorized`, `combine="sum" / "stack" / "product"` |
| 6 | Fourier absolute | `fourier` |
| 7 | sinusoidal absolute | `sinusoidal` |
| 8 | factorized fractional | `factorized`, `coordinates="fractional"` |
| 9 | Fourier fractional | `fourier`, `coordinates="fractional"` |
| 10 | sinusoidal fractional | `sinusoidal`, `coordinates="fractional"` |

Shapes: B rows, L tokens a row, A axes of a grid, S entries of a table, D width.
"""

import functools
import math
from collections.abc import Callable

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from navit_jax.errors import ConfigError
from navit_jax.models.choices import pick
from navit_jax.models.coordinates import locate
from navit_jax.models.resample import Learned1D
from navit_jax.models.rope import Rope


def read(
    tables: Float[Array, "A S W"], places: Float[Array, "B L A"]
) -> Float[Array, "B L A W"]:
    """Reads one table an axis, linearly between entries; whole places read an entry.

    A product with the weights of all S entries rather than a gather: its gradient is
    a sum in a fixed order on every device.
    """
    entries = jnp.arange(tables.shape[1], dtype=jnp.float32)
    weights = jnp.maximum(1 - jnp.abs(places[..., None] - entries), 0)
    return jnp.einsum("BLAS,ASW->BLAW", weights, tables, precision="highest")


class Factorized(nn.Module):
    """One learned table an axis, combined (NaViT section 3.4; Table 3 rows 3-5, 8).

    Attributes:
      width: D.
      length: S, entries of a table: the most patches a side with absolute coordinates.
      coordinates: As in `coordinates.locate`; fractions are read between two entries.
      fraction: As in `coordinates.locate`.
      combine: "sum", "stack" (each axis its share of the width) or "product".
    """

    width: int
    length: int = 64
    coordinates: str = "absolute"
    fraction: str = "centre"
    combine: str = "sum"

    @nn.compact
    def __call__(
        self, coords: Int[Array, "B L A"], grids: Int[Array, "B L A"]
    ) -> Float[Array, "B L D"]:
        """The position of each token."""
        A = coords.shape[-1]
        combined = pick("model.positions.combine", self.combine, COMBINE)
        stacked = self.combine == "stack"
        W = _share(self.width, A) if stacked else self.width
        # A product of A entries is as large at the start as one entry of a sum.
        std = 0.02 ** (1 / A) if self.combine == "product" else 0.02
        init = nn.initializers.normal(std)
        tables = self.param("tables", init, (A, self.length, W))
        places = locate(coords, grids, self.length, self.coordinates, self.fraction)
        return combined(read(tables, places))


class Sinusoidal(nn.Module):
    """Fixed sines and cosines of each axis, stacked (Table 3 rows 7 and 10).

    Each axis has its share of the width: sines, then cosines, of place x base^(-2i/W)
    (Vaswani et al. 2017). Fractions are read between two entries.

    Attributes:
      width: D.
      length: S, entries of a table: the most patches a side with absolute coordinates.
      coordinates: As in `coordinates.locate`.
      fraction: As in `coordinates.locate`.
      base: Sets the longest wave.
    """

    width: int
    length: int = 64
    coordinates: str = "absolute"
    fraction: str = "centre"
    base: float = 10000.0

    def __call__(
        self, coords: Int[Array, "B L A"], grids: Int[Array, "B L A"]
    ) -> Float[Array, "B L D"]:
        """The position of each token."""
        A = coords.shape[-1]
        half = _share(self.width, 2 * A)
        speeds = self.base ** -(np.arange(half) / half)
        angles = np.arange(self.length)[:, None] * speeds
        table = np.concatenate([np.sin(angles), np.cos(angles)], -1)
        tables = jnp.broadcast_to(table.astype(np.float32), (A, *table.shape))
        places = locate(coords, grids, self.length, self.coordinates, self.fraction)
        return _stack(read(tables, places))


class Fourier(nn.Module):
    """Sines and cosines of learned mixtures of the axes (Table 3 rows 6 and 9).

    a = W (y, x) + b, then sin(a), cos(a) (Tancik et al. 2020). An absolute index is
    first divided by length - 1, so both kinds of coordinates lie in [0, 1].

    Attributes:
      width: D, even.
      length: Patches a side that absolute coordinates 0 .. 1 span.
      coordinates: As in `coordinates.locate`.
      fraction: As in `coordinates.locate`.
      bandwidth: Standard deviation of the initial frequencies, in waves over [0, 1].
        The paper does not give it.
    """

    width: int
    length: int = 64
    coordinates: str = "absolute"
    fraction: str = "centre"
    bandwidth: float = 4.0

    @nn.compact
    def __call__(
        self, coords: Int[Array, "B L A"], grids: Int[Array, "B L A"]
    ) -> Float[Array, "B L D"]:
        """The position of each token."""
        shape = (coords.shape[-1], _share(self.width, 2))
        init = nn.initializers.normal(2 * math.pi * self.bandwidth)
        kernel = self.param("kernel", init, shape)
        bias = self.param("bias", nn.initializers.zeros, shape[1:])
        places = locate(
            coords, grids, self.length, self.coordinates, self.fraction
        ) / max(self.length - 1, 1)
        angles = jnp.einsum("BLA,AW->BLW", places, kernel, precision="highest") + bias
        return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], -1)


class Learned2D(nn.Module):
    """One learned entry for each pair of indices (Pix2Struct; Table 3 row 2).

    Attributes:
      width: D.
      length: Entries a side of the table: the most patches a side.
    """

    width: int
    length: int = 64

    @nn.compact
    def __call__(
        self, coords: Int[Array, "B L 2"], grids: Int[Array, "B L 2"]
    ) -> Float[Array, "B L D"]:
        """The position of each token."""
        shape = (self.length, self.length, self.width)
        table = self.param("table", nn.initializers.normal(0.02), shape)
        rows, columns = jnp.moveaxis(jnp.clip(coords, 0, self.length - 1), -1, 0)
        return table[rows, columns]


def _sum(parts: Float[Array, "B L A W"]) -> Float[Array, "B L W"]:
    return parts.sum(2)


def _product(parts: Float[Array, "B L A W"]) -> Float[Array, "B L W"]:
    return functools.reduce(jnp.multiply, jnp.moveaxis(parts, 2, 0))


def _stack(parts: Float[Array, "B L A W"]) -> Float[Array, "B L D"]:
    return parts.reshape(*parts.shape[:2], -1)


def _share(width: int, parts: int) -> int:
    if width % parts:
        raise ConfigError(
            f"config.model.positions: the width {width} does not divide into {parts}"
            " parts; use another width, or 'factorized' with combine='sum'"
        )
    return width // parts


COMBINE = {"sum": _sum, "stack": _stack, "product": _product}
POSITIONS: dict[str, Callable[..., nn.Module]] = {
    "learned_1d": Learned1D,
    "learned_2d": Learned2D,
    "factorized": Factorized,
    "fourier": Fourier,
    "sinusoidal": Sinusoidal,
    "rope": Rope,
}
