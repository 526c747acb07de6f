"""What became of each picture of a packed batch.

B rows, L tokens a row, N image slots a row.
"""

import os
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from navit_jax.batch import BatchInfo, PackedBatch
from navit_jax.data.bad_image import BadImage


class Result(NamedTuple):
    """What became of one picture.

    Attributes:
      place: Where it stands among the given ones.
      grid: (rows, columns) of its patches; (0, 0) of one that can not be used.
      value: The output, or the BadImage that says why there is none.
    """

    place: int
    grid: tuple[int, int]
    value: Any


def list_results(
    host: PackedBatch, info: BatchInfo, values: np.ndarray, by_token: bool
) -> Iterator[Result]:
    """The pictures of a batch, row by row.

    Args:
      values: [B N ...], or [B L ...] where they are `by_token`.
    """
    reasons = dict(info.skipped)
    for row, names in enumerate(info.keys):
        for slot, name in enumerate(names):
            index = int(host.image_ids[row, slot, 1])
            rows, columns = grid = tuple(host.grids[row, slot].tolist())
            if not host.image_mask[row, slot]:
                yield Result(index, grid, BadImage(reasons[name]))
            elif by_token:
                own = values[row, host.segment_ids[row] == slot + 1]
                yield Result(index, grid, own.reshape(rows, columns, -1))
            else:
                yield Result(index, grid, values[row, slot])


def stack(values: Sequence[np.ndarray], width: int) -> np.ndarray:
    """The values of several pictures; [0 width] of none."""
    return np.stack(values) if values else np.zeros((0, width), np.float32)


def describe(picture: Any) -> str:
    """What to call a given picture in a message."""
    return (
        str(picture)
        if isinstance(picture, str | os.PathLike)
        else type(picture).__name__
    )
