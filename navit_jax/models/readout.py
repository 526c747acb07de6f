"""From latent tokens back to the places of a picture: a vector for each patch.

That few tokens are enough for dense results is reported of the second SparseFormer
(arXiv 2312.01987: 256 tokens for 512 x 512 pixels); how they become a map is ours. A
token says a plane over its box, a value at the centre and a slope by axis, and a patch
has the mean of what is said there.

Shapes: B rows, L patches a row, N image slots a row, Q latent tokens a row, S points a
token, D width.

Parameters:

  planes  kernel [D 3 D], bias [3 D]: the value, and its slopes by x and by y
"""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from navit_jax.models.device_rows import keep_rows
from navit_jax.models.feature_maps import take
from navit_jax.models.focusing import INIT

# A box's weight is a half at its edge, and falls by e within 1 / SHARP of half a side.
SHARP = 4.0
# Share that boxes have where there are points: a patch without any is told by boxes.
FLOOR = 0.01
NEVER = -1e9
READOUTS = ("boxes", "points")


def weigh_boxes(
    rois: Float[Array, "B Q 4"],
    centres: Float[Array, "B L 2"],
    sizes: Int[Array, "B L 2"],
    same: Bool[Array, "B L Q"],
) -> tuple[Float[Array, "B L Q"], Float[Array, "B L Q 2"]]:
    """How much each patch hears of each token by its box: of a patch all sum to 1.

    Soft, so that a patch outside of every box hears the nearest, and boxes have a
    gradient. A box counts as at least a patch a side.

    Args:
      rois: Finite.
      centres: (x, y) of patches, in fractions of their image.
      sizes: Patches a side, (x, y), of the image of each.
      same: Whether patch and token are of one image.

    Returns:
      The weights, 0 between images; and where the patch is in the box, -1 .. 1 by axis,
      the end for what is outside.
    """
    first, last = rois[:, None, :, :2], rois[:, None, :, 2:]
    half = jnp.maximum(jnp.abs(last - first) / 2, 0.5 / sizes[:, :, None])
    offsets = (centres[:, :, None] - (first + last) / 2) / half
    inside = jax.nn.log_sigmoid(SHARP * (1 - jnp.abs(offsets))).sum(-1)
    weights = jax.nn.softmax(jnp.where(same, inside, NEVER), axis=-1)
    return jnp.where(same, weights, 0), jnp.clip(offsets, -1, 1)


@jax.checkpoint
def splat_points(
    points: Float[Array, "B Q S 2"],
    coords: Int[Array, "B L 2"],
    sizes: Int[Array, "B L 2"],
    same: Bool[Array, "B L Q"],
    border: Bool[Array, ""],
) -> Float[Array, "B L Q"]:
    """The transpose of `sampling.lookup` of a map with a cell for each patch.

    Each point gives its bilinear weights, 1 in all, to the patches around it; one
    outside of the picture what of them is inside, or all if it counts as at the border.

    Args:
      coords: (x, y) of patches in their grid.
      sizes, same: As of `weigh_boxes`.
    """
    wide = sizes[:, :, None, None]
    places = points[:, None] * wide - 0.5
    places = jnp.where(border, jnp.clip(places, 0, wide - 1), places)
    distances = jnp.abs(places - coords[:, :, None, None])
    weights = jnp.maximum(1 - distances, 0).prod(-1).sum(-1)
    return jnp.where(same, weights, 0)


class Readout(nn.Module):
    """A vector for each patch, of the latent tokens of its image.

    Attributes:
      by: Of READOUTS: "boxes", by `weigh_boxes` of the last ones; "points", by
        `splat_points` of the last ones, and by boxes where there are none.
      padding: Of the encoder's lookups.
    """

    by: str
    padding: str

    @nn.compact
    def __call__(
        self,
        out: Mapping[str, Any],
        coords: Int[Array, "B L 2"],
        segment_ids: Int[Array, "B L"],
        grids: Int[Array, "B N 2"],
    ) -> Float[Array, "B L D"]:
        """The vectors, 0 at padding.

        Args:
          out: Of a SparseFormer with `capture`.
          coords, segment_ids, grids: Of the patches, as it was called with.
        """
        tokens = out["tokens"]
        same = segment_ids[..., None] == out["latent_ids"][:, None]
        same &= (segment_ids > 0)[..., None]
        sizes = jnp.maximum(take(grids, jnp.maximum(segment_ids - 1, 0)), 1)
        sizes, places = sizes[..., ::-1], coords[..., ::-1]
        boxes, centres = out["rois"][:, -1], (places + 0.5) / sizes
        weights, offsets = weigh_boxes(boxes, centres, sizes, same)
        if self.by == "points":
            border = jnp.array(self.padding == "border")
            points = out["points"][:, -1]
            weights = FLOOR * weights + splat_points(
                points, places, sizes, same, border
            )
            weights /= jnp.maximum(weights.sum(-1, keepdims=True), FLOOR / 2)

        width = tokens.shape[-1]
        dense = nn.Dense(3 * width, kernel_init=INIT, dtype=tokens.dtype, name="planes")
        value, *slopes = jnp.split(dense(tokens), 3, axis=-1)
        found = _gather(weights, value)
        for axis, slope in enumerate(slopes):
            found += _gather(weights * offsets[..., axis], slope)
        return keep_rows(found)


def _gather(
    weights: Float[Array, "B L Q"], values: Float[Array, "B Q D"]
) -> Float[Array, "B L D"]:
    return jnp.einsum("BLQ,BQD->BLD", weights.astype(values.dtype), values)
