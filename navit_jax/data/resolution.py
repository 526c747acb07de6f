"""At which size an image is seen: laws of the resolution, and the grid of patches.

Resolution is the side, in pixels, of the square of the image's area: 128 may be 64 x
256. A law maps a uniform draw and the sizes to such sides. M images.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool, Float64, Int64, Real
from scipy.special import log_ndtr, ndtri_exp

from navit_jax.config import nearest
from navit_jax.errors import ConfigError

Number = float | int
Draws = Float64[np.ndarray, " M"]
Sizes = Real[np.ndarray, "M 2"]


@runtime_checkable
class Law(Protocol):
    """What the plan asks of a law."""

    @property
    def largest(self) -> Number | None:
        """The largest side that the law gives, in pixels; None if images decide."""
        ...

    def __call__(self, u: Draws, sizes: Sizes) -> Float64[np.ndarray, " M"]:
        """The side of each image."""
        ...


# Scale and size are rounded floats: an image of exactly 14 patches must not lose one.
ROUNDING = 1 + 1e-9


def _check(law: "Uniform | TruncatedNormal") -> None:
    if not 0 < law.low <= law.high:
        raise ConfigError(
            f"resolution.low={law.low}, high={law.high}: needs 0 < low <= high (pixels)"
        )
    if law.of not in ("side", "area"):
        hint = nearest(law.of, ("side", "area"))
        raise ConfigError(f"resolution.of={law.of!r}: {hint}")


def _side(share: np.ndarray, low: Number, high: Number, of: str) -> np.ndarray:
    """The side at a share in [0, 1] of the way from low to high, in side or in area."""
    if of == "side":
        return low + (high - low) * share
    return np.sqrt(low**2 + (high**2 - low**2) * share)


@dataclasses.dataclass(frozen=True)
class Fixed:
    """Every image at one side; its aspect is its own."""

    side: Number

    def __post_init__(self):
        if not self.side > 0:
            raise ConfigError(f"resolution.side={self.side}: needs a side > 0 (pixels)")

    @property
    def largest(self) -> Number:
        """The largest side that the law gives, in pixels."""
        return self.side

    def __call__(self, u: Draws, sizes: Sizes) -> Float64[np.ndarray, " M"]:
        """The side of each image."""
        return np.full(len(sizes), float(self.side))


@dataclasses.dataclass(frozen=True)
class Native:
    """Every image at its own size, or at `max_side` where it is larger (None: no cap).

    An image without a readable size, (0, 0), gets side 0.
    """

    max_side: Number | None = None

    def __post_init__(self):
        if self.max_side is not None and not self.max_side > 0:
            raise ConfigError(
                f"resolution.max_side={self.max_side}: needs a side > 0 (pixels)"
            )

    @property
    def largest(self) -> Number | None:
        """The cap, in pixels; None where only the images limit the side."""
        return self.max_side

    def __call__(self, u: Draws, sizes: Sizes) -> Float64[np.ndarray, " M"]:
        """The side of each image."""
        sides = np.sqrt(np.prod(sizes, axis=1, dtype=np.float64))
        return sides if self.max_side is None else np.minimum(sides, self.max_side)


@dataclasses.dataclass(frozen=True)
class Uniform:
    """Uniform in side or in area, from `low` to `high` pixels of side (section 3.2)."""

    low: Number
    high: Number
    of: str = "side"

    __post_init__ = _check

    @property
    def largest(self) -> Number:
        """The largest side that the law gives, in pixels."""
        return self.high

    def __call__(self, u: Draws, sizes: Sizes) -> Float64[np.ndarray, " M"]:
        """The side of each image."""
        return _side(u, self.low, self.high, self.of)


@dataclasses.dataclass(frozen=True)
class TruncatedNormal:
    """A normal law truncated to [-1, 1], mapped linearly to [low, high] (figure 7).

    `mean` and `sigma` are those before truncation, on [-1, 1]: the paper's best is a
    mean of -0.5 (towards low resolution) with sigma 1, of the side.
    """

    low: Number
    high: Number
    mean: Number = -0.5
    sigma: Number = 1.0
    of: str = "side"

    def __post_init__(self):
        _check(self)
        if not self.sigma > 0:
            raise ConfigError(f"resolution.sigma={self.sigma}: needs a sigma > 0")

    @property
    def largest(self) -> Number:
        """The largest side that the law gives, in pixels."""
        return self.high

    def __call__(self, u: Draws, sizes: Sizes) -> Float64[np.ndarray, " M"]:
        """The side of each image."""
        # In the lower tail, where small probabilities keep their digits: a law whose
        # interval lies in the upper tail is mirrored, and logarithms never reach 0.
        mirror = self.mean < 0
        mean = -self.mean if mirror else self.mean
        low, high = log_ndtr((np.array([-1.0, 1.0]) - mean) / self.sigma)
        at = 1 - u if mirror else u
        log = high + np.log(np.maximum(at + (1 - at) * np.exp(low - high), 1e-300))
        x = (mean + self.sigma * ndtri_exp(log)).clip(-1, 1)
        x = -x if mirror else x
        return _side((x + 1) / 2, self.low, self.high, self.of)


def _fit(
    sizes: Sizes, scale: Float64[np.ndarray, " M"], patch: int
) -> Int64[np.ndarray, "M 2"]:
    """Patches along each side of images scaled by `scale`: floor, at least one."""
    grids = np.floor(sizes * (scale / patch * ROUNDING)[:, None]).astype(np.int64)
    return np.maximum(grids, 1)


def _scales(
    sizes: Sizes, side: Float64[np.ndarray, " M"], upscale: bool
) -> Float64[np.ndarray, " M"]:
    """What to multiply sizes by, so that the area is side**2."""
    area = np.prod(sizes, axis=1, dtype=np.float64)
    # A size of (0, 0), an image that can not be read, becomes a grid of one patch.
    scale = side / np.sqrt(np.maximum(area, 1))
    return scale if upscale else np.minimum(scale, 1)


def _largest_scale(
    high: Float64[np.ndarray, " M"],
    violates: Callable[[Float64[np.ndarray, " M"]], Bool[np.ndarray, " M"]],
) -> Float64[np.ndarray, " M"]:
    """The largest scales below `high` that do not violate, by bisection.

    Grids, so tokens, never shrink as the scale grows.
    """
    low = np.zeros_like(high)
    for _ in range(40):
        middle = (low + high) / 2
        over = violates(middle)
        low, high = np.where(over, low, middle), np.where(over, middle, high)
    return low


def grids(
    sizes: Sizes,
    side: Float64[np.ndarray, " M"],
    patch: int,
    upscale: bool = True,
    square: bool = False,
) -> Int64[np.ndarray, "M 2"]:
    """The (rows, columns) of patches of each image, at least 1 x 1.

    Both sides are multiplied by side / sqrt(height * width) and rounded down to whole
    patches (the paper does not say how it rounds; down agrees with its table 2).

    Args:
      sizes: (height, width) in pixels; (0, 0) gives 1 x 1.
      upscale: Whether an image may be enlarged (the paper does).
      square: Side x side whatever the aspect: what a plain ViT sees.
    """
    if square:
        sizes, upscale = np.ones_like(sizes), True
    return _fit(sizes, _scales(sizes, side, upscale), patch)


def limit(
    grids: Int64[np.ndarray, "M 2"],
    sizes: Sizes,
    rate: Float64[np.ndarray, " M"],
    max_tokens: int,
    max_side: int | None,
) -> tuple[Int64[np.ndarray, "M 2"], Int64[np.ndarray, " M"], Bool[np.ndarray, " M"]]:
    """Shrinks what exceeds a row or the position table to the largest grid that fits.

    Args:
      grids: As drawn, for images of `sizes`.
      rate: Share of the tokens of each image that is dropped; it stays.
      max_tokens: Limit of kept tokens.
      max_side: Limit of a side, in patches; None has no limit.

    Returns:
      The grids, in the aspect of the image down to one patch a side; the tokens kept;
      and which images were shrunk.
    """

    def violates(grids: np.ndarray, rate: np.ndarray) -> np.ndarray:
        over = kept_tokens(grids, rate) > max_tokens
        return over if max_side is None else over | (grids.max(1) > max_side)

    shrunk = violates(grids, rate)
    if shrunk.any():
        chosen, shape, rate_ = grids[shrunk], sizes[shrunk], rate[shrunk]
        high = ((chosen + 1) / np.maximum(shape, 1)).max(1)
        low = _largest_scale(
            high,
            lambda scale: violates(np.minimum(_fit(shape, scale, 1), chosen), rate_),
        )
        grids = grids.copy()
        grids[shrunk] = np.minimum(_fit(shape, low, 1), chosen)
    return grids, kept_tokens(grids, rate), shrunk


def kept_tokens(
    grids: Int64[np.ndarray, "M 2"], rate: Float64[np.ndarray, " M"]
) -> Int64[np.ndarray, " M"]:
    """Tokens left of each grid when a share `rate` is dropped, at least one."""
    kept = np.rint((1 - rate) * grids.prod(1)).astype(np.int64)
    return np.maximum(kept, 1)


@dataclasses.dataclass(frozen=True)
class Budget:
    """Every image at the largest grid of its aspect that has at most `tokens` patches.

    `patch` is the side of a patch in pixels.
    """

    tokens: int
    patch: int

    def __post_init__(self):
        if self.tokens < 1:
            raise ConfigError(f"resolution.tokens={self.tokens}: needs at least 1")

    @property
    def largest(self) -> Number:
        """The side of a square image, in pixels."""
        return self.patch * math.isqrt(self.tokens)

    def __call__(self, u: Draws, sizes: Sizes) -> Float64[np.ndarray, " M"]:
        """The side of each image."""
        sizes = np.maximum(sizes, 1)
        high = (self.tokens + 1) * self.patch / sizes.max(1)
        scale = _largest_scale(
            high, lambda scale: _fit(sizes, scale, self.patch).prod(1) > self.tokens
        )
        # A hair below: the scale is had again from the side, rounded.
        return (1 - 1e-12) * scale * np.sqrt(sizes.prod(1, dtype=np.float64))


LAWS = {
    "budget": Budget,
    "fixed": Fixed,
    "native": Native,
    "uniform": Uniform,
    "truncated_normal": TruncatedNormal,
}
