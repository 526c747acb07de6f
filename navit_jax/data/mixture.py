"""Which source, and which place in it, each position of the stream holds.

Sources are mixed by a fixed pattern that repeats, so a position's source and its place
there are closed formulas. M positions.
"""

import dataclasses
import functools
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int64

from navit_jax.data import draws
from navit_jax.errors import ConfigError

PERIOD = 4096


def repeat(
    positions: Int64[np.ndarray, " M"], repeats: int, window: int
) -> tuple[Int64[np.ndarray, " M"], Int64[np.ndarray, " M"]]:
    """The position that each stands for, and which of its repeats it is.

    All repeats of an image are within a window, and as far apart there as can be, so
    that neighbours, which share a row, differ.
    """
    stride = max(1, window // repeats)
    block, place = np.divmod(positions, stride * repeats)
    return block * stride + place % stride, place // stride


@dataclasses.dataclass(frozen=True)
class Mixture:
    """Sources of given sizes, taken in given proportions for ever.

    Attributes:
      sizes: Images of each source.
      weights: Their shares of the stream, in any unit; rounded to 1 / 4096 of it.

    Raises:
      ConfigError: a weight that is not positive, or rounds to nothing.
    """

    sizes: tuple[int, ...]
    weights: tuple[float | int, ...]

    def __post_init__(self):
        for weight, quota in zip(self.weights, self.quotas, strict=True):
            if not weight > 0 or not quota:
                raise ConfigError(
                    f"sources: weight={weight} is less than 1/{PERIOD} of the sum "
                    f"{sum(self.weights)}; raise it, or leave the source out"
                )

    @functools.cached_property
    def quotas(self) -> Sequence[int]:
        """Images of each source in one period: largest remainders."""
        exact = np.array(self.weights, np.float64).clip(0) * PERIOD
        exact /= max(sum(self.weights), 1e-300)
        quotas = np.floor(exact).astype(np.int64)
        most = np.argsort(quotas - exact, kind="stable")
        quotas[most[: PERIOD - quotas.sum()]] += 1
        return quotas.tolist()

    @functools.cached_property
    def _pattern(self) -> tuple[np.ndarray, np.ndarray]:
        """The source of each place in the period, and its how-many-th there it is."""
        times = np.concatenate([(np.arange(q) + 0.5) / q for q in self.quotas])
        order = np.argsort(times, kind="stable")
        source = np.repeat(np.arange(len(self.quotas)), self.quotas)
        rank = np.concatenate([np.arange(q) for q in self.quotas])
        return source[order], rank[order]

    def locate(
        self, positions: Int64[np.ndarray, " M"]
    ) -> tuple[
        Int64[np.ndarray, " M"], Int64[np.ndarray, " M"], Int64[np.ndarray, " M"]
    ]:
        """The source, the epoch of that source, and the place in that epoch."""
        period, place = np.divmod(positions, PERIOD)
        pattern, ranks = self._pattern
        source = pattern[place]
        taken = period * np.array(self.quotas)[source] + ranks[place]
        epoch, place = np.divmod(taken, np.array(self.sizes)[source])
        return source, epoch, place

    def shuffle(
        self, positions: Int64[np.ndarray, " M"], seed: int
    ) -> tuple[
        Int64[np.ndarray, " M"], Int64[np.ndarray, " M"], Int64[np.ndarray, " M"]
    ]:
        """As `locate`, each epoch of each source in a random order of its own."""
        source, epoch, index = self.locate(positions)
        for i, size in enumerate(self.sizes):
            for e in np.unique(epoch[source == i]).tolist():
                at = (source == i) & (epoch == e)
                # Beyond 64 bits, so that no other seed shares a source's order.
                index[at] = draws.permute(index[at], size, seed + (i << 64), e)
        return source, epoch, index

    def longest_window(self) -> int:
        """Images in a row in which no source gives more than it has; at least 1."""
        # Over any stretch a source runs ahead of its share by less than this.
        ahead = 1 + len(self.sizes)
        room = (np.array(self.sizes) - ahead) * PERIOD // np.array(self.quotas)
        return max(1, int(room.min()))
