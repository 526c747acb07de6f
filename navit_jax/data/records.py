"""The record of a picture, and what every source of pictures offers.

A source gives encoded bytes; decoding is `images.py`. It holds paths and settings only
and opens its files when first read: cheap to build, pickled into worker processes,
readable from several threads. Letters: M images.
"""

import dataclasses
import hashlib
import os
import pathlib
from collections.abc import Iterable
from typing import Protocol, runtime_checkable

import numpy as np

from navit_jax.errors import DataError


@dataclasses.dataclass(frozen=True)
class Objects:
    """The objects of a picture, where they are known.

    Attributes:
      instances: uint8 [h w], the number of the object at each pixel, from 1 in the
        order of `labels`; 0 is background.
      boxes: float32 [O 4], (top, left, bottom, right) of what is visible of each, in
        fractions of the picture's sides.
      labels: int32 [O], classes; -1 where there is none.
    """

    instances: np.ndarray
    boxes: np.ndarray
    labels: np.ndarray


@dataclasses.dataclass(frozen=True)
class Record:
    """One picture as it is stored.

    Attributes:
      key: Its name, unique in the source.
      image: The encoded file, of any format that `images.py` reads.
      labels: Class numbers, ascending; () where there is no label.
      captions: As they are stored; `tokenizer.py` says which are of use.
      objects: Of the upright picture; None where they are not known.
    """

    key: str
    image: bytes
    labels: tuple[int, ...] = ()
    captions: tuple[str, ...] = ()
    objects: Objects | None = None


@runtime_checkable
class Source(Protocol):
    """Random access to records. `docs/data.md` shows how to write a new one.

    `source[i]` raises OSError if the bytes cannot be had (the loader counts the
    picture), and DataError if the record breaks its contract (the run ends).
    """

    @property
    def name(self) -> str:
        """Names the source in messages and reports."""
        ...

    @property
    def class_names(self) -> tuple[str, ...]:
        """The classes by number; () when it has no labels."""
        ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Record: ...


@runtime_checkable
class StoredSource(Source, Protocol):
    """A source whose tables of sizes and captions can be kept from run to run."""

    @property
    def folder(self) -> str:
        """Where tables are kept: beside the data."""
        ...

    def fingerprint(self) -> str:
        """Hexadecimal; changes when records or their order may have; reads none."""
        ...


@dataclasses.dataclass(frozen=True, eq=False)
class Selection:
    """Some records of a source, which shares that source's tables.

    Attributes:
      whole: The source selected from.
      indices: int32 [M], places in `whole`.
      groups: int32 [M], the near-duplicate group of each, if known; never in two splits
        or in both parts of a fold. Resample groups, not pictures, for an interval.
      original_sizes: int32 [M 2], (h, w) before the long side was capped, if known.
    """

    whole: StoredSource
    indices: np.ndarray
    groups: np.ndarray | None = None
    original_sizes: np.ndarray | None = None

    @property
    def name(self) -> str:
        """As in Source, and so are the other members."""
        return self.whole.name

    @property
    def class_names(self) -> tuple[str, ...]:
        """The classes of the whole."""
        return self.whole.class_names

    @property
    def folder(self) -> str:
        """The folder of the whole."""
        return self.whole.folder

    def fingerprint(self) -> str:
        """Of the whole and of the choice."""
        return digest([self.whole.fingerprint(), self.indices.tolist()])

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Record:
        return self.whole[int(self.indices[index])]


def cache_folder() -> pathlib.Path:
    """Where downloads and full-size sets go: $NAVIT_JAX_CACHE or ~/.cache/navit_jax."""
    given = os.environ.get("NAVIT_JAX_CACHE")
    return pathlib.Path(given or "~/.cache/navit_jax").expanduser()


def digest(parts: Iterable[object]) -> str:
    """sha256 of the parts, one a line, in hexadecimal."""
    text = "\n".join(map(str, parts))
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()


def check_labels(labels: Iterable[int], num_classes: int, key: str) -> tuple[int, ...]:
    """Sorts the labels and removes repeats.

    Raises:
      DataError: a label is outside 0 .. num_classes - 1.
    """
    checked = tuple(sorted({int(label) for label in labels}))
    for label in checked:
        if not 0 <= label < num_classes:
            raise DataError(
                f"{key} has label {label}, outside 0..{num_classes - 1}; mend the "
                "record, or read the source without labels (label=None)"
            )
    return checked
