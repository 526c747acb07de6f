"""A window of the stream as it is planned: images and the rows they share.

n images of a row, or all of a window.
"""

import dataclasses
from collections.abc import Sequence
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
      caption: [n] int64, place in `Record.captions` of the one it brings; -1 for none.
      text: [n] int64, tokens of that caption; 0 without.
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
    caption: np.ndarray
    text: np.ndarray

    @property
    def lengths(self) -> Int64[np.ndarray, "n 2"]:
        """Tokens of image and text: what each needs of the budgets of a row."""
        return np.stack([self.kept, self.text], 1)


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
    caption=np.zeros(0, np.int64),
    text=np.zeros(0, np.int64),
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
    capacity: Sequence[int],
    num_slots: int,
    packer: str,
    num_sources: int,
) -> dict[str, Any]:
    """What the packing of some windows is like.

    Args:
      capacity: Image tokens of a row and, with captions, text tokens.

    Returns:
      `rows`, `images`, `tokens` counted; `padding`, a share of the tokens;
      `images_per_row`; `slot_use`, a share of the slots; `full_rows`, share of rows
      without a free slot; `attention_work`, sum of squared lengths over that of dense
      rows; `shrunk`, images that had to be; `source_shares`; `enough_slots`, the fewest
      that cost less than 0.05 points of padding. With captions also `text_tokens`
      counted; `text_padding`, a share of the text tokens; `enough_text`.
    """
    num_tokens = capacity[0]
    rows = sum(len(window) for window in windows)
    kept = np.concatenate([window.images.kept for window in windows])
    shrunk = np.concatenate([window.images.shrunk for window in windows])
    source = np.concatenate([window.images.source for window in windows])
    used = np.concatenate([np.diff(window.starts) for window in windows])
    first = windows[0].images
    lengths = first.lengths[np.argsort(first.images_seen), : len(capacity)]
    report = {
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
        "enough_slots": enough_slots(lengths, capacity, packer),
    }
    if len(capacity) > 1:
        text = sum(int(window.images.text.sum()) for window in windows)
        report["text_tokens"] = text
        report["text_padding"] = 1 - text / (rows * capacity[1])
        report["enough_text"] = enough_text(lengths, num_tokens, num_slots, packer)
    return report


def image_padding(
    lengths: Int64[np.ndarray, "M K"],
    capacity: Sequence[int],
    num_slots: int,
    packer: str,
) -> float:
    """The share of the image tokens that hold no image, packed in the order given."""
    rows = assign_rows(lengths, capacity, num_slots, packer)
    return 1 - int(lengths[:, 0].sum()) / ((int(rows.max()) + 1) * capacity[0])


def enough_slots(
    lengths: Int64[np.ndarray, "M K"], capacity: Sequence[int], packer: str
) -> int:
    """The fewest image slots a row that cost less than 0.05 points of padding.

    Against rows with a slot for each of their tokens; found by bisection.
    """
    bound = image_padding(lengths, capacity, capacity[0], packer) + 0.0005
    low, high = 0, capacity[0]
    while high - low > 1:
        middle = (low + high) // 2
        enough = image_padding(lengths, capacity, middle, packer) < bound
        low, high = (low, middle) if enough else (middle, high)
    return high


def enough_text(
    lengths: Int64[np.ndarray, "M 2"], num_tokens: int, num_slots: int, packer: str
) -> int:
    """The fewest text tokens a row, a multiple of 8, that pad few image tokens.

    Few are 1.5 %, or 0.1 points more than without texts if these are more: image tokens
    cost most, and text tokens that only spare a little more of them would be padding
    themselves. Found by bisection; no text is longer.
    """
    alone = image_padding(lengths[:, :1], [num_tokens], num_slots, packer)
    bound = max(0.015, alone + 0.001)
    longest = int(lengths[:, 1].max())
    # With the higher one every row has room for any texts.
    low, high = (longest - 1) // 8, -(-longest * num_slots // 8)
    while high - low > 1:
        middle = (low + high) // 2
        capacity = [num_tokens, 8 * middle]
        enough = image_padding(lengths, capacity, num_slots, packer) <= bound
        low, high = (low, middle) if enough else (middle, high)
    return 8 * high
