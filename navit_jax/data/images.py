"""Reads a picture file of any kind as RGB pixels of a planned size.

Shapes: h, w pixels. Sizes are (height, width), upright: after EXIF orientation.

Safe to call from several threads: no state of Pillow or of `warnings` is changed.
"""

import contextlib
import io
import math
from collections.abc import Iterator

import numpy as np
from jaxtyping import Float64, UInt8
from PIL import (
    BmpImagePlugin,
    GifImagePlugin,
    Image,
    ImageChops,
    ImageEnhance,
    JpegImagePlugin,
    PngImagePlugin,
    TiffImagePlugin,
    WebPImagePlugin,
)

from navit_jax.data import tiff
from navit_jax.data.bad_image import BadImage
from navit_jax.data.containers import Picture, read_header

Size = tuple[int, int]
Box = tuple[float, float, float, float]
# A file whose sides are not the planned ones may be stretched by this much.
ASPECT_TOLERANCE = 0.02
# A JPEG is decoded at the smallest scale that leaves the resizing at least DRAFT_GAP
# to do, which first averages whole blocks of pixels as long as REDUCING_GAP is left.
# Both change a picture by less than a level of 255 on average (see the tests).
DRAFT_GAP = 2.0
REDUCING_GAP = 3.0
# EXIF orientation to how stored pixels are turned upright (EXIF 2.32, 4.6.4 A).
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# Pillow's own classes instead of Image.open(), which would warn of large pictures.
DECODERS = {
    "BMP": BmpImagePlugin.BmpImageFile,
    "GIF": GifImagePlugin.GifImageFile,
    "JPEG": JpegImagePlugin.JpegImageFile,
    "PNG": PngImagePlugin.PngImageFile,
    "TIFF": TiffImagePlugin.TiffImageFile,
    "WEBP": WebPImagePlugin.WebPImageFile,
}


def read_size(data: bytes) -> Size:
    """The upright (h, w) of a whole picture file, from its header alone.

    Raises:
      BadImage: the file can not be used as far as its header tells; see `BadImage`.
    """
    picture = read_header(data)
    _open(picture)
    return _upright(picture)


def read(
    data: bytes,
    planned: Size,
    target: Size,
    *,
    box: Box | None = None,
    flip: bool = False,
) -> tuple[UInt8[np.ndarray, "h w 3"], tuple[str, ...]]:
    """Decodes, turns upright, crops, resizes (antialiased bilinear) and mirrors.

    Grey becomes RGB; transparency is laid on white; CMYK is converted without profile,
    ICC profiles are ignored; 16-bit values are scaled by 1/257; 32-bit and float ones
    from their least to their greatest finite value. Of several frames it is the first.

    Args:
      planned: Size when the picture was planned.
      target: Size of the result.
      box: (top, left, bottom, right) in fractions of the upright picture; at its edges
        the filter still sees the pixels beyond.

    Returns:
      Pixels of exactly `target`, and what was odd: `animated`, `pages` (only the first
      was used), `metadata` (broken, ignored), `fitted` (not of the planned size, but
      nearly of its aspect), `scaled` (32-bit or float, from its own range).

    Raises:
      BadImage: the file can not be used; see `BadImage`.
    """
    picture = read_header(data)
    image = _open(picture)
    notes = list(picture.notes)
    if _upright(picture) != planned:
        if not _nearly_same_aspect(_upright(picture), planned):
            raise BadImage("size_changed", f"{_upright(picture)}, it was {planned}")
        notes.append("fitted")
    if image.mode in ("I", "F"):
        notes.append("scaled")
    box = box or (0.0, 0.0, 1.0, 1.0)
    image, window = _decode(picture, image, target, box)
    height, width = target
    image = image.resize(
        (width, height),
        Image.Resampling.BILINEAR,
        box=window,
        reducing_gap=REDUCING_GAP,
    )
    if flip:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return np.array(image.convert("RGB")), tuple(notes)


def jitter(
    image: UInt8[np.ndarray, "h w 3"],
    brightness: float,
    contrast: float,
    saturation: float,
) -> UInt8[np.ndarray, "h w 3"]:
    """Scales away from black, then from the mean grey, then from each pixel's own grey.

    A factor of 1 changes nothing; 0 gives black, one grey, or a grey picture. Factors
    are drawn by the caller, so that they are part of the plan.
    """
    picture = Image.fromarray(image)
    picture = ImageEnhance.Brightness(picture).enhance(brightness)
    picture = ImageEnhance.Contrast(picture).enhance(contrast)
    return np.array(ImageEnhance.Color(picture).enhance(saturation))


