"""The extra `fast`: simplejpeg decodes, OpenCV resizes, where both are installed.

Pixels differ a little from Pillow's (tests/test_codec.py), so `config.data.codec` can
choose, and `environment.json` of a run tells the versions. One core reads half as many
JPEGs again (`python benchmarks/pipeline.py`). h, w pixels; H, W of a result.
"""

import importlib
from importlib import metadata
from typing import Any

import numpy as np
from jaxtyping import Float64, UInt8

from navit_jax.config import nearest
from navit_jax.data.containers import Picture
from navit_jax.errors import ConfigError


def _find(package: str) -> Any:
    try:
        return importlib.import_module(package)
    except ImportError:
        return None


cv2, simplejpeg = _find("cv2"), _find("simplejpeg")
FAST = bool(cv2 and simplejpeg)
if FAST:
    # The threads of a loader share out whole pictures among themselves.
    cv2.setNumThreads(1)
CODECS = ("auto", "fast", "pillow")
# A JPEG is decoded at the smallest scale that leaves the resizing so much to do.
GAP = 1.5
# Beyond it Pillow is faster, which first averages blocks of pixels.
MOST = 6.0
# OpenCV addresses no more pixels along a side.
SIDE = 2**15 - 1
# EXIF orientation to how an upright picture is stored: whether its axes are swapped,
# and whether the stored rows and columns then run backwards.
TURNS = {
    1: (False, (False, False)),
    2: (False, (False, True)),
    3: (False, (True, True)),
    4: (False, (True, False)),
    5: (True, (False, False)),
    6: (True, (True, False)),
    7: (True, (True, True)),
    8: (True, (False, True)),
}


def choose(codec: str) -> bool:
    """Whether JPEGs and arrays are read by the extra `fast`.

    Args:
      codec: "auto": if it is installed; "fast": it has to be; "pillow": never.

    Raises:
      ConfigError: there is no such codec, or it is not installed.
    """
    if codec not in CODECS:
        raise ConfigError(f"data.codec={codec!r}: {nearest(codec, CODECS)}")
    if codec == "fast" and not FAST:
        raise ConfigError(
            "data.codec='fast' needs simplejpeg and OpenCV: `pip install -e .[fast]`, "
            "or use 'auto' or 'pillow'"
        )
    return FAST and codec != "pillow"


def versions() -> dict[str, str]:
    """What can decode and resize here."""
    found = {"pillow": metadata.version("pillow")}
    if FAST:
        found |= {"simplejpeg": simplejpeg.__version__, "opencv": cv2.__version__}
    return found


def decode(
    picture: Picture, least: tuple[float, float]
) -> tuple[UInt8[np.ndarray, "h w 3"], int] | None:
    """Decodes an ordinary JPEG as it is stored, at 1, 1/2, 1/4 or 1/8 of its size.

    Args:
      least: (rows, columns) of the result, if it were not cropped; GAP times as many
        are left, if there are so many.

    Returns:
      The pixels and 1, 2, 4 or 8; None for all that is not grey or YCbCr, or that the
      decoder so much as warns of: what becomes of those is Pillow's to say.
    """
    height, width = picture.height, picture.width
    scale = 1
    while scale < 8 and 2 * scale * GAP <= min(height / least[0], width / least[1]):
        scale *= 2
    shape = -(-height // scale), -(-width // scale)
    try:
        if simplejpeg.decode_jpeg_header(picture.data)[2] not in ("YCbCr", "Gray"):
            return None
        pixels = simplejpeg.decode_jpeg(
            picture.data,
            min_height=shape[0],
            min_width=shape[1],
            min_factor=scale,
        )
    except ValueError:
        return None
    return (pixels, scale) if pixels.shape[:2] == shape else None


def resize(
    pixels: UInt8[np.ndarray, "h w 3"],
    size: tuple[float, float],
    turn: int,
    box: tuple[float, float, float, float],
    target: tuple[int, int],
) -> UInt8[np.ndarray, "H W 3"] | None:
    """Turns upright, crops and resizes (antialiased bilinear).

    A triangle as wide as the scale is a discrete one, then one of a pixel (exactly so
    at whole scales). So pixels are smoothed by the former, and then read in between,
    wherever turn and crop ask for.

    Args:
      pixels: As stored.
      size: (height, width) of the picture, which may end within the last pixels.
      turn: EXIF orientation.
      box: (top, left, bottom, right) in fractions of the upright picture; at its edges
        the filter still sees the pixels beyond.
      target: (H, W).

    Returns:
      None where it is better left to Pillow.
    """
    top, left, bottom, right = box
    spans = (top, bottom), (left, right)
    swapped, backwards = TURNS[turn]
    windows, kernels, place = [], [], np.zeros((2, 3))
    for axis in range(2):
        of = 1 - axis if swapped else axis  # The axis of the result.
        start, stop = (
            size[axis] * (1 - end if backwards[axis] else end) for end in spans[of]
        )
        step = (stop - start) / target[of]
        scale = max(1.0, abs(step))
        if scale > MOST or max(pixels.shape[axis], target[of]) > SIDE:
            return None
        reach = int(scale)
        kernels.append(_triangle(scale))
        low = max(0, int(min(start, stop)) - reach - 1)
        windows.append(slice(low, int(max(start, stop)) + reach + 2))
        # OpenCV counts x before y, and from the centre of the first pixel.
        place[1 - axis, 1 - of] = step
        place[1 - axis, 2] = start - low + (step - 1) / 2
    pixels, edge = pixels[tuple(windows)], cv2.BORDER_REPLICATE
    if max(map(np.count_nonzero, kernels)) > 1:
        pixels = cv2.sepFilter2D(pixels, -1, kernels[1], kernels[0], borderType=edge)
    if turn == 1 and box == (0, 0, 1, 1) and size == pixels.shape[:2]:
        # The same in half the time.
        return cv2.resize(pixels, target[::-1], interpolation=cv2.INTER_LINEAR)
    return cv2.warpAffine(
        pixels,
        place,
        target[::-1],
        flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP,
        borderMode=edge,
    )


def _triangle(scale: float) -> Float64[np.ndarray, " n"]:
    """A discrete triangle: that of the scale, or between those of the whole numbers.

    Its variance and that of reading between two pixels make up that of the filter.
    """
    low = int(scale)
    share = ((low + 1) ** 2 - scale**2) / (2 * low + 1)
    narrow, wide = share / low**2, (1 - share) / (low + 1) ** 2
    places = [abs(n) for n in range(-low, low + 1)]
    return np.array([narrow * (low - n) + wide * (low + 1 - n) for n in places])
