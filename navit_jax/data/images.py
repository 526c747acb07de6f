"""Reads a picture file of any kind as RGB pixels of a planned size.

Shapes: h, w pixels. Sizes are (height, width), upright: after EXIF orientation.

Safe to call from several threads: no state of Pillow or of `warnings` is changed.
"""

import io
import math

import numpy as np
from jaxtyping import UInt8
from PIL import (
    BmpImagePlugin,
    GifImagePlugin,
    Image,
    ImageEnhance,
    JpegImagePlugin,
    PngImagePlugin,
    TiffImagePlugin,
    WebPImagePlugin,
)

from navit_jax.data import codec as codecs
from navit_jax.data import modes
from navit_jax.data.bad_image import BadImage, decoding
from navit_jax.data.containers import Picture, read_header

Size = tuple[int, int]
Box = tuple[float, float, float, float]
WHOLE = (0.0, 0.0, 1.0, 1.0)
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
    box: Box = WHOLE,
    flip: bool = False,
    codec: str = "auto",
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
      codec: A name for `codec.choose`: what reads JPEGs and arrays, nearly as Pillow.

    Returns:
      Pixels of exactly `target` (a view of `data`, read-only, of an array that nothing
      is to be done with), and what was odd: `animated`, `pages` (only the first
      was used), `metadata` (broken, ignored), `fitted` (not of the planned size, but
      nearly of its aspect), `scaled` (32-bit or float, from its own range).

    Raises:
      BadImage: the file can not be used; see `BadImage`.
    """
    top, left, bottom, right = box
    assert 0 <= top < bottom < 1 + 1e-6, f"box {box}"
    assert 0 <= left < right < 1 + 1e-6, f"box {box}"
    picture = read_header(data)
    fast = codecs.choose(codec)
    stored = _stored(picture, target, box, fast)
    image = None if stored else _open(picture)
    notes = (*picture.notes, *_compare(_upright(picture), planned))
    if stored:
        pixels = _sample(picture, *stored, target, box, fast)
        if pixels is not None:
            return pixels[:, ::-1] if flip else pixels, notes
    image = image or _open(picture)
    if image.mode in ("I", "F"):
        notes = (*notes, "scaled")
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
    return np.array(image.convert("RGB")), notes


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


def _stored(
    picture: Picture, target: Size, box: Box, fast: bool
) -> tuple[UInt8[np.ndarray, "h w 3"], int] | None:
    """Pixels as stored, and 1 / n of what size they are, if that takes no Pillow."""
    if picture.format == "NPY":
        return _array(picture), 1
    if not fast or picture.format != "JPEG":
        return None
    top, left, bottom, right = box
    rows, columns = target[0] / (bottom - top), target[1] / (right - left)
    swapped = picture.orientation > 4
    return codecs.decode(picture, (columns, rows) if swapped else (rows, columns))


def _sample(
    picture: Picture,
    pixels: UInt8[np.ndarray, "h w 3"],
    scale: int,
    target: Size,
    box: Box,
    fast: bool,
) -> UInt8[np.ndarray, "H W 3"] | None:
    """The result from pixels as stored; None if Pillow has to make it."""
    size = picture.height / scale, picture.width / scale
    if size == target and box == WHOLE and picture.orientation == 1:
        return pixels
    if not fast:
        return None
    return codecs.resize(pixels, size, picture.orientation, box, target)


def _array(picture: Picture) -> UInt8[np.ndarray, "h w 3"]:
    shape = picture.height, picture.width, 3
    if len(picture.data) < math.prod(shape):
        raise BadImage("truncated", f"{len(picture.data)} bytes of {shape} pixels")
    return np.frombuffer(picture.data, np.uint8).reshape(shape)


def _open(picture: Picture) -> Image.Image:
    if picture.format == "NPY":
        return Image.fromarray(_array(picture))
    with decoding():
        image = DECODERS[picture.format](io.BytesIO(picture.data))
    if image.size != (picture.width, picture.height):
        raise BadImage("undecodable", f"the decoder finds {image.size} pixels")
    return image


def _upright(picture: Picture) -> Size:
    if picture.orientation < 5:
        return picture.height, picture.width
    return picture.width, picture.height


def _compare(size: Size, planned: Size) -> tuple[str, ...]:
    """What is to be noted of a picture of that size.

    Raises:
      BadImage: the planned size was of another aspect.
    """
    if size == planned:
        return ()
    if 0 not in planned:  # else it could not be read then
        stretch = size[0] * planned[1] / (size[1] * planned[0])
        if max(stretch, 1 / stretch) <= 1 + ASPECT_TOLERANCE:
            return ("fitted",)
    raise BadImage("size_changed", f"{size}, it was {planned}")


def _decode(
    picture: Picture, image: Image.Image, target: Size, box: Box
) -> tuple[Image.Image, Box]:
    """Upright pixels, and where `box` lies in them as (left, top, right, bottom).

    A JPEG is decoded at 1, 1/2, 1/4 or 1/8 of its size, whichever is still enough.
    """
    top, left, bottom, right = box
    across = math.ceil(DRAFT_GAP * target[1] / (right - left))
    down = math.ceil(DRAFT_GAP * target[0] / (bottom - top))
    turn = picture.orientation
    with decoding():
        draft = image.draft(None, (across, down) if turn < 5 else (down, across))
        image.load()
    # A JPEG decoded at a smaller scale ends somewhere within its last pixels.
    width, height = draft[1][2:] if draft else image.size
    image = modes.flatten(image, picture.plain_cmyk)
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
