"""A window of the stream as it is planned: images and the rows they share.

n images of a row, or all of a window.
"""

import dataclasses
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int64

from navit_jax.data.packers import assign_rows


class PlannedRow(NamedTuple):
    """The images of one row, in the order of their slots.

    Attributes:
      source: [n] int64, number of the source.
      index: [n] int64, index in the source.
      size: [n 2] the (height, width) in pixels of the size table; (0, 0) if unreadable,
        which is planned as one patch.
      box: [n 4] float64, (top, left, bottom, right) of the crop, in fractions of the
        sides; (0, 0, 1, 1) is the whole image.
      grid: [n 2] int64, (rows, columns) of patches before dropping.
      kept: [n] int64, tokens kept of grid.prod(1).
      drop_key: [n] uint64, chooses which.
      flip: [n] bool, whether to mirror left and right.
      jitter: [n 3] float64, factors of brightness, contrast and saturation; 1 is none.
      shrunk: [n] bool, planned below its drawn size to fit a row or the position table.
      images_seen: [n] int64, images of the stream before this one, failures included.
    """

    source: np.ndarray
    index: np.ndarray  # pyright: ignore[reportIncompatibleMethodOverride]
    size: np.ndarray
    box: np.ndarray
    grid: np.ndarray
    kept: np.ndarray
    drop_key: np.ndarray
    flip: np.ndarray
    jitter: np.ndarray
    shrunk: np.ndarray
    images_seen: np.ndarray


EMPTY = PlannedRow(
    source=np.zeros(0, np.int64),
    index=np.zeros(0, np.int64),
    size=np.zeros((0, 2), np.int64),
    box=np.zeros((0, 4)),
    grid=np.zeros((0, 2), np.int64),
    kept=np.zeros(0, np.int64),
    drop_key=np.zeros(0, np.uint64),
    flip=np.zeros(0, bool),
    jitter=np.zeros((0, 3)),
    shrunk=np.zeros(0, bool),
    images_seen=np.zeros(0, np.int64),
)


@dataclasses.dataclass(frozen=True, eq=False)
class PlannedWindow:
    """The rows of one window.

    Attributes:
      images: Of all rows, one row after the other.
      starts: Where each row begins in `images`, and in the end their number.
    """

    images: PlannedRow
    starts: Int64[np.ndarray, " S"]

    def __len__(self) -> int:
        """The number of rows."""
        return len(self.starts) - 1

    def row(self, number: int) -> PlannedRow:
        """One row, as views."""
        start, stop = self.starts[number], self.starts[number + 1]
        return PlannedRow(*(field[start:stop] for field in self.images))


def summarize(
    windows: list[PlannedWindow],
    num_tokens: int,
    num_slots: int,
    packer: str,
    num_sources: int,
) -> dict[str, Any]:
    """What the packing of some windows is like; see `Plan.report` for the entries."""
    rows = sum(len(window) for window in windows)
    kept = np.concatenate([window.images.kept for window in windows])
    shrunk = np.concatenate([window.images.shrunk for window in windows])
    source = np.concatenate([window.images.source for window in windows])
    used = np.concatenate([np.diff(window.starts) for window in windows])
    return {
        "rows": rows,
        "images": len(kept),
        "tokens": int(kept.sum()),
        "padding": 1 - int(kept.sum()) / (rows * num_tokens),
        "images_per_row": len(kept) / rows,
        "slot_use": len(kept) / (rows * num_slots),
        "full_rows": float((used == num_slots).mean()),
        "attention_work": float((kept**2).sum() / (rows * num_tokens**2)),
        "shrunk": int(shrunk.sum()),
        "source_shares": (
            np.bincount(source, minlength=num_sources) / len(source)
        ).tolist(),
        "enough_slots": enough_slots(
            windows[0].images.kept[np.argsort(windows[0].images.images_seen)],
            num_tokens,
            packer,
        ),
    }


def enough_slots(lengths: Int64[np.ndarray, " M"], num_tokens: int, packer: str) -> int:
    """The fewest image slots a row that cost less than 0.05 points of padding.

    Against rows with a slot for each of their tokens; found by bisection.
    """

    def padding(num_slots: int) -> float:
        rows = assign_rows(lengths[:, None], [num_tokens], num_slots, packer)
        return 1 - lengths.sum() / ((rows.max() + 1) * num_tokens)

    bound = padding(num_tokens) + 0.0005
    low, high = 0, num_tokens
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if padding(middle) < bound else (middle, high)
    return high
