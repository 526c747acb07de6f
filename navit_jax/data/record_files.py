"""Writes sets of array_record files that TFDS opens, and goes on after a stop.

A file is written whole or not at all; a note beside it, `00000.json`, says what became
of its pictures. Letters: h w pixels.
"""

import collections
import dataclasses
import json
import pathlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
import tqdm
from array_record.python.array_record_module import ArrayRecordWriter
from etils import epath
from tensorflow_datasets.proto import tf_example_pb2

from navit_jax.data import prepared, sizes
from navit_jax.errors import ConfigError, DataError

SPLIT, VERSION = "all_pictures", "1.0.0"
# Pictures are compressed already, or hardly shrink and take long to unpack.
OPTIONS = "group_size:1,uncompressed"


@dataclasses.dataclass(frozen=True)
class Entry:
    """What became of one picture.

    Attributes:
      key: Its name.
      reason: Why it is left out, or "".
      example: The serialized tf.train.Example.
      size: (h, w), upright.
      note: What is counted of a picture that is not left out, or "".
    """

    key: str
    reason: str = ""
    example: bytes = b""
    size: tuple[int, int] = (0, 0)
    note: str = ""


@dataclasses.dataclass(frozen=True)
class Written:
    """A set that was written.

    Attributes:
      section: Of `config.data.sources`, which opens it.
      number: Of its pictures.
      skipped: (key, reason) of each picture that is left out.
      notes: How many of the others have which note.
    """

    section: dict[str, Any]
    number: int
    skipped: list[tuple[str, str]]
    notes: collections.Counter[str]

    def tell(self, folder: pathlib.Path, name: str) -> None:
        """Prints what is left out, what is there and how to open it, as `name`."""
        for key, reason in self.skipped:
            print(f"left out, {reason}: {key.encode('utf-8', 'replace').decode()}")
        counts = collections.Counter(reason for _, reason in self.skipped)
        noted = "".join(f"; {note}: {n}" for note, n in sorted(self.notes.items()))
        print(f"{self.number} pictures in {folder}; left out: {dict(counts)}{noted}")
        print(f"data.sources = {{{name!r}: {self.section}}}")


def make_example(
    key: str, image: bytes, captions: Iterable[bytes], labels: Iterable[int] = ()
) -> bytes:
    """The features that a set here has, serialized: equal pictures, equal bytes."""
    example = tf_example_pb2.Example()  # pyright: ignore[reportAttributeAccessIssue]
    feature = example.features.feature
    feature["image"].bytes_list.value.append(image)
    feature["caption"].bytes_list.value.extend(captions)
    feature["key"].bytes_list.value.append(key.encode("utf-8", "surrogateescape"))
    feature["label"].int64_list.value.extend(labels)
    return example.SerializeToString(deterministic=True)


def write_set(
    output: pathlib.Path,
    name: str,
    made: dict[str, Any],
    shards: Sequence[Callable[[], Iterable[Entry]]],
    ends: Sequence[int],
    bar: tqdm.tqdm,
    class_names: Sequence[str] = (),
) -> Written:
    """Writes the set with its table of sizes, or the files that are not there yet.

    Args:
      name: Of the set, in TFDS's sense.
      made: What it is made of, JSON-able; another is refused in the same folder.
      shards: For each file, what gives its entries, and advances the bar.
      ends: Where the bar stands after each file.

    Raises:
      ConfigError: the folder holds something else.
      DataError: no picture can be used.
    """
    _claim(output, made)
    folder = epath.Path(output / name / VERSION)
    folder.mkdir(parents=True, exist_ok=True)
    names = tfds.core.ShardedFileTemplate(
        data_dir=folder, dataset_name=name, filetype_suffix="array_record", split=SPLIT
    )
    done: list[dict[str, Any]] = []
    for number, (shard, end) in enumerate(zip(shards, ends, strict=True)):
        path = output / f"{number:05}.json"
        if not path.exists():
            file = names.sharded_filepath(shard_index=number, num_shards=len(shards))
            _write_json(path, _write_file(pathlib.Path(file), shard()))
        bar.update(end - bar.n)
        done.append(json.loads(path.read_text()))
    table = [size for one in done for size in one["sizes"]]
    skipped = [(key, reason) for one in done for key, reason in one["skipped"]]
    if not table:
        raise DataError(f"no picture of {bar.desc} can be used: {skipped[:8]}")
    _describe(class_names, folder, names, [len(one["sizes"]) for one in done])
    arguments: dict[str, Any] = {
        "dataset": name,
        "split": SPLIT,
        "data_dir": str(output),
        "label": "label" if class_names else None,
        "caption": "caption",
        "key": "key",
    }
    sizes.keep(prepared.tfds(**arguments), np.array(table, np.uint16))
    notes = collections.Counter[str]()
    for one in done:
        notes.update(one["notes"])
    return Written({"name": "tfds", **arguments}, len(table), skipped, notes)


def _claim(output: pathlib.Path, made: dict[str, Any]) -> None:
    """Says in the folder what is made there, or checks that it is the same."""
    path = output / "prepare.json"
    if not path.exists():
        try:
            if output.exists() and any(output.iterdir()):
                raise ConfigError(f"--output={output} is not empty: give a new folder")
            output.mkdir(parents=True, exist_ok=True)
            _write_json(path, made)
        except OSError as error:
            raise ConfigError(
                f"--output={output} can not be written: {error}"
            ) from error
    if (found := json.loads(path.read_text())) != made:
        raise ConfigError(
            f"--output={output} is begun, or done, as {found}, not as {made}: "
            "give a new folder, or remove that one"
        )


def _write_json(path: pathlib.Path, value: Any) -> None:
    """Writes JSON, whole or not at all."""
    part = path.with_suffix(".part")
    part.write_text(json.dumps(value))
    part.replace(path)


def _write_file(path: pathlib.Path, entries: Iterable[Entry]) -> dict[str, Any]:
    """Writes a file, whole or not at all; gives `sizes`, `skipped` and `notes`."""
    part, shapes, skipped = path.with_name("part"), [], []
    notes = collections.Counter[str]()
    writer = ArrayRecordWriter(str(part), OPTIONS)
    for entry in entries:
        if entry.reason:
            skipped.append((entry.key, entry.reason))
            continue
        writer.write(entry.example)
        shapes.append(entry.size)
        notes.update([entry.note] if entry.note else [])
    writer.close()
    part.replace(path)
    return {"sizes": shapes, "skipped": skipped, "notes": notes}


def _describe(
    class_names: Sequence[str],
    folder: epath.Path,
    names: tfds.core.ShardedFileTemplate,
    lengths: list[int],
) -> None:
    """Writes what TFDS wants to know of the files."""
    text = tfds.features.Text()
    features: dict[str, Any] = {"image": text, "key": text}
    features["caption"] = tfds.features.Sequence(text)
    if class_names:
        label = tfds.features.ClassLabel(names=list(class_names))
        features["label"] = tfds.features.Sequence(label)
    split = tfds.core.SplitInfo(
        name=SPLIT, shard_lengths=lengths, num_bytes=0, filename_template=names
    )
    tfds.folder_dataset.write_metadata(
        data_dir=folder,
        features=tfds.features.FeaturesDict(features),
        split_infos=[split],
        filename_template=names.replace(split=None),
        check_data=False,
    )
