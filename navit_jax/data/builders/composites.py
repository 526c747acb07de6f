"""Builds what `composites` scenes are made of: cut-outs with alpha, and backgrounds.

`python -m navit_jax.data.builders.composites` fetches Debian's openclipart and
wallpapers, writes both sets into the cache folder and prints the section of a config
that opens scenes of them. No scene is written: each is composed when it is read
(`navit_jax/data/composites.py`). Two minutes on one core.

Cut-outs are in the public domain and split as the embedded set is; the photographs are
under CC-BY, CC-BY-SA and CC0 (see the packages' copyright files), each in one split.
"""

import argparse
import io
import pathlib
import shutil
import tempfile
from collections.abc import Sequence
from typing import Any
from unittest import mock

import numpy as np
import tqdm
from array_record.python.array_record_module import ArrayRecordWriter
from PIL import Image
from tensorflow_datasets.proto import tf_example_pb2

from navit_jax import command_line
from navit_jax.data import sources
from navit_jax.data.builders import classes, debian, groups, openclipart
from navit_jax.data.composites import BACKGROUNDS, CUTOUTS, SOLID, built_folder
from navit_jax.data.records import cache_folder
from navit_jax.errors import DataError

WALLPAPERS = ("lomiri-wallpapers-16.04", "lomiri-wallpapers-20.04")
# A cut-out is at most half the side of a scene; a photo is cropped, then shrunk.
CUTOUT_SIDE, PHOTO_SIDE = 256, 1280
# Of the alpha box: less is a hairline, and what is opaque everywhere is a photo.
LEAST_VISIBLE, MOST_VISIBLE = 0.05, 0.98


def read_cutout(path: pathlib.Path) -> Image.Image | None:
    """A picture with its alpha, cut to what is visible; None if it is no cut-out."""
    with mock.patch.object(Image, "MAX_IMAGE_PIXELS", None), Image.open(path) as opened:
        if opened.width * opened.height > openclipart.MAX_PIXELS:
            return None
        image = opened.convert("RGBA")
    solid = image.getchannel("A").point([0] * (SOLID + 1) + [255] * (255 - SOLID))
    if (box := solid.getbbox()) is None:
        return None
    visible = np.asarray(solid.crop(box)).mean() / 255
    if not LEAST_VISIBLE <= visible <= MOST_VISIBLE:
        return None
    return openclipart.shrink(image.crop(box), CUTOUT_SIDE)


def make_cutouts(root: pathlib.Path) -> list[dict[str, Any]]:
    """The cut-outs of the openclipart folder, each with the split of its picture."""
    split_of = {}
    for split in groups.SPLITS:
        known = sources.clipart(split, labels="none")
        split_of |= {known[i].key: split for i in range(len(known))}
    examples = []
    for entry in tqdm.tqdm(openclipart.list_entries(root), unit="img"):
        if entry.key not in split_of:
            continue
        cutout = read_cutout(root / "png" / entry.key)
        if cutout is not None:
            example = {
                "key": entry.key,
                "split": split_of[entry.key],
                "image": _encode(cutout, "PNG", optimize=True),
                "classes8": classes.labels_of(entry.categories, classes.CLASSES8),
                "classes34": classes.labels_of(entry.categories, classes.CLASSES34),
            }
            examples.append(example)
    return examples


def make_backgrounds(root: pathlib.Path) -> list[dict[str, Any]]:
    """The photographs below `root`; of ten in order one judges, and one tests."""
    paths = sorted(
        p
        for p in root.rglob("*")
        if p.suffix in (".jpg", ".jpeg", ".png") and not p.is_symlink() and p.is_file()
    )
    examples = []
    for number, path in enumerate(paths):
        with Image.open(path) as opened:
            photo = openclipart.shrink(opened.convert("RGB"), PHOTO_SIDE)
        split = {3: "validation", 7: "test"}.get(number % 10, "train")
        image = _encode(photo, "JPEG", quality=90)
        examples.append({"key": path.name, "split": split, "image": image})
    return examples


def _encode(image: Image.Image, kind: str, **options: Any) -> bytes:
    data = io.BytesIO()
    image.save(data, kind, **options)
    return data.getvalue()


def build(clip_art: pathlib.Path, photos: pathlib.Path, target: pathlib.Path) -> None:
    """Builds both sets below `target`, whole or not at all.

    Args:
      clip_art: The unpacked openclipart folder, with `png`.
      photos: A folder with photographs.

    Raises:
      DataError: a split has no cut-out or no photograph.
    """
    made = {CUTOUTS: make_cutouts(clip_art), BACKGROUNDS: make_backgrounds(photos)}
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as name:
        folder = pathlib.Path(name, target.name)
        folder.mkdir()
        for kind, examples in made.items():
            for split in groups.SPLITS:
                own = [e for e in examples if e["split"] == split]
                if not own:
                    raise DataError(f"there is nothing of {kind} for split {split!r}")
                write(folder / f"{kind}-{split}.array_record", own)
        if target.exists():
            shutil.rmtree(target)
        folder.rename(target)


def write(path: pathlib.Path, examples: Sequence[dict[str, Any]]) -> None:
    """Writes examples as tf.train.Example, their features sorted."""
    writer = ArrayRecordWriter(str(path), "group_size:1")
    for values in examples:
        example = tf_example_pb2.Example()  # pyright: ignore[reportAttributeAccessIssue]
        feature = example.features.feature
        for name, value in values.items():
            if isinstance(value, list):
                feature[name].int64_list.value.extend(value)
            else:
                data = value.encode() if isinstance(value, str) else value
                feature[name].bytes_list.value.append(data)
        writer.write(example.SerializeToString(deterministic=True))
    writer.close()


def find_packages(names: Sequence[str], folder: pathlib.Path) -> list[pathlib.Path]:
    """The package files in `folder`, downloaded if they are not there."""
    if not debian.find(names, folder):
        debian.fetch(names, folder, "--packages DIR")
    return debian.find(names, folder)


def main(argv: list[str] | None = None) -> None:
    """Fetches the packages unless they are there, and builds."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--packages", help="folder with the .deb files")
    parser.add_argument("--out", help="a folder; default: in the cache folder")
    options = parser.parse_args(argv)
    given = options.packages and pathlib.Path(options.packages)
    art = find_packages(
        openclipart.PACKAGES[:1], given or cache_folder() / "openclipart"
    )
    photos = find_packages(WALLPAPERS, given or cache_folder() / "wallpapers")
    target = pathlib.Path(options.out or built_folder()).absolute()
    with tempfile.TemporaryDirectory() as name:
        debian.unpack(art, pathlib.Path(name, "art"))
        debian.unpack(photos, pathlib.Path(name, "photos"))
        root = pathlib.Path(name, "art", "usr", "share", "openclipart")
        build(root, pathlib.Path(name, "photos"), target)
    section: dict[str, Any] = {"name": "composites", "split": "train", "count": 10_000}
    section |= {"path": str(target)} if options.out else {}
    print(f"data.sources = {{'composites': {section}}}")


if __name__ == "__main__":
    with command_line.exit_codes():
        main()
