"""The class of every pixel, laid on the grid that a picture was planned at.

h, w pixels.
"""

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from navit_jax.data.images import ASPECT_TOLERANCE, Box, Size
from navit_jax.data.records import Objects
from navit_jax.errors import DataError

BACKGROUND, UNKNOWN = 0, 255


def draw_classes(
    objects: Objects | None, target: Size, box: Box, flip: bool
) -> UInt8[np.ndarray, "h w"]:
    """Class + 1 of each pixel, 0 for background, 255 where nobody knows.

    Cropped, resized (nearest) and mirrored as `images.read` does with the pixels.

    Args:
      objects: None: all is unknown. So is an object without a class.
      target, box, flip: As of `images.read`.
    """
    if objects is None:
        return np.full(target, UNKNOWN, np.uint8)
    known = np.where(objects.labels < 0, UNKNOWN, objects.labels + 1)
    classes = np.concatenate([[BACKGROUND], known]).astype(np.uint8)
    height, width = objects.instances.shape
    top, left, bottom, right = box
    window = (
        left * width,
        top * height,
        min(right, 1) * width,
        min(bottom, 1) * height,
    )
    image = Image.fromarray(classes[objects.instances])
    resized = image.resize((target[1], target[0]), Image.Resampling.NEAREST, box=window)
    return np.asarray(resized)[:, :: -1 if flip else 1]


def check_shape(objects: Objects | None, size: Size, key: str) -> None:
    """Checks that objects are those of a picture as it stands upright.

    A mask is not turned by the picture's EXIF orientation: whether it is of what is
    stored or of what is seen, no file says, and half a turn would not show. It may be
    smaller than the picture.

    Args:
      size: Of the upright picture.
      key: Of the record, for messages.

    Raises:
      DataError: the sides of the mask are in another proportion.
    """
    if objects is None:
        return
    shape = objects.instances.shape
    stretch = shape[0] * size[1] / (shape[1] * size[0])
    # The sides of a smaller mask are rounded.
    allowed = 1 + max(ASPECT_TOLERANCE, 1 / min(shape))
    turned = shape == size[::-1] != size
    if turned or max(stretch, 1 / stretch) > allowed:
        raise DataError(
            f"{key} has a mask of {shape} beside a picture that is {size} when it "
            "stands upright: store the picture upright, without an EXIF orientation, "
            "or the mask turned as the picture is"
        )
