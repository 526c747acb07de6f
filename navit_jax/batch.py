"""The packed batch: several images in each fixed-length row of patch tokens.

The letters of every shape in this project:
  B rows; L tokens a row; N image slots a row; P values a patch; A axes of a grid
  (2, or 3 for video); D width; H heads; K head width; C classes; T text tokens;
  Q latent tokens; M images of a list; n tokens of one image. Lower-case h w are pixels.
"""

import dataclasses
from typing import Any, TypeVar, dataclass_transform

import chex

# A numpy array on the host, a jax.Array on devices, a ShapeDtypeStruct in planning.
AnyArray = Any
Class = TypeVar("Class")


@dataclass_transform(kw_only_default=True, frozen_default=True)
def pytree(cls: type[Class]) -> type[Class]:
    """Makes a class a frozen dataclass that is a JAX pytree."""
    return chex.dataclass(frozen=True, mappable_dataclass=False)(cls)  # pyright: ignore


@pytree
class PackedBatch:
    """Rows of tokens, each row holding up to N images.

    Attributes:
      patches: [B L P] uint8, pixels of a patch, row-major, channels last; normalised
        on the device.
      coords: [B L A] int32, (row, column) or (frame, row, column) of the patch in the
        grid of its image, before any patch was dropped.
      segment_ids: [B L] int32, 1.. in the order of packing; 0 is padding. The tokens of
        an image are contiguous.
      grids: [B N A] int32, (rows, columns) of each image's grid before dropping; 0 in
        an empty slot.
      image_mask: [B N] bool, slot i (segment i + 1) holds an image. An image that
        failed to load keeps its number, owns no token and is False here.
      image_ids: [B N 2] uint32, (source, index) of the image: random draws of the model
        are keyed by (seed, step, image id).
      targets: a dict of arrays [B N ...] or [B L ...].
    """

    patches: AnyArray
    coords: AnyArray
    segment_ids: AnyArray
    grids: AnyArray
    image_mask: AnyArray
    image_ids: AnyArray
    targets: dict[str, AnyArray]


@dataclasses.dataclass(frozen=True, kw_only=True)
class BatchInfo:
    """What the host knows of one batch of its rows and the devices need not.

    Attributes:
      position: [epoch, window, row] in the stream after this global batch, one for
        each plan shard; None for a shard whose first row is on another host.
      images_seen: Images planned up to and with this global batch, failures included,
        of each plan shard; None where `position` is.
      keys: For each local row, the names of its images, in slot order.
      skipped: (name, reason) of each image of this host's rows that could not be used.
      shrunk: Names of this host's images planned below their drawn size, because they
        exceed a row or the position table.
      notes: Counts of what was odd but used, by reason, e.g. `animated`.
    """

    position: list[list[int] | None]
    images_seen: list[int | None]
    keys: list[list[str]]
    skipped: list[tuple[str, str]]
    shrunk: list[str]
    notes: dict[str, int]
