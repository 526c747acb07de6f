"""Pictures in array_record files: a record is a tf.train.Example, or the picture.

TensorFlow is not needed. Of an example only the features asked for are taken.
"""

import dataclasses
import functools
import glob
import os
from collections.abc import Iterable, Sequence
from typing import Any

from array_record.python.array_record_data_source import ArrayRecordDataSource
from tensorflow_datasets.proto import tf_example_pb2

from navit_jax.data.masks import read_mask
from navit_jax.data.records import Objects, Record, check_labels, digest
from navit_jax.errors import ConfigError, DataError


@dataclasses.dataclass(frozen=True)
class Stored:
    """A source in such files, as `array_record` and `prepared.py` open it.

    Attributes:
      name: Names the source in messages.
      folder: Holds the files and their tables.
      parts: (file, first record, number of records) in order.
      image, label, caption, key: Features; None: there is none. Without `image` the
        record is the encoded picture itself.
      class_names: The classes by number; () when it has no labels.
      stamp: Changes when the files may have.
      mask: A feature with the classes of pixels, as `masks.read_mask` reads them; None.
    """

    name: str
    folder: str
    parts: tuple[tuple[str, int, int], ...]
    image: str | None
    label: str | None
    caption: str | None
    key: str | None
    class_names: tuple[str, ...]
    stamp: str
    mask: str | None = None

    def fingerprint(self) -> str:
        """The stamp, taken when the source was opened."""
        return self.stamp

    @functools.cached_property
    def _records(self) -> ArrayRecordDataSource:
        parts = [f"{path}[{start}:{start + n}]" for path, start, n in self.parts]
        return ArrayRecordDataSource(parts)

    def pictures(self) -> "Stored":
        """It without masks, which a scan of sizes need not decode."""
        return dataclasses.replace(self, mask=None)

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Record:
        if not 0 <= index < len(self):
            raise IndexError(index)
        key = f"{self.name}/{index}"
        try:
            raw = self._records[index]
        except RuntimeError as error:
            raise OSError(f"{key} cannot be read: {error}") from error
        if self.image is None:
            return Record(key, raw)
        wanted = (self.image, self.label, self.caption, self.key, self.mask)
        found = _read_example(raw, wanted, key, self.caption)
        image, labels, captions, keys, masks = found
        if len(image) != 1:
            raise DataError(f"{key} has {len(image)} values in {self.image!r}, not 1")
        key = _decode(keys[0]) if keys and keys[0] else key
        labels = check_labels(labels, len(self.class_names), f"{self.name}: {key}")
        if captions and not isinstance(captions[0], bytes):
            raise DataError(f"{key} has numbers in {self.caption!r}, which are no text")
        objects = self._read_mask(masks[0], key) if masks else None
        return Record(key, image[0], labels, tuple(map(_decode, captions)), objects)

    def _read_mask(self, mask: bytes, key: str) -> Objects:
        objects = read_mask(mask, f"{self.name}: {key}")
        known = objects.labels[objects.labels >= 0]
        check_labels(known.tolist(), len(self.class_names), f"{self.name}: {key}, mask")
        return objects


def _read_example(
    raw: bytes, features: Sequence[str | None], key: str, optional: str | None
) -> list[list[Any]]:
    """The values of the features of a serialized tf.train.Example; [] for None.

    The `optional` feature may be absent, which is as if it had no value.
    """
    try:
        example = tf_example_pb2.Example  # pyright: ignore[reportAttributeAccessIssue]
        stored = example.FromString(raw).features.feature
    except Exception as error:  # The classes of protobuf differ by its backend.
        raise DataError(f"{key} is no tf.train.Example: {error}") from error
    values = []
    for name in features:
        if name is None or (name == optional and name not in stored):
            values.append([])
            continue
        if name not in stored:
            raise DataError(f"{key} has no feature {name!r}, only {sorted(stored)}")
        kind = stored[name].WhichOneof("kind")
        values.append(list(getattr(stored[name], kind).value) if kind else [])
    return values


def _decode(text: bytes) -> str:
    return text.decode("utf-8", "replace")


def array_record(
    paths: str | Iterable[str],
    image: str | None = None,
    label: str | None = None,
    caption: str | None = None,
    key: str | None = None,
    num_classes: int = 0,
    mask: str | None = None,
) -> Stored:
    """Opens array_record files that hold pictures, or tf.train.Examples with pictures.

    Args:
      paths: Files or patterns ("/data/photos-*.array_record"), in this order; the
        matches of a pattern are sorted.
      image: The bytes feature of the examples that holds the encoded picture; None:
        each record is an encoded picture, and nothing else.
      label: An int64 feature, one or several values; needs `num_classes`.
      caption: A bytes feature with UTF-8 text, one or several values; a record without
        it has no caption.
      key: A bytes feature that names the record.
      num_classes: Labels are 0 .. num_classes - 1.
      mask: A bytes feature, the PNG of `masks.read_mask`; needs `num_classes`.

    Raises:
      ConfigError: no file matches, a file is no array_record, all are empty, or the
        arguments do not fit together.
    """
    if image is None and (label or caption or key or mask):
        raise ConfigError(
            "label, caption, key and mask need image: the feature beside them"
        )
    if bool(label or mask) != (num_classes > 0):
        given = f"label={label!r}" + (f", mask={mask!r}" if mask else "")
        raise ConfigError(f"{given} and num_classes={num_classes}: give both")
    patterns = [paths] if isinstance(paths, str) else list(paths)
    parts = []
    for pattern in patterns:
        found = sorted(glob.glob(os.path.expanduser(pattern)))
        if not found:
            raise ConfigError(f"paths: no file matches {pattern!r}")
        for path in found:
            try:
                parts.append((path, 0, len(ArrayRecordDataSource(path))))
            except (RuntimeError, ValueError) as error:
                raise ConfigError(f"{path} is no array_record file: {error}") from error
    if not sum(number for _, _, number in parts):
        raise ConfigError(f"paths={patterns} hold no record")
    files = [(os.path.basename(path), os.stat(path)) for path, _, _ in parts]
    return Stored(
        name=files[0][0] + (f"+{len(files) - 1}" if len(files) > 1 else ""),
        folder=os.path.dirname(os.path.abspath(parts[0][0])),
        parts=tuple(parts),
        image=image,
        label=label,
        caption=caption,
        key=key,
        class_names=tuple(map(str, range(num_classes))),
        stamp=digest([image, *((f, s.st_size, s.st_mtime_ns) for f, s in files)]),
        mask=mask,
    )
