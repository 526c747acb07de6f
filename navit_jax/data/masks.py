"""Which pixels are of which object, by pictures of numbers.

h, w pixels; O objects.
"""

import io

import numpy as np
from jaxtyping import Float, Int, UInt8
from PIL import PngImagePlugin

from navit_jax.data.bad_image import decoding
from navit_jax.data.pixel_classes import UNKNOWN
from navit_jax.data.records import Objects
from navit_jax.errors import DataError


def read_mask(data: bytes, key: str) -> Objects:
    """What a PNG says: at each pixel class + 1, 0 for none, 255 where nobody knows.

    All pixels of a class are one object.

    Args:
      key: Of the record, for messages.

    Raises:
      DataError: it has not one number a pixel, as a palette or grey of 8 bits has.
      BadImage: it can not be decoded.
    """
    with decoding():
        image = PngImagePlugin.PngImageFile(io.BytesIO(data))
        # Pillow stretches grey of fewer bits to 0 .. 255, which are other classes.
        mode, stored, classes = image.mode, image.tile[0].args, np.array(image)
    if mode != "P" and stored != "L":
        raise DataError(
            f"{key} has a mask of mode {mode} ({stored}): give a PNG with a class "
            "number a pixel, grey of 8 bits or palette"
        )
    labels = np.arange(UNKNOWN, dtype=np.int32)
    labels[-1] = -1
    return visible(classes, labels)


def visible(
    instances: UInt8[np.ndarray, "h w"], labels: Int[np.ndarray, " O"]
) -> Objects:
    """The objects of which a pixel is visible, numbered anew from 1, with their boxes.

    Args:
      instances: The number of the object at each pixel, from 1; 0 is background.
      labels: Of each object.
    """
    numbers = np.unique(instances)
    numbers = numbers[numbers > 0]
    renumbered = np.searchsorted(numbers, instances) + 1
    boxes = np.zeros((len(numbers), 4), np.float32)
    for row, number in enumerate(numbers):
        boxes[row] = _box(instances == number)
    return Objects(
        instances=np.where(instances > 0, renumbered, 0).astype(np.uint8),
        boxes=boxes,
        labels=labels[numbers - 1],
    )


def _box(mask: np.ndarray) -> Float[np.ndarray, "4"]:
    """(top, left, bottom, right) of a mask, in fractions of its sides."""
    rows, columns = (np.flatnonzero(mask.any(axis)) for axis in (1, 0))
    ends = [rows[0], columns[0], rows[-1] + 1, columns[-1] + 1]
    return np.array(ends, np.float32) / np.tile(mask.shape, 2)