@contextlib.contextmanager
def _decoding() -> Iterator[None]:
    """Goes around what Pillow does with a file, and nothing else.

    What is raised within is the picture's fault; what our own code raises is not.
    """
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:
        reason = "truncated" if "truncated" in str(error) else "undecodable"
        raise BadImage(reason, f"{type(error).__name__}: {error}") from error


def _open(picture: Picture) -> Image.Image:
    with _decoding():
        image = DECODERS[picture.format](io.BytesIO(picture.data))
    if image.size != (picture.width, picture.height):
        raise BadImage("undecodable", f"the decoder finds {image.size} pixels")
    return image


def _upright(picture: Picture) -> Size:
    if picture.orientation < 5:
        return picture.height, picture.width
    return picture.width, picture.height


def _nearly_same_aspect(a: Size, b: Size) -> bool:
    if 0 in (*a, *b):  # planned without a size: it could not be read then
        return False
    stretch = a[0] * b[1] / (a[1] * b[0])
    return max(stretch, 1 / stretch) <= 1 + ASPECT_TOLERANCE


def _decode(
    picture: Picture, image: Image.Image, target: Size, box: Box
) -> tuple[Image.Image, Box]:
    """Upright pixels, and where `box` lies in them as (left, top, right, bottom).

    A JPEG is decoded at 1, 1/2, 1/4 or 1/8 of its size, whichever is still enough.
    """
    top, left, bottom, right = box
    assert 0 <= top < bottom < 1 + 1e-6, f"box {box}"
    assert 0 <= left < right < 1 + 1e-6, f"box {box}"
    across = math.ceil(DRAFT_GAP * target[1] / (right - left))
    down = math.ceil(DRAFT_GAP * target[0] / (bottom - top))
    turn = picture.orientation
    with _decoding():
        draft = image.draft(None, (across, down) if turn < 5 else (down, across))
        image.load()
    # A JPEG decoded at a smaller scale ends somewhere within its last pixels.
    width, height = draft[1][2:] if draft else image.size
    image = _flatten(image, picture.plain_cmyk)
    if turn > 1:
        image = image.transpose(TURNS[turn])
    if turn > 4:
        width, height = height, width
    x = image.width - width if turn in (2, 3, 6, 7) else 0.0
    y = image.height - height if turn in (3, 4, 7, 8) else 0.0
    return image, (
        x + left * width,
        y + top * height,
        min(x + right * width, image.width),
        min(y + bottom * height, image.height),
    )


def _flatten(image: Image.Image, plain_cmyk: bool) -> Image.Image:
    """Any mode to 8-bit grey or RGB without transparency."""
    if image.mode.startswith("I;16"):
        return _from_16_bits(image)
    if image.mode in ("I", "F"):
        with np.errstate(invalid="ignore"):  # a NaN may be a signalling one
            values = np.asarray(image).astype(np.float64)
        return Image.fromarray(_scaled(values))
    with _decoding():
        if image.has_transparency_data:
            white = Image.new("RGBA", image.size, "white")
            return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")
        if plain_cmyk:
            image = ImageChops.invert(image)  # Pillow takes Adobe's for granted
        return image.convert("L" if image.mode in ("1", "L") else "RGB")


def _from_16_bits(image: Image.Image) -> Image.Image:
    bits = 16
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        bits = image.tag_v2[tiff.BITS][0]  # or 12
    table = 255 * np.clip(np.arange(2**16) / (2**bits - 1), 0, 1)
    table = table.round().astype(np.uint8)
    if "transparency" in image.info:
        table[image.info["transparency"]] = 255
    return Image.fromarray(table[np.asarray(image)])


def _scaled(values: Float64[np.ndarray, "h w"]) -> UInt8[np.ndarray, "h w"]:
    """The least finite value becomes 0, the greatest 255; what is not a number, 0."""
    finite = np.isfinite(values)
    low = values.min(where=finite, initial=np.inf)
    high = values.max(where=finite, initial=-np.inf)
    if low >= high:  # all alike, or none finite
        return np.zeros(values.shape, np.uint8)
    values -= low
    values *= 255 / (high - low)
    values[np.isnan(values)] = 0
    return values.clip(0, 255, out=values).round(out=values).astype(np.uint8)
