"""Builds the embedded set `clipart` from Debian's openclipart packages.

`python -m navit_jax.data.builders.clipart` rebuilds the set in the package;
`--check` rebuilds it in a temporary folder and compares checksums; `--full` builds
the pictures at full size into the cache folder. Two minutes and 2.2 GB of memory on
one core.
"""

import argparse
import hashlib
import io
import json
import os
import pathlib
import shutil
import tempfile
from collections.abc import Iterator
from typing import Any

import numpy as np
import PIL
import tensorflow_datasets as tfds
import tqdm
from array_record.python.array_record_data_source import ArrayRecordDataSource
from array_record.python.array_record_module import ArrayRecordWriter
from PIL import Image
from tensorflow_datasets.proto import tf_example_pb2

from navit_jax import command_line
from navit_jax.data import sizes, sources
from navit_jax.data.builders import captions, classes, debian, groups, openclipart
from navit_jax.errors import ConfigError, DataError

# Long side of the embedded pictures: as WebP of quality 80 the set stays below 12 MB,
# which neither PNG nor JPEG does at a side that shows what is drawn.
SIDE = 176
# A larger picture is no use to anyone and most readers refuse it; 14 are above.
FULL_SIDE = 4096


def encode(image: Image.Image, *, lossless: bool) -> bytes:
    """Encodes as lossless PNG, or as WebP of quality 80."""
    data = io.BytesIO()
    if lossless:
        image.save(data, "PNG")
    else:
        image.save(data, "WEBP", quality=80, method=6)
    return data.getvalue()


def make_examples(root: pathlib.Path, side: int, *, lossless: bool) -> list[dict]:
    """Makes all examples of the set but splits nothing yet; sorted by key."""
    examples, hashes, refused = [], [], []
    entries = openclipart.list_entries(root)
    for entry in tqdm.tqdm(entries, desc="pictures", unit="img"):
        picture = openclipart.read_picture(root / "png" / entry.key)
        if picture is None:
            refused.append(entry.key)
            continue
        hashes.append(openclipart.difference_hash(picture))
        metadata = (root / "svg" / entry.key).with_suffix(".svg")
        examples.append(
            {
                "key": entry.key,
                "image": encode(openclipart.shrink(picture, side), lossless=lossless),
                "classes8": classes.labels_of(entry.categories, classes.CLASSES8),
                "classes34": classes.labels_of(entry.categories, classes.CLASSES34),
                "caption": captions.write_caption(
                    entry.key, *captions.read_metadata(metadata)
                ),
                "original_size": [picture.height, picture.width],
            }
        )
    for example, group in zip(examples, groups.group_by_hash(hashes), strict=True):
        example["group"] = int(group)
    print(f"{len(examples)} pictures; invisible or too large: {refused}")
    return examples


class Clipart(tfds.core.GeneratorBasedBuilder):
    """The openclipart pictures on white, split by near-duplicate group."""

    VERSION = tfds.core.Version("1.0.0")
    BUILDER_CONFIGS = (
        tfds.core.BuilderConfig(name="embedded", description=f"long side {SIDE}"),
        tfds.core.BuilderConfig(name="full", description=f"long side {FULL_SIDE}"),
    )
    MANUAL_DOWNLOAD_INSTRUCTIONS = "The unpacked openclipart folder with png and svg."

    def _info(self) -> tfds.core.DatasetInfo:
        names = {"classes8": classes.CLASSES8, "classes34": classes.CLASSES34}
        labels = {
            field: tfds.features.Sequence(tfds.features.ClassLabel(names=list(known)))
            for field, known in names.items()
        }
        return tfds.core.DatasetInfo(
            builder=self,
            description="openclipart 0.18, cut to the alpha box, on white.",
            license="Public domain",
            features=tfds.features.FeaturesDict(
                {
                    "key": tfds.features.Text(),
                    "image": tfds.features.Image(shape=(None, None, 3)),
                    "caption": tfds.features.Text(),
                    "group": np.int32,
                    "original_size": tfds.features.Tensor(shape=(2,), dtype=np.int32),
                    **labels,
                }
            ),
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator]:
        full = self.builder_config is not None and self.builder_config.name == "full"
        examples = make_examples(
            pathlib.Path(dl_manager.manual_dir),
            FULL_SIDE if full else SIDE,
            lossless=full,
        )
        first = {e["group"]: e["key"] for e in reversed(examples)}
        parts: dict[str, list[dict]] = {split: [] for split in groups.SPLITS}
        for example in examples:
            parts[groups.split_of(first[example["group"]])].append(example)
        return {split: self._generate_examples(p) for split, p in parts.items()}

    def _generate_examples(self, examples: list[dict]) -> Iterator:
        for example in examples:
            yield example["key"], example


