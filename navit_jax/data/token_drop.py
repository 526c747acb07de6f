"""Which share of an image's tokens is dropped in training (section 3.3, B.6, B.7).

A law maps a uniform draw, the tokens before dropping and the images seen before this
one to a rate in [0, 1]. M images.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float64, Int64
from scipy.special import betaincinv, expit, ndtr, ndtri

from navit_jax import config
from navit_jax.errors import ConfigError

Number = float | int
Draws = Float64[np.ndarray, " M"]
Counts = Int64[np.ndarray, " M"]
Rates = Float64[np.ndarray, " M"]


@runtime_checkable
class Law(Protocol):
    """What the plan asks of a law."""

    def average(self, images_seen: Counts) -> Rates:
        """The mean rate that the law aims at, by images seen."""
        ...

    def __call__(self, u: Draws, tokens: Counts, images_seen: Counts) -> Rates:
        """The rate of each image."""
        ...


def _check_rate(rate: Number, field: str, most: float = 1.0) -> None:
    if not 0 <= rate <= most:
        raise ConfigError(f"token_drop.{field}={rate}: needs a rate in [0, {most}]")


@dataclasses.dataclass(frozen=True)
class Schedule:
    """A rate that goes from `start` to `end` along a sigmoid in images seen (B.7).

    rho(n) = start + (end - start) * sigmoid((n / total - middle) / width); the paper's
    figure 16 has end points 0.2 and 0.8, and (middle, width) of (1/2, 1/10) or
    (2/3, 1/5).

    Attributes:
      total: Images of the whole run; what is reached depends on it, so say it.
    """

    start: Number
    end: Number
    total: int
    middle: Number = 0.5
    width: Number = 0.1

    def __post_init__(self):
        _check_rate(self.start, "schedule.start")
        _check_rate(self.end, "schedule.end")
        if not (self.total > 0 and self.width > 0):
            raise ConfigError(
                f"token_drop.schedule: total={self.total} (images) and "
                f"width={self.width} must be > 0; start > end is what decreases"
            )

    def __call__(self, images_seen: Counts) -> Rates:
        """The scheduled rate, by images seen."""
        share = expit((images_seen / self.total - self.middle) / self.width)
        return self.start + (self.end - self.start) * share


Scheduled = Schedule | Mapping[str, Any] | None


def _scheduled(schedule: Any) -> Schedule | None:
    if schedule is None or isinstance(schedule, Schedule):
        return schedule
    return config.call(Schedule, dict(schedule), "data.token_drop.schedule")


def _mean(schedule: Scheduled, otherwise: Number, images_seen: Counts) -> Rates:
    if isinstance(schedule, Schedule):
        return schedule(images_seen)
    return np.full(images_seen.shape, float(otherwise))


@dataclasses.dataclass(frozen=True)
class NoDrop:
    """Keeps every token."""

    def average(self, images_seen: Counts) -> Rates:
        """The mean rate."""
        return np.zeros(images_seen.shape)

    def __call__(self, u: Draws, tokens: Counts, images_seen: Counts) -> Rates:
        """The rate of each image."""
        return np.zeros(images_seen.shape)


@dataclasses.dataclass(frozen=True)
class Constant:
    """The same rate for every image, or the schedule's (which then replaces `rate`)."""

    rate: Number = 0.5
    schedule: Scheduled = None

    def __post_init__(self):
        _check_rate(self.rate, "rate")
        object.__setattr__(self, "schedule", _scheduled(self.schedule))

    def average(self, images_seen: Counts) -> Rates:
        """The mean rate."""
        return _mean(self.schedule, self.rate, images_seen)

    def __call__(self, u: Draws, tokens: Counts, images_seen: Counts) -> Rates:
        """The rate of each image."""
        return self.average(images_seen)


# Points of a table of quantiles, and steps of the mean between two tables.
POINTS, STEPS = 2049, 64


@functools.lru_cache(maxsize=2 * STEPS)
def _beta_quantiles(mean: float) -> np.ndarray:
    """Quantiles on [0, 1] at u = sin(t)**2, t equally spaced in a quarter circle.

    The inverse itself would cost as much as all else that is planned of an image.
    """
    if mean in (0.0, 1.0):
        return np.full(POINTS, mean)
    total = 1 / 0.3 - 1
    u = np.sin(np.linspace(0, np.pi / 2, POINTS)) ** 2
    return betaincinv(mean * total, (1 - mean) * total, u)


