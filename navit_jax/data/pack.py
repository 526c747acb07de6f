"""Writes the images of planned rows into the arrays of a packed batch.

Shapes: B rows, L tokens a row, N image slots a row, P values a patch, K labels an
image at most, T text tokens a row, n tokens of one image or text.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from navit_jax.batch import PackedBatch
from navit_jax.errors import DataError

NO_TEXT = np.zeros(0, np.int32)
NO_VECTOR = np.zeros(0, np.float32)
NO_CLASSES = np.zeros((0, 0), np.uint8)


class LoadedImage(NamedTuple):
    """One image, ready to be written into its slot.

    Attributes:
      patches: [n P] uint8, the kept ones; [0 P] if the image could not be used.
      coords: [n 2] int32, (row, column) of each kept patch.
      grid: (rows, columns) before dropping.
      image_id: (source, index).
      labels: Class indices.
      name: What to call the image in messages.
      text: [n] int32, the tokens of the caption it brings; [0] without.
      classes: [n P/3] uint8, of the pixels of each patch, see `pixel_classes.py`.
      teacher: [E] float32, a teacher's vector, see `teacher_outputs.py`.
    """

    patches: np.ndarray
    coords: np.ndarray
    grid: tuple[int, int]
    image_id: tuple[int, int]
    labels: tuple[int, ...]
    name: str
    text: np.ndarray = NO_TEXT
    classes: np.ndarray = NO_CLASSES
    teacher: np.ndarray = NO_VECTOR


def pack_rows(
    rows: Sequence[Sequence[LoadedImage]],
    num_tokens: int,
    num_slots: int,
    patch_values: int,
    num_labels: int,
    num_text: int = 0,
    pixel_classes: bool = False,
    teacher_width: int = 0,
) -> PackedBatch:
    """Packs rows of images; slot i of a row is its i-th image.

    An image without tokens keeps its slot and its number, and is not valid.

    Args:
      rows: The images of each row; an empty row is all padding.
      num_labels: K, the most labels an image may have; unused ones are -1. 0: the batch
        has none, whatever the images have.
      num_text: T; 0: the batch has no texts, and the leaves of `pack_texts` are not in
        its targets.
      pixel_classes: Whether the batch has targets `pixel_classes` [B L P/3] uint8, see
        `pixel_classes.py`; 255, unknown, at padding.
      teacher_width: E of targets `teacher` [B N E] float32; 0: there are none.

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
    classes = np.full((B, L, patch_values // 3 if pixel_classes else 0), 255, np.uint8)
    teacher = np.zeros((B, N, teacher_width), np.float32)
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
            if pixel_classes:
                classes[b, start:stop] = image.classes
            if teacher_width:
                teacher[b, i] = image.teacher
            grids[b, i] = image.grid
            image_mask[b, i] = True
            if len(image.labels) > num_labels > 0:
                raise DataError(
                    f"{image.name} has {len(image.labels)} labels; raise "
                    f"config.data.num_labels={num_labels}"
                )
            own = image.labels[:num_labels]
            labels[b, i, : len(own)] = own
            start = stop
    return PackedBatch(
        patches=patches,
        coords=coords,
        segment_ids=segment_ids,
        grids=grids,
        image_mask=image_mask,
        image_ids=image_ids,
        targets={
            "labels": labels,
            **(pack_texts(rows, num_text) if num_text else {}),
            **({"pixel_classes": classes} if pixel_classes else {}),
            **({"teacher": teacher} if teacher_width else {}),
        },
    )


def pack_texts(rows: Sequence[Sequence[LoadedImage]], num_text: int) -> dict[str, Any]:
    """The texts of rows of images, each with the number of its image.

    An image that could not be used keeps its text: the slot is no pair all the same.

    Returns:
      `text_tokens` [B T] int32; `text_coords` [B T 1] int32, place of the token in its
      text; `text_segment_ids` [B T] int32, 1 + slot of the image. Padding is told by
      segment id 0 alone: token 0 may be a word.
    """
    tokens = np.zeros((len(rows), num_text), np.int32)
    coords = np.zeros((len(rows), num_text, 1), np.int32)
    segment_ids = np.zeros((len(rows), num_text), np.int32)
    for b, images in enumerate(rows):
        start = 0
        for i, image in enumerate(images):
            stop = start + len(image.text)
            assert stop <= num_text, "the plan keeps to the text tokens of a row"
            tokens[b, start:stop] = image.text
            coords[b, start:stop, 0] = np.arange(stop - start)
            segment_ids[b, start:stop] = i + 1
            start = stop
    return {
        "text_tokens": tokens,
        "text_coords": coords,
        "text_segment_ids": segment_ids,
    }
