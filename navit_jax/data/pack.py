"""Writes the images of planned rows into the arrays of a packed batch.

Shapes: B rows, L tokens a row, N image slots a row, P values a patch, K labels an
image at most, n tokens of one image.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from navit_jax.batch import PackedBatch
from navit_jax.errors import DataError


class LoadedImage(NamedTuple):
    """One image, ready to be written into its slot.

    Attributes:
      patches: [n P] uint8, the kept ones; [0 P] if the image could not be used.
      coords: [n 2] int32, (row, column) of each kept patch.
      grid: (rows, columns) before dropping.
      image_id: (source, index).
      labels: Class indices.
      name: What to call the image in messages.
    """

    patches: np.ndarray
    coords: np.ndarray
    grid: tuple[int, int]
    image_id: tuple[int, int]
    labels: tuple[int, ...]
    name: str


def pack_rows(
    rows: Sequence[Sequence[LoadedImage]],
    num_tokens: int,
    num_slots: int,
    patch_values: int,
    num_labels: int,
) -> PackedBatch:
    """Packs rows of images; slot i of a row is its i-th image.

    An image without tokens keeps its slot and its number, and is not valid.

    Args:
      rows: The images of each row; an empty row is all padding.
      num_labels: K, the most labels an image may have; unused ones are -1.

    Raises:
      DataError: an image has more labels than K.
    """
    B, L, N = len(rows), num_tokens, num_slots
    patches = np.zeros((B, L, patch_values), np.uint8)
    coords = np.zeros((B, L, 2), np.int32)
    segment_ids = np.zeros((B, L), np.int32)
    grids = np.zeros((B, N, 2), np.int32)
    image_mask = np.zeros((B, N), bool)
    image_ids = np.zeros((B, N, 2), np.uint32)
    labels = np.full((B, N, num_labels), -1, np.int32)
    for b, images in enumerate(rows):
        assert len(images) <= N, "the plan keeps to the slots of a row"
        start = 0
        for i, image in enumerate(images):
            image_ids[b, i] = image.image_id
            stop = start + len(image.patches)
            assert stop <= L, "the plan keeps to the tokens of a row"
            if stop == start:
                continue
            patches[b, start:stop] = image.patches
            coords[b, start:stop] = image.coords
            segment_ids[b, start:stop] = i + 1
            grids[b, i] = image.grid
            image_mask[b, i] = True
            if len(image.labels) > num_labels:
                raise DataError(
                    f"{image.name} has {len(image.labels)} labels; raise "
                    f"config.data.num_labels={num_labels}"
                )
            labels[b, i, : len(image.labels)] = image.labels
            start = stop
    return PackedBatch(
        patches=patches,
        coords=coords,
        segment_ids=segment_ids,
        grids=grids,
        image_mask=image_mask,
        image_ids=image_ids,
        targets={"labels": labels},
    )
