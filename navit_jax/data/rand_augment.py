"""RandAugment (Cubuk et al. 2019), as timm has it, with draws that the plan gives.

timm is needed for it alone: `pip install 'navit_jax[augment]'`. h, w pixels.
"""

import functools
import importlib
import random
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from navit_jax.errors import ConfigError

# timm draws from the generators of `random` and `numpy`, which all threads share.
LOCK = threading.Lock()
# What moves in from outside of the picture is ImageNet's mean, as in timm's recipes.
# The largest magnitude is just below timm's own, 10, at which "inc1" keeps 0 bits of a
# colour: a black picture, which newer versions of Pillow refuse.
SETTINGS = {"img_mean": (124, 116, 104), "magnitude_max": 9.99}


def augment(
    image: UInt8[np.ndarray, "h w 3"], law: str, key: int
) -> UInt8[np.ndarray, "h w 3"]:
    """Changes colours and geometry of an image at random; a function of its arguments.

    One image at a time in a process: more worker processes make it faster, more threads
    do not. The generators of `random` and `numpy` are left as they were.

    Args:
      law: As timm writes it, "rand-m9-mstd0.5-inc1".
      key: Of the draws.
    """
    change = build(law)
    with LOCK:
        before = random.getstate(), np.random.get_state()
        try:
            random.seed(key)
            np.random.seed(key % 2**32)
            return np.array(change(Image.fromarray(image)))
        finally:
            random.setstate(before[0])
            np.random.set_state(before[1])


def check(law: str, pixel_classes: bool) -> None:
    """Raises ConfigError as `build`; "" is no law and can not be wrong.

    And of a law beside `pixel_classes`, which would stay where they are.
    """
    if law and pixel_classes:
        raise ConfigError(
            f"config.data.rand_augment={law!r} moves pixels and not their classes: "
            "remove it, or pixel_classes=True"
        )
    if law:
        build(law)


@functools.cache
def build(law: str) -> Callable[[Any], Any]:
    """The transformation of pictures that a law names.

    Raises:
      ConfigError: timm is not installed, or knows no such law.
    """
    if not law.startswith("rand-"):
        raise ConfigError(
            f"config.data.rand_augment={law!r}: write it as timm does, "
            "'rand-m9-mstd0.5-inc1'"
        )
    try:
        timm = importlib.import_module("timm.data.auto_augment")
    except ImportError as error:
        raise ConfigError(
            f"config.data.rand_augment={law!r} needs timm: "
            "pip install 'navit_jax[augment]'"
        ) from error
    try:
        return timm.rand_augment_transform(law, dict(SETTINGS))
    except (AssertionError, ValueError, KeyError) as error:
        raise ConfigError(
            f"config.data.rand_augment={law!r} is none that timm knows: {error}"
        ) from error
