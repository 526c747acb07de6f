"""Which part of an image is cut out before it is resized, in fractions of its sides.

A law maps (draw, sizes) to boxes (top, left, bottom, right); `draw(purpose)` gives a
uniform number in [0, 1) for each of the M images.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
from jaxtyping import Float64, Real

from navit_jax.errors import ConfigError

Number = float | int
Draw = Callable[[str], Float64[np.ndarray, " M"]]
Sizes = Real[np.ndarray, "M 2"]
Boxes = Float64[np.ndarray, "M 4"]
Law = Callable[[Draw, Sizes], Boxes]


def _check_area(law: Any) -> None:
    if not 0 < law.area_low <= law.area_high <= 1:
        raise ConfigError(
            f"crop.area_low={law.area_low}, area_high={law.area_high}: needs "
            "0 < area_low <= area_high <= 1 (shares of the area)"
        )


def _place(draw: Draw, extent: Float64[np.ndarray, "M 2"]) -> Boxes:
    """Boxes of given extent (fractions), anywhere in the image."""
    corner = np.stack([draw("crop/top"), draw("crop/left")], 1) * (1 - extent)
    return np.concatenate([corner, corner + extent], 1)


@dataclasses.dataclass(frozen=True)
class Whole:
    """No crop: the paper's NaViT."""

    def __call__(self, draw: Draw, sizes: Sizes) -> Boxes:
        """The boxes."""
        return np.tile(np.array([0.0, 0.0, 1.0, 1.0]), (len(sizes), 1))


@dataclasses.dataclass(frozen=True)
class Inception:
    """The crop of the ViT baseline (Szegedy et al. 2015).

    Area and aspect (width / height) are uniform; what does not lie in the image is
    drawn again, up to `attempts` times, and is the whole image after that.
    """

    area_low: Number = 0.05
    area_high: Number = 1.0
    aspect_low: Number = 3 / 4
    aspect_high: Number = 4 / 3
    attempts: int = 10

    def __post_init__(self):
        _check_area(self)
        if not 0 < self.aspect_low <= self.aspect_high:
            raise ConfigError(
                f"crop.aspect_low={self.aspect_low}, aspect_high={self.aspect_high}: "
                "needs 0 < aspect_low <= aspect_high (width / height)"
            )

    def __call__(self, draw: Draw, sizes: Sizes) -> Boxes:
        """The boxes."""
        extent = np.ones((len(sizes), 2))
        # A size of (0, 0), an image that can not be read, stays whole.
        waiting = sizes.min(1) > 0
        aspect_of_image = sizes[:, 1] / np.maximum(sizes[:, 0], 1)
        for attempt in range(self.attempts):
            area = self._between("area", draw(f"crop/area/{attempt}"))
            aspect = self._between("aspect", draw(f"crop/aspect/{attempt}"))
            # Fractions y, x of the sides: y * x is area, x / y is relative.
            relative = aspect / np.maximum(aspect_of_image, 1e-9)
            squares = [area / np.maximum(relative, 1e-9), area * relative]
            drawn = np.sqrt(np.stack(squares, 1))
            taken = waiting & (drawn.max(1) <= 1)
            extent[taken] = drawn[taken]
            waiting &= ~taken
            if not waiting.any():
                break
        return _place(draw, extent)

    def _between(self, field: str, u: np.ndarray) -> np.ndarray:
        low, high = getattr(self, f"{field}_low"), getattr(self, f"{field}_high")
        return low + (high - low) * u


LAWS = {"none": Whole, "inception": Inception}
