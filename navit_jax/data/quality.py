"""Ends a run whose data are too bad, and names images that are not as planned."""

import collections
from collections.abc import Sequence

from absl import logging

from navit_jax.errors import ConfigError, DataError

WINDOW = 10_000


class QualityLimit:
    """Counts unusable images by reason over a rolling window of planned ones."""

    def __init__(self, limit: float | int, window: Sequence[Sequence[int]] = ()):
        """Starts with an empty window, or with one that `window()` gave.

        Args:
          limit: Share of the window that may be unusable, 0.01 is 1 %; 0 ends at the
            first such image, 1 never.

        Raises:
          ConfigError: `limit` is no share.
        """
        if not 0 <= limit <= 1:
            raise ConfigError(
                f"config.train.bad_images={limit}: give a share, 0 to 1 (0.01 is 1 %)"
            )
        self.limit = limit
        self.reasons: collections.Counter[str] = collections.Counter()
        self.examples: dict[str, str] = {}
        self._steps: collections.deque[tuple[int, int]] = collections.deque()
        self._planned = self._skipped = 0
        for planned, skipped in window:
            self.check(planned, skipped)

    def window(self) -> list[list[int]]:
        """(planned, unusable) of the steps in the window, for a checkpoint."""
        return [list(step) for step in self._steps]

    def note(self, skipped: list[tuple[str, str]]) -> None:
        """Remembers this host's unusable images, as (name, reason), for the table."""
        for name, reason in skipped:
            self.reasons[reason] += 1
            self.examples.setdefault(reason, name)

    def check(self, planned: int, skipped: int) -> None:
        """Adds one step's counts over all hosts.

        Raises:
          DataError: more than the limit of the window; with the table of reasons.
        """
        self._steps.append((planned, skipped))
        self._planned += planned
        self._skipped += skipped
        while self._planned - self._steps[0][0] >= WINDOW:
            old_planned, old_skipped = self._steps.popleft()
            self._planned -= old_planned
            self._skipped -= old_skipped
        # Whole steps are kept, so the window may be longer.
        window = max(WINDOW, self._planned)
        if self._skipped > self.limit * window:
            raise DataError(
                f"{self._skipped} of the last {self._planned} planned images can not "
                f"be used, the limit is {self.limit:.1%} of {window:,}:\n{self.table()}"
            )

    def table(self) -> str:
        """Reasons, how often each came on this host, and the first image of each."""
        return "\n".join(
            f"  {count:6d}  {reason:14s} first: {self.examples[reason]}"
            for reason, count in self.reasons.most_common()
        )


# Of images that `BatchInfo.shrunk` names.
SHRUNK = "smaller than drawn, to fit a row or the position table"


class Named:
    """Names images in the log, each once, and so many at most.

    Attributes:
      what: Is said of them.
      level: Of the log.
    """

    def __init__(self, what: str, level: int = logging.INFO, most: int = 100):
        self.what, self.level, self.most = what, level, most
        self._told: set[str] = set()

    def note(self, names: Sequence[str]) -> None:
        """Logs the names that are new."""
        new = list(dict.fromkeys(name for name in names if name not in self._told))
        room = self.most - len(self._told)
        if new and room > 0:
            self._told.update(new[:room])
            more = ", ...; no more are named" if len(new) >= room else ""
            names = ", ".join(new[:room])
            logging.log(self.level, "%s: %s%s", self.what, names, more)
