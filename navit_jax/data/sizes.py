"""The table of picture sizes of a source, scanned from headers once and kept.

Rows are planned from it, without reading a pixel. Letters: M images, h w pixels.
"""

import concurrent.futures
import os
import pathlib
import tempfile
from collections.abc import Callable

import numpy as np
import tqdm
from absl import logging
from jaxtyping import UInt16

from navit_jax.data import folders, images
from navit_jax.data.padded import Padded
from navit_jax.data.records import (
    Selection,
    Source,
    StoredSource,
    cache_folder,
    digest,
)

# Raise it when `images.read_size` answers differently for the same bytes.
VERSION = 1
SAMPLE = 16
CHUNK = 64

ReadSize = Callable[[bytes], tuple[int, int]]


def size_table(
    source: StoredSource, threads: int = 16, read_size: ReadSize = images.read_size
) -> UInt16[np.ndarray, "M 2"]:
    """The (h, w) of all pictures of the source, upright.

    (0, 0) where the bytes cannot be had or `read_size` refuses them, and where a side
    exceeds 65,535; their number is logged. The first call reads every header, in
    parallel, and keeps the table beside the data, or in the cache folder where that
    cannot be written. Later calls map it into memory, after the source's fingerprint
    and SAMPLE records, read again, have agreed with it; else it is scanned again.

    Raises:
      DataError: a record breaks its contract, such as a label out of range.
    """
    if isinstance(source, Padded):
        return source.sizes
    if isinstance(source, Selection):
        return size_table(source.whole, threads, read_size)[source.indices]
    paths = _paths(source)
    for path in paths:
        if (table := _load(path, source, read_size)) is not None:
            return table
    for path in paths:
        for stale in path.parent.glob(_stem(source) + "-*.npy"):
            logging.warning("%s no longer fits the data: scanning again", stale)
    table, unreadable = scan(source, threads, read_size)
    if unreadable:
        # It may be for now only: a kept table would leave them out for ever.
        logging.warning(
            "%s: %d pictures could not be read; the size table is not kept",
            source.name,
            unreadable,
        )
        return table
    return keep(source, table)


def keep(
    source: StoredSource, table: UInt16[np.ndarray, "M 2"]
) -> UInt16[np.ndarray, "M 2"]:
    """Writes the table where it will be looked for, and gives it, mapped if it can."""
    for path in _paths(source):
        try:
            _save(path, table, _stem(source))
        except OSError as error:
            logging.info("size table not kept in %s: %s", path.parent, error)
        else:
            return np.load(path, mmap_mode="r")
    return table


def scan(
    source: Source,
    threads: int,
    read_size: ReadSize = images.read_size,
    quiet: bool = False,
) -> tuple[UInt16[np.ndarray, "M 2"], int]:
    """Reads the size of every picture from its header, with a progress bar.

    Args:
      quiet: Without the bar and without the line on those that have no size.

    Returns:
      The table, and how many pictures could not be read at all.
    """
    unreadable: list[int] = []
    starts = range(0, len(source), CHUNK)
    table = np.zeros((len(source), 2), np.uint16)

    def fill(start: int) -> int:
        stop = min(start + CHUNK, len(source))
        for index in range(start, stop):
            try:
                table[index] = _size(source, index, read_size)
            except OSError:
                unreadable.append(index)
        return stop - start

    with (
        concurrent.futures.ThreadPoolExecutor(threads) as pool,
        tqdm.tqdm(
            total=len(source),
            desc=f"sizes of {source.name}",
            unit="img",
            disable=quiet,
        ) as bar,
    ):
        futures = [pool.submit(fill, start) for start in starts]
        try:
            for future in concurrent.futures.as_completed(futures):
                bar.update(future.result())
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    refused = int((table == 0).all(1).sum())
    if refused and not quiet:
        logging.warning("%s: %d pictures have no usable size", source.name, refused)
    return table, len(unreadable)


def _size(source: Source, index: int, read_size: ReadSize) -> tuple[int, int]:
    try:
        size = read_size(source[index].image)
    except images.BadImage:
        return 0, 0
    return size if max(size) <= np.iinfo(np.uint16).max else (0, 0)


def _stem(source: StoredSource) -> str:
    """Differs between the sources that share a folder."""
    return f"{folders.TABLE}{digest([source.name])[:8]}"


def _paths(source: StoredSource) -> list[pathlib.Path]:
    """Where the table may lie. Its name holds the fingerprint, so it is one file."""
    name = f"{_stem(source)}-{digest([VERSION, source.fingerprint()])[:16]}.npy"
    elsewhere = digest([os.path.abspath(source.folder)])[:16]
    return [
        pathlib.Path(source.folder) / name,
        cache_folder() / "sizes" / elsewhere / name,
    ]


def _load(
    path: pathlib.Path, source: StoredSource, read_size: ReadSize
) -> np.ndarray | None:
    """The table at `path`, or None if there is none or it does not fit the data."""
    try:
        table = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    if table.shape != (len(source), 2) or table.dtype != np.uint16:
        return None
    # The same records on every host, so that all hosts judge alike.
    sample = np.random.default_rng(len(source)).integers(len(source), size=SAMPLE)
    for index in sample.tolist():
        if tuple(table[index]) != _size(source, index, read_size):
            return None
    return table


def _save(path: pathlib.Path, table: np.ndarray, stem: str) -> None:
    """Writes the table whole or not at all, and removes its stale ones."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=stem) as folder:
        np.save(pathlib.Path(folder, path.name), table)
        os.replace(pathlib.Path(folder, path.name), path)
    for stale in path.parent.glob(stem + "-*.npy"):
        if stale != path:
            stale.unlink()