def build(packages: list[pathlib.Path], target: pathlib.Path, config: str) -> None:
    """Builds a set from the package files and replaces the folder `target` by it."""
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        debian.unpack(packages, folder)
        root = folder / "usr" / "share" / "openclipart"
        builder = Clipart(
            data_dir=folder / "tfds", config=config, file_format="array_record"
        )
        builder.download_and_prepare(
            download_config=tfds.download.DownloadConfig(manual_dir=root)
        )
        prepared = pathlib.Path(builder.data_dir)
        order_features(prepared)
        write_index(prepared)
        sizes.size_table(sources.clipart("all", labels="none", path=str(prepared)))
        (prepared / "checksums.json").write_text(
            json.dumps(checksums(prepared), indent=1) + "\n"
        )
        if target.exists():
            shutil.rmtree(target)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copytree(prepared, target)


def order_features(prepared: pathlib.Path) -> None:
    """Writes the features of each record in sorted order.

    TFDS leaves their order to protobuf, which changes it from process to process.
    """
    for path in sorted(prepared.glob("*.array_record-*")):
        records = list(ArrayRecordDataSource(str(path)))
        writer = ArrayRecordWriter(str(path), "group_size:1")
        for record in records:
            example = tf_example_pb2.Example.FromString(record)  # pyright: ignore[reportAttributeAccessIssue]
            writer.write(example.SerializeToString(deterministic=True))
        writer.close()


def write_index(prepared: pathlib.Path) -> None:
    """Writes what a source needs of all records at once, in the order of the splits.

    `index.npz`: split, fold (uint8), group (int32), classes8, classes34 (bool: has a
    label of that set), all [M]; original_sizes int32 [M 2].
    """
    columns: dict[str, list] = {}
    first: dict[int, str] = {}
    rows: list[tuple[int, Any]] = []
    for number, split in enumerate(groups.SPLITS):
        builder: Any = tfds.builder_from_directory(prepared)
        data: Any = builder.as_data_source(
            split, decoders={"image": tfds.decode.SkipDecoding()}
        )
        rows += [(number, row) for row in data]
    for _, row in rows:
        key, group = row["key"].decode(), row["group"]
        first[group] = min(key, first.get(group, key))
    for number, row in rows:
        fold = groups.fold_of(first[row["group"]])
        for name, value in {
            "split": np.uint8(number),
            "fold": np.uint8(fold),
            "group": np.int32(row["group"]),
            "classes8": len(row["classes8"]) > 0,
            "classes34": len(row["classes34"]) > 0,
            "original_sizes": row["original_size"],
        }.items():
            columns.setdefault(name, []).append(value)
    arrays: dict[str, Any] = {k: np.asarray(v) for k, v in columns.items()}
    np.savez_compressed(prepared / "index.npz", **arrays)


def checksums(prepared: pathlib.Path) -> dict[str, Any]:
    """sha256 of every file of a built set, and the Pillow that encoded the pictures.

    Tables of captions are of no set, but of whoever reads it.
    """
    foreign = ("checksums.json", "captions-")
    files = sorted(p for p in prepared.iterdir() if not p.name.startswith(foreign))
    return {
        "pillow": PIL.__version__,
        "files": {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in files},
    }


def check(packages: list[pathlib.Path], committed: pathlib.Path) -> None:
    """Rebuilds the set in a temporary folder and compares it with the committed one.

    Raises:
      DataError: a file differs; names the files, and the versions of Pillow.
    """
    with tempfile.TemporaryDirectory() as name:
        target = pathlib.Path(name) / "clipart"
        build(packages, target, "embedded")
        old = json.loads((committed / "checksums.json").read_text())
        now, new = checksums(committed), checksums(target)
    names = sorted(old["files"].keys() | new["files"].keys() | now["files"].keys())
    differ = [
        f
        for f in names
        if not old["files"].get(f) == new["files"].get(f) == now["files"].get(f)
    ]
    if differ:
        raise DataError(
            f"the rebuilt set differs in {', '.join(differ)}; it was built with "
            f"Pillow {old['pillow']}, this is Pillow {new['pillow']}"
        )
    print(f"equal: {len(names)} files of {committed}")


def main(argv: list[str] | None = None) -> None:
    """Fetches the packages unless they are there, and builds or checks."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--packages", help="folder with the two .deb files")
    parser.add_argument("--full", action="store_true", help="full size, into the cache")
    parser.add_argument("--check", action="store_true", help="rebuild and compare")
    parser.add_argument("--out", help="folder to build into instead of the default")
    options = parser.parse_args(argv)
    folder = pathlib.Path(options.packages or sources.cache_folder() / "openclipart")
    names = openclipart.PACKAGES
    if not debian.find(names, folder):
        if options.packages:
            raise ConfigError(
                f"--packages {folder}: it holds no "
                f"{' and '.join(p + '_*.deb' for p in names)}"
            )
        debian.fetch(names, folder, "--packages DIR")
    packages = debian.find(names, folder)
    if options.check:
        check(packages, sources.CLIPART)
        return
    target = sources.full_clipart() if options.full else sources.CLIPART
    target = pathlib.Path(options.out or target)
    build(packages, target, "full" if options.full else "embedded")
    size = sum(os.path.getsize(p) for p in target.iterdir())
    print(f"{target}: {size / 1e6:.2f} MB")


if __name__ == "__main__":
    with command_line.exit_codes():
        main()
