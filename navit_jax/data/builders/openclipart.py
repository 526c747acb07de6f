"""Fetches and lists the openclipart packages of Debian, and reads their pictures.

The pictures are public domain. Debian serves one version at a time.
"""

import dataclasses
import pathlib
import shutil
import subprocess
from unittest import mock

import numpy as np
from PIL import Image

from navit_jax.errors import ConfigError

PACKAGES = ("openclipart-png", "openclipart-svg")
# Generated stars, other projects' icons, unsorted leftovers, seamless patterns.
LEFT_OUT = ("shapes/stars", "computer/icons", "unsorted", "special/patterns")
# A picture above it is refused by its header: Pillow's own limit for a bomb, written
# out because the loader may set that to another value.
MAX_PIXELS = 178_956_970


@dataclasses.dataclass(frozen=True)
class Entry:
    """One picture of the packages.

    Attributes:
      key: Path below the `png` folder.
      categories: Its folder, and those of the links that point at it, sorted.
    """

    key: str
    categories: tuple[str, ...]


def fetch(folder: pathlib.Path) -> None:
    """Downloads both packages into `folder` with apt-get; nothing is installed.

    Raises:
      ConfigError: there is no apt-get, or it failed.
    """
    remedy = (
        f"Get the two files {', '.join(p + '_*.deb' for p in PACKAGES)} from "
        "https://packages.debian.org/openclipart-png and .../openclipart-svg, "
        "and give their folder: --packages DIR"
    )
    if not shutil.which("apt-get"):
        raise ConfigError(f"apt-get is not on this machine. {remedy}")
    folder.mkdir(parents=True, exist_ok=True)
    command = ["apt-get", "download", *PACKAGES]
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if result.returncode:
        raise ConfigError(
            f"`{' '.join(command)}` failed: {result.stderr.strip()[-500:]}\n"
            f"Try `apt-get update` first. {remedy}"
        )


def find(folder: pathlib.Path) -> list[pathlib.Path]:
    """The package files in `folder`, in the order of `PACKAGES`; [] if one lacks."""
    found = [sorted(folder.glob(f"{name}_*.deb")) for name in PACKAGES]
    return [files[-1] for files in found] if all(found) else []


def unpack(packages: list[pathlib.Path], folder: pathlib.Path) -> pathlib.Path:
    """Unpacks the packages; returns the folder that holds `png` and `svg`.

    Raises:
      ConfigError: there is no dpkg-deb, or a package is broken.
    """
    if not shutil.which("dpkg-deb"):
        raise ConfigError("dpkg-deb is not on this machine; install dpkg")
    for package in packages:
        command = ["dpkg-deb", "-x", str(package), str(folder)]
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode:
            raise ConfigError(
                f"{package} is broken: {result.stderr.strip()}\n"
                "Remove it and run the command again"
            )
    return folder / "usr" / "share" / "openclipart"


def list_entries(root: pathlib.Path) -> list[Entry]:
    """All pictures below `root/png` that are not left out, sorted by key.

    A link is no picture of its own: its folder is a further category of its target.
    A link that leaves `root/png` is refused.

    Raises:
      ConfigError: a link points out of the folder.
    """
    png = (root / "png").resolve()
    categories: dict[str, set[str]] = {}
    links: list[tuple[str, str]] = []
    for path in sorted(png.rglob("*.png")):
        key = path.relative_to(png).as_posix()
        category = key.rpartition("/")[0]
        if path.is_symlink():
            target = path.resolve()
            if not target.is_relative_to(png):
                raise ConfigError(f"{path} points out of {png}: refused")
            links.append((target.relative_to(png).as_posix(), category))
        elif not (category + "/").startswith(tuple(f + "/" for f in LEFT_OUT)):
            categories[key] = {category}
    for target, category in links:
        if target in categories:
            categories[target].add(category)
    return [Entry(k, tuple(sorted(c))) for k, c in sorted(categories.items())]


def read_picture(path: pathlib.Path) -> Image.Image | None:
    """Decodes a picture, cuts it to its alpha box, and puts it on white.

    Returns:
      An RGB image, or None if nothing is visible or it has over MAX_PIXELS pixels by
      its header (three have: 231 and 623 megapixels; they are never decoded).
    """
    # The limit here is MAX_PIXELS; Pillow has another, in `open` and in `crop`.
    with mock.patch.object(Image, "MAX_IMAGE_PIXELS", None), Image.open(path) as opened:
        if opened.width * opened.height > MAX_PIXELS:
            return None
        image = opened.convert("RGBA") if opened.mode != "RGBA" else opened
        image.load()
        box = image.getbbox(alpha_only=True)
        if box is None:
            return None
        white = Image.new("RGB", image.size, "white")
        white.paste(image, mask=image)
        return white.crop(box)


def shrink(image: Image.Image, side: int) -> Image.Image:
    """Scales the image down to a long side of `side`, a short one of at least 1."""
    scale = side / max(image.size)
    if scale >= 1:
        return image
    width, height = (max(1, round(x * scale)) for x in image.size)
    return image.resize((width, height), Image.Resampling.LANCZOS)


def difference_hash(image: Image.Image) -> int:
    """64 bits: is each of 8x8 cells darker than its right neighbour (dHash).

    A difference of up to 4 grey levels counts as none, so that a flat area gives no
    random bits.
    """
    cells = image.convert("L").resize((9, 8), Image.Resampling.BILINEAR)
    grey = np.asarray(cells, np.int32)
    bits = (grey[:, :-1] + 4 < grey[:, 1:]).ravel()
    return int.from_bytes(np.packbits(bits).tobytes(), "big")
