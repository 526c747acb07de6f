"""Each latent token also sees its last box as a patch of the ViT its blocks are from.

Ours, not of the papers: with the blocks, tables and patch embedding of a ViT, and boxes
side by side, a SparseFormer starts as that ViT on the picture at as many patches as
there are tokens, and learns from there where to look; what its focusing says to the
blocks begins at nothing.

Shapes: B rows, Q latent tokens a row, N image slots a row, M tiles a row, w pixels a
side of a tile's window, D width.

Parameters: patch_embedding: kernel [3 glimpse^2, D], bias [D]; position_embedding:
table [table table D]; gain [D].
"""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from navit_jax.errors import ConfigError
from navit_jax.models import rois as boxes
from navit_jax.models import sampling
from navit_jax.models.feature_maps import BEFORE, HALO, Maps, Pixels
from navit_jax.models.navit import normalise
from navit_jax.models.resample import resample_at
from navit_jax.models.sparseformer_sizes import Shape


def lay_pixels(
    pixels: Pixels, maps: Maps, grids: Int[Array, "B N 2"], patch: int, shape: Shape
) -> Maps:
    """The pictures as maps of 3 channels, normalised, a cell the mean of some pixels.

    Without glimpses nothing reads them: `maps`.

    Args:
      pixels: A window for each tile of `maps`, as `feature_maps` cuts them.
      patch: Pixels a side of a patch of the data.
      shape: Whose `glimpse_pool` is the side of a cell in pixels.

    Raises:
      ConfigError: a side that does not divide that of patches.
    """
    if not shape.glimpse:
        return maps
    pool, (B, M, w) = shape.glimpse_pool, pixels.shape[:3]
    if pool < 1 or patch % pool or (w - HALO) % pool:
        raise ConfigError(
            f"config.model.shape.glimpse_pool={pool} must divide the patch side, "
            f"{patch}, and that of a tile, {w - HALO}: 1 always does"
        )
    own = pixels[:, :, BEFORE : BEFORE + w - HALO, BEFORE : BEFORE + w - HALO]
    line = normalise(own.reshape(B, M, -1), shape.pixel_mean, shape.pixel_std)
    side = (w - HALO) // pool
    cells = line.reshape(B, M, side, pool, side, pool, 3).mean((3, 5))
    sizes = jnp.where(maps.sizes > 0, patch * grids // pool, 0)
    return maps._replace(cells=cells, sizes=sizes)


class Glimpses(nn.Module):
    """Tokens of the blocks: patches at boxes, their positions, and what focusing says.

    Attributes:
      shape: Whose `glimpse`, `table` and `width` are read.
      lookup, gradient_clamp: As in `sparseformer.SparseFormer`.
      dtype: Of tokens.
    """

    shape: Shape
    lookup: str
    gradient_clamp: float | int
    dtype: Any

    @nn.compact
    def __call__(
        self,
        tokens: Float[Array, "B Q D"],
        rois: Float[Array, "B Q 4"],
        segment_ids: Int[Array, "B Q"],
        pictures: Maps,
    ) -> Float[Array, "B Q D"]:
        """The sum of the three, the focused tokens times a gain that starts at 0.

        Args:
          segment_ids: 1.. by image slot, 0 = padding.
          pictures: Of `lay_pixels`.
        """
        shape, (B, Q, D) = self.shape, tokens.shape
        slots = jnp.maximum(segment_ids - 1, 0)
        centre = (rois[..., :2] + rois[..., 2:]) / 2
        sides = (rois[..., 2:] - rois[..., :2])[..., None, :]
        points = centre[..., None, :] + boxes.point_grid(shape.glimpse**2) * sides
        pictures = sampling.prepare(pictures, self.lookup)
        how = "border", self.lookup, self.gradient_clamp
        seen = sampling.lookup(pictures, slots, points, *how)
        # Of what is no picture a product with 0 may be no number.
        real = (segment_ids > 0)[..., None]
        seen = jnp.where(real, seen.reshape(B, Q, -1), 0)
        embed = nn.Dense(D, dtype=self.dtype, name="patch_embedding")
        place = _Positions(shape.table, name="position_embedding")
        gain = self.param("gain", nn.initializers.zeros, (D,))
        tokens = tokens * gain.astype(self.dtype)
        return tokens + embed(seen) + place(centre[..., ::-1], D).astype(self.dtype)


class _Positions(nn.Module):
    """The table of `resample.Learned1D`, read between its entries as DINOv2's is."""

    side: int

    @nn.compact
    def __call__(
        self, places: Float[Array, "B Q 2"], width: int
    ) -> Float[Array, "B Q D"]:
        shape = (self.side, self.side, width)
        table = self.param("table", nn.initializers.normal(0.02), shape)
        return resample_at(table, places)
