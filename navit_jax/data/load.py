"""Reads the images of planned rows: record, decode, patchify, drop, in one place.

n tokens of one image or text.
"""

import collections
import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from navit_jax.batch import PackedBatch
from navit_jax.data import images, patches
from navit_jax.data.pack import (
    NO_CLASSES,
    NO_TEXT,
    NO_VECTOR,
    LoadedImage,
    pack_rows,
)
from navit_jax.data.pixel_classes import check_shape, draw_classes
from navit_jax.data.rand_augment import augment
from navit_jax.data.records import Record, Source, cache_folder
from navit_jax.data.teacher_outputs import TeacherOutputs
from navit_jax.data.tokenizer import Tokenizer
from navit_jax.data.window import PlannedRow
from navit_jax.errors import DataError


class LoadedRows(NamedTuple):
    """Images by row and slot, and the fields of a BatchInfo that tell of them."""

    images: list[list[LoadedImage]]
    info: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Loader:
    """Loads planned rows; picklable, used from several threads and processes.

    Attributes:
      sources: In the order of the plan.
      names: What the config calls them.
      patch: Side of a patch in pixels.
      num_tokens, num_slots: L and N.
      num_labels: The most labels an image may have.
      codec: A name for `codec.choose`.
      tokenizer: Of the captions that images bring; None where they bring none.
      num_text: T; 0 where images bring no texts.
      pixel_classes: Whether images bring the classes of their pixels.
      teacher: Vectors that images bring; None where they bring none.
      rand_augment: A law of `rand_augment.build`; "" for none.
    """

    sources: tuple[Source, ...]
    names: tuple[str, ...]
    patch: int
    num_tokens: int
    num_slots: int
    num_labels: int
    codec: str = "auto"
    tokenizer: Tokenizer | None = None
    num_text: int = 0
    pixel_classes: bool = False
    teacher: TeacherOutputs | None = None
    rand_augment: str = ""

    def load(self, rows: Sequence[PlannedRow]) -> LoadedRows:
        """Loads every image of the rows; one that can not be used has no tokens."""
        loaded, skipped = [], []
        notes: collections.Counter[str] = collections.Counter()
        for row in rows:
            loaded.append(
                [self._image(row, i, skipped, notes) for i in range(len(row.index))]
            )
        info = {
            "keys": [[image.name for image in row] for row in loaded],
            "skipped": skipped,
            "shrunk": [
                images_[i].name
                for row, images_ in zip(rows, loaded, strict=True)
                for i in np.flatnonzero(row.shrunk)
            ],
            "notes": dict(notes),
        }
        return LoadedRows(loaded, info)

    def pack(self, rows: Sequence[Sequence[LoadedImage]]) -> PackedBatch:
        """Writes loaded rows into the arrays of a batch."""
        values = self.patch * self.patch * 3
        sizes = (self.num_tokens, self.num_slots, values, self.num_labels)
        width = self.teacher.width if self.teacher else 0
        return pack_rows(rows, *sizes, self.num_text, self.pixel_classes, width)

    def _image(
        self,
        row: PlannedRow,
        i: int,
        skipped: list[tuple[str, str]],
        notes: collections.Counter[str],
    ) -> LoadedImage:
        source, index = self.sources[row.source[i]], int(row.index[i])
        prefix = self.names[row.source[i]]
        try:
            record = source[index]
        except (OSError, images.BadImage) as error:
            reason = getattr(error, "reason", "unreadable")
            skipped.append((name := f"{prefix}:#{index}", reason))
            return self._unusable(row, i, name)
        name = f"{prefix}:{record.key}"
        text = self._text(record, row, i, name)
        rows, columns = grid = (int(row.grid[i, 0]), int(row.grid[i, 1]))
        target = rows * self.patch, columns * self.patch
        box, flip = tuple(row.box[i].tolist()), bool(row.flip[i])
        size = int(row.size[i, 0]), int(row.size[i, 1])
        try:
            pixels, odd = images.read(
                record.image,
                size,
                target,
                box=box,
                flip=flip,
                codec=self.codec,
            )
        except images.BadImage as error:
            skipped.append((name, error.reason))
            return self._unusable(row, i, name, text)
        notes.update(odd)
        if (row.jitter[i] != 1).any():
            pixels = images.jitter(pixels, *row.jitter[i].tolist())
        if self.rand_augment:
            pixels = augment(pixels, self.rand_augment, int(row.drop_key[i]))
        kept, chosen = int(row.kept[i]), None
        if kept < rows * columns:
            chosen = patches.keep_patches(rows * columns, kept, int(row.drop_key[i]))
        content, coords = patches.patchify(pixels, self.patch, chosen)
        classes = NO_CLASSES
        if self.pixel_classes:
            check_shape(record.objects, size, name)
            classes = draw_classes(record.objects, target, box, flip)[..., None]
            classes, _ = patches.patchify(classes, self.patch, chosen)
        vector = NO_VECTOR
        if self.teacher:
            vector = self.teacher.read(int(row.source[i]), index)
        return LoadedImage(
            patches=content,
            coords=coords,
            grid=grid,
            image_id=(int(row.source[i]), int(row.index[i])),
            labels=record.labels,
            name=name,
            text=text,
            classes=classes,
            teacher=vector,
        )

    def _text(self, record: Record, row: PlannedRow, i: int, name: str) -> np.ndarray:
        """The tokens of the caption that an image brings.

        Raises:
          DataError: they are not as many as planned.
        """
        caption, planned = int(row.caption[i]), int(row.text[i])
        if self.tokenizer is None or caption < 0:
            return NO_TEXT
        # A record may have lost captions since.
        found = [self.tokenizer.encode(text) for text in record.captions[caption:][:1]]
        if not found or len(found[0]) != planned:
            folder = getattr(self.sources[row.source[i]], "folder", "its folder")
            raise DataError(
                f"{name}: caption {caption} has {len(found[0]) if found else 0} tokens,"
                f" the table of caption lengths says {planned}: the data changed after "
                f"it was scanned; remove captions-*.npy in {folder} and in "
                f"{cache_folder() / 'captions'}, and start again"
            )
        return found[0]

    def _unusable(
        self, row: PlannedRow, i: int, name: str, text: np.ndarray = NO_TEXT
    ) -> LoadedImage:
        return LoadedImage(
            patches=np.zeros((0, self.patch * self.patch * 3), np.uint8),
            coords=np.zeros((0, 2), np.int32),
            grid=(0, 0),
            image_id=(int(row.source[i]), int(row.index[i])),
            labels=(),
            name=name,
            text=text,
        )
