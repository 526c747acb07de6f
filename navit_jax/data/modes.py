"""Any mode of a decoded picture to 8-bit grey or RGB. Shapes: h, w pixels."""

import numpy as np
from jaxtyping import Float64, UInt8
from PIL import Image, ImageChops, TiffImagePlugin

from navit_jax.data import tiff
from navit_jax.data.bad_image import decoding


def flatten(image: Image.Image, plain_cmyk: bool) -> Image.Image:
    """Any mode to 8-bit grey or RGB without transparency.

    Args:
      plain_cmyk: Whether the file holds CMYK as it is, not inverted as Adobe does.
    """
    if image.mode.startswith("I;16"):
        return _from_16_bits(image)
    if image.mode in ("I", "F"):
        with np.errstate(invalid="ignore"):  # a NaN may be a signalling one
            values = np.asarray(image).astype(np.float64)
        values = -values if _white_is_least(image) else values
        return Image.fromarray(_scaled(values))
    with decoding():
        if image.has_transparency_data:
            white = Image.new("RGBA", image.size, "white")
            return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")
        if plain_cmyk:
            image = ImageChops.invert(image)  # Pillow takes Adobe's for granted
        return image.convert("L" if image.mode in ("1", "L") else "RGB")


def _white_is_least(image: Image.Image) -> bool:
    """Whether a TIFF counts from white; Pillow knows it of 8 bits and fewer alone."""
    tiffs = TiffImagePlugin.TiffImageFile
    return isinstance(image, tiffs) and image.tag_v2.get(tiff.PHOTOMETRIC) == 0


def _from_16_bits(image: Image.Image) -> Image.Image:
    bits = 16
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        bits = image.tag_v2[tiff.BITS][0]  # or 12
    table = 255 * np.clip(np.arange(2**16) / (2**bits - 1), 0, 1)
    table = table.round().astype(np.uint8)
    if _white_is_least(image):
        table = table[::-1].copy()
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
