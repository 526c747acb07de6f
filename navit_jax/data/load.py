"""Reads the images of planned rows: record, decode, patchify, drop, in one place.

n tokens of one image.
"""

import collections
import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from navit_jax.batch import PackedBatch
from navit_jax.data import images, patches
from navit_jax.data.pack import LoadedImage, pack_rows
from navit_jax.data.records import Source
from navit_jax.data.window import PlannedRow


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
    """

    sources: tuple[Source, ...]
    names: tuple[str, ...]
    patch: int
    num_tokens: int
    num_slots: int
    num_labels: int
    codec: str = "auto"

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
        return pack_rows(rows, self.num_tokens, self.num_slots, values, self.num_labels)

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
        rows, columns = grid = (int(row.grid[i, 0]), int(row.grid[i, 1]))
        try:
            pixels, odd = images.read(
                record.image,
                (int(row.size[i, 0]), int(row.size[i, 1])),
                (rows * self.patch, columns * self.patch),
                box=tuple(row.box[i].tolist()),
                flip=bool(row.flip[i]),
                codec=self.codec,
            )
        except images.BadImage as error:
            skipped.append((name, error.reason))
            return self._unusable(row, i, name)
        notes.update(odd)
        if (row.jitter[i] != 1).any():
            pixels = images.jitter(pixels, *row.jitter[i].tolist())
        kept, chosen = int(row.kept[i]), None
        if kept < rows * columns:
            chosen = patches.keep_patches(rows * columns, kept, int(row.drop_key[i]))
        content, coords = patches.patchify(pixels, self.patch, chosen)
        return LoadedImage(
            patches=content,
            coords=coords,
            grid=grid,
            image_id=(int(row.source[i]), int(row.index[i])),
            labels=record.labels,
            name=name,
        )

    def _unusable(self, row: PlannedRow, i: int, name: str) -> LoadedImage:
        return LoadedImage(
            patches=np.zeros((0, self.patch * self.patch * 3), np.uint8),
            coords=np.zeros((0, 2), np.int32),
            grid=(0, 0),
            image_id=(int(row.source[i]), int(row.index[i])),
            labels=(),
            name=name,
        )
