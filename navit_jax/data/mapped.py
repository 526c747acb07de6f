"""Tables that are mapped from files: they travel to other processes by name."""

import functools
import mmap
from collections.abc import Sequence
from typing import Any

import numpy as np


def by_name(tables: Sequence[np.ndarray]) -> list[Any]:
    """Each as how to map it again, if it is a whole mapped file; else as it is."""
    return [_place(table) for table in tables]


def map_again(tables: Sequence[Any]) -> list[Any]:
    """The tables of what `by_name` gave, in another process maybe."""
    return [table() if callable(table) else table for table in tables]


def _place(table: np.ndarray) -> Any:
    if not (isinstance(table, np.memmap) and isinstance(table.base, mmap.mmap)):
        return table
    place = (table.filename, table.dtype, "r", table.offset, table.shape)
    return functools.partial(np.memmap, *place)