def _beta_rates(u: Draws, mean: float) -> Rates:
    # Quantiles are steep where u is near 0 or 1; there these points are dense.
    table = _beta_quantiles(mean)
    place = np.arcsin(np.sqrt(u)) * ((POINTS - 1) / (np.pi / 2))
    left = np.minimum(place.astype(np.int64), POINTS - 2)
    return table[left] + (place - left) * (table[left + 1] - table[left])


@dataclasses.dataclass(frozen=True)
class Beta:
    """A Beta law on [0, maximum] with a given mean (B.6).

    rate = maximum * Beta(a, b), with variance 0.3 m (1 - m) around m = mean / maximum
    before it is scaled; so a = 7/3 m and b = 7/3 (1 - m). A schedule replaces `mean`.
    """

    mean: Number = 0.5
    maximum: Number = 0.9
    schedule: Scheduled = None

    def __post_init__(self):
        object.__setattr__(self, "schedule", _scheduled(self.schedule))
        _check_rate(self.maximum, "maximum")
        if not self.maximum > 0:
            raise ConfigError("token_drop.maximum=0: needs a rate > 0, or name='none'")
        _check_rate(self.mean, "mean", self.maximum)
        if isinstance(self.schedule, Schedule):
            _check_rate(self.schedule.start, "schedule.start", self.maximum)
            _check_rate(self.schedule.end, "schedule.end", self.maximum)

    def average(self, images_seen: Counts) -> Rates:
        """The mean rate."""
        return _mean(self.schedule, self.mean, images_seen)

    def __call__(self, u: Draws, tokens: Counts, images_seen: Counts) -> Rates:
        """The rate of each image."""
        if self.schedule is None:
            return self.maximum * _beta_rates(u, self.mean / self.maximum)
        # Quantiles are averaged between the two nearest tables: the mean stays exact.
        steps = (self.average(images_seen) / self.maximum * STEPS).clip(0, STEPS)
        lower = np.minimum(steps.astype(np.int64), STEPS - 1)
        rates = np.empty(len(u))
        for step in np.unique(lower):
            at = lower == step
            share = steps[at] - step
            below = _beta_rates(u[at], float(step / STEPS))
            above = _beta_rates(u[at], float((step + 1) / STEPS))
            rates[at] = below + share * (above - below)
        return self.maximum * rates


@dataclasses.dataclass(frozen=True)
class ByResolution:
    """A normal law, truncated at two sigma, whose centre grows with the tokens (B.6).

    The centre is `minimum` at `tokens_low` tokens before dropping, `maximum` at
    `tokens_high`, between them linear in the tokens (B.6), or with of="side" in the
    side, as the main text has it, and constant outside. A schedule shifts it, so that
    the middle of the two is the scheduled rate. Rates are clipped to [0, 1].
    """

    minimum: Number
    maximum: Number
    tokens_low: int
    tokens_high: int
    sigma: Number = 0.02
    of: str = "tokens"
    schedule: Scheduled = None

    def __post_init__(self):
        object.__setattr__(self, "schedule", _scheduled(self.schedule))
        _check_rate(self.minimum, "minimum")
        _check_rate(self.maximum, "maximum")
        if self.of not in ("tokens", "side"):
            hint = config.nearest(self.of, ("tokens", "side"))
            raise ConfigError(f"token_drop.of={self.of!r}: {hint}")
        if not (0 < self.tokens_low < self.tokens_high and self.sigma >= 0):
            raise ConfigError(
                f"token_drop: tokens_low={self.tokens_low}, "
                f"tokens_high={self.tokens_high}, sigma={self.sigma}: needs "
                "0 < tokens_low < tokens_high and sigma >= 0"
            )

    def average(self, images_seen: Counts) -> Rates:
        """The rate in the middle between tokens_low and tokens_high."""
        return _mean(self.schedule, (self.minimum + self.maximum) / 2, images_seen)

    def __call__(self, u: Draws, tokens: Counts, images_seen: Counts) -> Rates:
        """The rate of each image."""
        at, low, high = tokens, self.tokens_low, self.tokens_high
        if self.of == "side":
            at, low, high = np.sqrt(at), np.sqrt(low), np.sqrt(high)
        share = (at - low) / (high - low)
        slope = (self.maximum - self.minimum) * (share.clip(0, 1) - 0.5)
        low, high = ndtr(-2.0), ndtr(2.0)
        noise = self.sigma * ndtri(low + (high - low) * u)
        return (self.average(images_seen) + slope + noise).clip(0, 1)


LAWS = {
    "none": NoDrop,
    "constant": Constant,
    "beta": Beta,
    "by_resolution": ByResolution,
}
