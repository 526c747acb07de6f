"""Stores the pictures of a source as pixels, smaller, to be read without decoding.

`python -m navit_jax.data.prepare --config=configs/smoke.py --source=clipart --side=256
--output=/data/small` writes a TFDS set of array_record files, and prints the section of
a config that opens it. Called again after a stop, it goes on.
"""

import collections
import concurrent.futures
import dataclasses
import functools
import io
import itertools
import json
import os
import pathlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
import tqdm
from absl import flags
from array_record.python.array_record_module import ArrayRecordWriter
from etils import epath
from tensorflow_datasets.proto import tf_example_pb2

from navit_jax import command_line, models
from navit_jax import config as config_lib
from navit_jax.data import codec as codecs
from navit_jax.data import images, open_sources, prepared, resolution, sizes
from navit_jax.data.records import StoredSource
from navit_jax.errors import ConfigError, DataError

NAME, SPLIT, VERSION = "pixels", "all_pictures", "1.0.0"
# Pictures of a file: at side 256 a third of a gigabyte.
SHARD = 2048
# Of these so many may wait in memory to be written.
CHUNK = 256
# Pixels hardly shrink, and unpacking them takes longer than all else.
OPTIONS = "group_size:1,uncompressed"


@dataclasses.dataclass(frozen=True)
class Small:
    """What became of one picture.

    Attributes:
      key: Its name.
      reason: Why it is left out, or "".
      example: The serialized tf.train.Example.
      size: (h, w) as stored.
    """

    key: str
    reason: str = ""
    example: bytes = b""
    size: images.Size = (0, 0)


def shrink(
    source: StoredSource, side: float | int, patch: int, codec: str, index: int
) -> Small:
    """Makes of a picture what a plan at that side would, without enlarging it."""
    try:
        record = source[index]
    except OSError:
        return Small(f"#{index}", "unreadable")
    try:
        size = images.read_size(record.image)
        sides = np.array([float(side)])
        grid = resolution.grids(np.array([size]), sides, patch, upscale=False)[0]
        height, width = (patch * grid).tolist()
        pixels, _ = images.read(record.image, size, (height, width), codec=codec)
    except images.BadImage as error:
        return Small(record.key, error.reason)
    file = io.BytesIO()
    np.save(file, np.ascontiguousarray(pixels), allow_pickle=False)
    example = tf_example_pb2.Example()  # pyright: ignore[reportAttributeAccessIssue]
    feature = example.features.feature
    feature["image"].bytes_list.value.append(file.getvalue())
    captions = [text.encode("utf-8", "surrogatepass") for text in record.captions]
    feature["caption"].bytes_list.value.extend(captions)
    key = record.key.encode("utf-8", "surrogateescape")
    feature["key"].bytes_list.value.append(key)
    feature["label"].int64_list.value.extend(record.labels)
    data = example.SerializeToString(deterministic=True)
    return Small(record.key, "", data, (height, width))


def prepare(
    source: StoredSource,
    output: pathlib.Path,
    side: float | int,
    patch: int,
    codec: str = "auto",
    threads: int | None = None,
) -> tuple[dict[str, Any], list[tuple[str, str]]]:
    """Writes the set, or the files of it that are not there yet.

    Returns:
      The section of `config.data.sources` that opens it, and (key, reason) of each
      picture that is left out.

    Raises:
      ConfigError: the folder holds something else.
      DataError: no picture can be used.
    """
    codecs.choose(codec)
    made = {
        "source": [source.name, source.fingerprint(), len(source)],
        "codec": [codec, codecs.versions()],
        "side": side,
        "patch": patch,
        "shard": SHARD,
    }
    _claim(output, made)
    folder = epath.Path(output / NAME / VERSION)
    folder.mkdir(parents=True, exist_ok=True)
    names = tfds.core.ShardedFileTemplate(
        data_dir=folder, dataset_name=NAME, filetype_suffix="array_record", split=SPLIT
    )
    starts = range(0, len(source), SHARD)
    notes = []
    with (
        concurrent.futures.ThreadPoolExecutor(threads or os.cpu_count()) as pool,
        tqdm.tqdm(total=len(source), desc=f"{source.name}", unit="img") as bar,
    ):
        for number, start in enumerate(starts):
            indices = range(start, min(start + SHARD, len(source)))
            note = output / f"{number:05}.json"
            if not note.exists():
                name = names.sharded_filepath(
                    shard_index=number, num_shards=len(starts)
                )
                one = functools.partial(shrink, source, side, patch, codec)
                many = map(functools.partial(pool.map, one), _chunks(indices))
                _write(note, _write_file(pathlib.Path(name), many, bar.update))
            bar.update(indices.stop - bar.n)
            notes.append(json.loads(note.read_text()))
    table = [size for note in notes for size in note["sizes"]]
    if not table:
        raise DataError(f"no picture of {source.name} can be used: {notes[0]}")
    _describe(source.class_names, folder, names, [len(n["sizes"]) for n in notes])
    arguments: dict[str, Any] = {
        "dataset": NAME,
        "split": SPLIT,
        "data_dir": str(output),
        "label": "label" if source.class_names else None,
        "caption": "caption",
        "key": "key",
    }
    sizes.keep(prepared.tfds(**arguments), np.array(table, np.uint16))
    bad = [(key, reason) for note in notes for key, reason in note["skipped"]]
    return {"name": "tfds", **arguments}, bad


