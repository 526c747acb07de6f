"""Lists the pictures of Debian's openclipart packages, and reads them.

They are public domain.
"""

import dataclasses
import pathlib
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
        return cut_out(opened)


def cut_out(opened: Image.Image) -> Image.Image | None:
    """Cuts a picture to its alpha box, on white; None if nothing is visible."""
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
