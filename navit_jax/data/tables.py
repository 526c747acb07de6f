"""Tables of what a scan finds in each record of a source, kept from run to run.

The sizes of pictures (`sizes.py`) and the lengths of captions (`captions.py`) are
such. Letters: M records, K numbers of each.
"""

import concurrent.futures
import dataclasses
import os
import pathlib
import tempfile
from collections.abc import Callable, Sequence

import numpy as np
import tqdm
from absl import logging
from jaxtyping import UInt16

from navit_jax.data.bad_image import BadImage
from navit_jax.data.records import Record, Source, StoredSource, cache_folder, digest

SAMPLE = 16
CHUNK = 64


@dataclasses.dataclass(frozen=True)
class Kind:
    """What is asked of every record.

    Attributes:
      name: Of the files, and of the progress bar.
      measure: The numbers of a record, each below 65,536; may be more of one record
        than of another, and the table ends them by zeros.
      lacking: How the log calls records that have none but zeros.
      version: Changes when `measure` answers differently for the same record.
      width: The least K.
      keys: Tell apart the tables of one kind that a source has.
    """

    name: str
    measure: Callable[[Record], Sequence[int]]
    lacking: str
    version: int
    width: int
    keys: tuple[object, ...] = ()


def table(source: StoredSource, kind: Kind, threads: int) -> UInt16[np.ndarray, "M K"]:
    """The numbers of all records.

    The first call reads every record, in parallel, and keeps the table beside the data,
    or in the cache folder where that cannot be written. Later calls map it into memory,
    after the source's fingerprint and SAMPLE records, read again, have agreed with it;
    else it is scanned again.
    """
    paths = _paths(source, kind)
    for path in paths:
        if (found := _load(path, source, kind)) is not None:
            return found
    for path in paths:
        for stale in path.parent.glob(_stem(source, kind) + "-*.npy"):
            logging.warning("%s no longer fits the data: scanning again", stale)
    found, unreadable = scan(source, kind, threads)
    if unreadable:
        # It may be for now only: a kept table would leave them out for ever.
        logging.warning(
            "%s: %d records could not be read; the table of %s is not kept",
            source.name,
            unreadable,
            kind.name,
        )
        return found
    return keep(source, kind, found)


def keep(
    source: StoredSource, kind: Kind, found: UInt16[np.ndarray, "M K"]
) -> UInt16[np.ndarray, "M K"]:
    """Writes the table where it will be looked for, and gives it, mapped if it can."""
    for path in _paths(source, kind):
        try:
            _save(path, found, _stem(source, kind))
        except OSError as error:
            logging.info("%s not kept in %s: %s", kind.name, path.parent, error)
        else:
            return np.load(path, mmap_mode="r")
    return found


def scan(
    source: Source, kind: Kind, threads: int, quiet: bool = False
) -> tuple[UInt16[np.ndarray, "M K"], int]:
    """Measures every record.

    Args:
      quiet: Without the progress bar and the line on records that have none but zeros.

    Returns:
      The table, and how many records could not be read; theirs are zeros.
    """
    unreadable: list[int] = []
    parts: dict[int, np.ndarray] = {}

    def measure(start: int) -> int:
        stop = min(start + CHUNK, len(source))
        found = []
        for index in range(start, stop):
            try:
                found.append(kind.measure(source[index]))
            except (OSError, BadImage):
                unreadable.append(index)
                found.append(())
        parts[start] = _pad(found)
        return stop - start

    with (
        concurrent.futures.ThreadPoolExecutor(threads) as pool,
        tqdm.tqdm(
            total=len(source),
            desc=f"{kind.name} of {source.name}",
            unit="img",
            disable=quiet,
        ) as bar,
    ):
        starts = range(0, len(source), CHUNK)
        futures = [pool.submit(measure, start) for start in starts]
        try:
            for future in concurrent.futures.as_completed(futures):
                bar.update(future.result())
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    width = max([kind.width, *(part.shape[1] for part in parts.values())])
    found = np.zeros((len(source), width), np.uint16)
    for start, part in parts.items():
        found[start : start + len(part), : part.shape[1]] = part
    lacking = int((found == 0).all(1).sum())
    if lacking and not quiet:
        logging.warning("%s: %d %s", source.name, lacking, kind.lacking)
    return found, len(unreadable)


def _pad(rows: Sequence[Sequence[int]]) -> np.ndarray:
    padded = np.zeros((len(rows), max(map(len, rows))), np.uint16)
    for row, numbers in zip(padded, rows, strict=True):
        row[: len(numbers)] = numbers
    return padded


def _stem(source: StoredSource, kind: Kind) -> str:
    """Differs between the sources that share a folder, and between their tables."""
    return f"{kind.name}-{digest([source.name, *kind.keys])[:8]}"


def _paths(source: StoredSource, kind: Kind) -> list[pathlib.Path]:
    """Where the table may lie. Its name holds the fingerprint, so it is one file."""
    contents = digest([kind.version, source.fingerprint()])[:16]
    name = f"{_stem(source, kind)}-{contents}.npy"
    elsewhere = digest([os.path.abspath(source.folder)])[:16]
    return [
        pathlib.Path(source.folder) / name,
        cache_folder() / kind.name / elsewhere / name,
    ]


def _load(path: pathlib.Path, source: StoredSource, kind: Kind) -> np.ndarray | None:
    """The table at `path`, or None if there is none or it does not fit the data."""
    try:
        found = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    if found.ndim != 2 or len(found) != len(source) or found.dtype != np.uint16:
        return None
    # The same records on every host, so that all hosts judge alike.
    sample = np.random.default_rng(len(source)).integers(len(source), size=SAMPLE)
    for index in sample.tolist():
        numbers = list(kind.measure(source[index]))
        if found[index].tolist() != numbers + [0] * (found.shape[1] - len(numbers)):
            return None
    return found


def _save(path: pathlib.Path, found: np.ndarray, stem: str) -> None:
    """Writes the table whole or not at all, and removes its stale ones."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=stem) as folder:
        np.save(pathlib.Path(folder, path.name), found)
        os.replace(pathlib.Path(folder, path.name), path)
    for stale in path.parent.glob(stem + "-*.npy"):
        if stale != path:
            stale.unlink()
