"""The table of picture sizes of a source, scanned from headers once and kept.

Rows are planned from it, without reading a pixel. Letters: M images, h w pixels.
"""

import functools
from collections.abc import Callable

import numpy as np
from jaxtyping import UInt16

from navit_jax.data import images, tables
from navit_jax.data.composites import Composites
from navit_jax.data.folders import Folder
from navit_jax.data.padded import Padded
from navit_jax.data.records import Record, Selection, Source, StoredSource
from navit_jax.data.stored import Stored

# Raise it when `images.read_size` answers differently for the same bytes.
VERSION = 1

ReadSize = Callable[[bytes], tuple[int, int]]


def size_table(
    source: StoredSource, threads: int = 16, read_size: ReadSize = images.read_size
) -> UInt16[np.ndarray, "M 2"]:
    """The (h, w) of all pictures of the source, upright; see `tables.table`.

    (0, 0) where the bytes cannot be had or `read_size` refuses them, and where a side
    exceeds 65,535; their number is logged when they are scanned.

    Raises:
      DataError: a record breaks its contract, such as a label out of range.
    """
    if isinstance(source, Padded | Composites):
        return source.sizes
    if isinstance(source, Selection):
        return size_table(source.whole, threads, read_size)[source.indices]
    if isinstance(source, Folder | Stored):
        source = source.pictures()
    return tables.table(source, _kind(read_size), threads)


def keep(source: Stored, table: UInt16[np.ndarray, "M 2"]) -> UInt16[np.ndarray, "M 2"]:
    """As `tables.keep`."""
    return tables.keep(source, _kind(), table)


def scan(
    source: Source,
    threads: int,
    read_size: ReadSize = images.read_size,
    quiet: bool = False,
) -> tuple[UInt16[np.ndarray, "M 2"], int]:
    """As `tables.scan`."""
    return tables.scan(source, _kind(read_size), threads, quiet)


def _kind(read_size: ReadSize = images.read_size) -> tables.Kind:
    measure = functools.partial(_size, read_size)
    return tables.Kind("sizes", measure, "pictures have no usable size", VERSION, 2)


def _size(read_size: ReadSize, record: Record) -> tuple[int, int]:
    try:
        size = read_size(record.image)
    except images.BadImage:
        return 0, 0
    return size if max(size) <= np.iinfo(np.uint16).max else (0, 0)