def _claim(output: pathlib.Path, made: dict[str, Any]) -> None:
    """Says in the folder what is made there, or checks that it is the same."""
    path = output / "prepare.json"
    if not path.exists():
        if output.exists() and any(output.iterdir()):
            raise ConfigError(f"--output={output} is not empty: give a new folder")
        output.mkdir(parents=True, exist_ok=True)
        _write(path, made)
    if (found := json.loads(path.read_text())) != made:
        raise ConfigError(
            f"--output={output} is begun, or done, as {found}, not as {made}: "
            "give a new folder, or remove that one"
        )


def _write(path: pathlib.Path, value: Any) -> None:
    """Writes JSON, whole or not at all."""
    part = path.with_suffix(".part")
    part.write_text(json.dumps(value))
    part.replace(path)


def _chunks(indices: range) -> Iterator[range]:
    """So many at a time as may wait in memory to be written."""
    return (indices[i : i + CHUNK] for i in range(0, len(indices), CHUNK))


def _write_file(
    path: pathlib.Path,
    many: Iterable[Iterable[Small]],
    advance: Callable[[int], object],
) -> dict[str, Any]:
    """Writes a file, whole or not at all; gives `sizes` and what was `skipped`."""
    part, shapes, skipped = path.with_name("part"), [], []
    writer = ArrayRecordWriter(str(part), OPTIONS)
    for small in itertools.chain.from_iterable(many):
        if small.reason:
            skipped.append((small.key, small.reason))
        else:
            writer.write(small.example)
            shapes.append(small.size)
        advance(1)
    writer.close()
    part.replace(path)
    return {"sizes": shapes, "skipped": skipped}


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


def define_main() -> Callable[[], int]:
    """Defines the flags, and returns what reads them and prepares."""
    config = command_line.define_config()
    name = flags.DEFINE_string("source", None, "One of data.sources", required=True)
    output = flags.DEFINE_string("output", None, "A new folder", required=True)
    side = flags.DEFINE_float(
        "side",
        None,
        "Pixels: of a square of equal area; none is enlarged",
        lower_bound=1,
        required=True,
    )
    codec = flags.DEFINE_string("codec", "auto", "As data.codec")

    def main() -> int:
        resolved = config_lib.resolve(config.value)
        sections = resolved["data"]["sources"]
        if name.value not in sections:
            hint = config_lib.nearest(name.value, sections)
            raise ConfigError(f"--source={name.value}: {hint}")
        (source,), _ = open_sources({name.value: sections[name.value]})
        patch = models.patch_size(resolved["model"]["size"])
        folder = pathlib.Path(output.value).expanduser().absolute()
        section, bad = prepare(source, folder, side.value, patch, codec.value)
        for key, reason in bad:
            print(f"left out, {reason}: {key}")
        counts = collections.Counter(reason for _, reason in bad)
        print(
            f"{len(source) - len(bad)} pictures in {folder}; left out: {dict(counts)}"
        )
        print(f"data.sources = {{{name.value!r}: {section}}}")
        return 0

    return main


if __name__ == "__main__":
    command_line.run(define_main())
