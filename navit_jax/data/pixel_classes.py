"""The class of every pixel, laid on the grid that a picture was planned at.

h, w pixels.
"""

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from navit_jax.data.images import Box, Size
from navit_jax.data.records import Objects

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
