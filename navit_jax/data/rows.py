"""Random access to planned rows and global batches, from any position of the stream.

A position is (epoch, window, row): all there is to save. B rows of a batch.
"""

import bisect
import collections
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np

from navit_jax.data.plan import Plan
from navit_jax.data.window import EMPTY, PlannedRow, PlannedWindow
from navit_jax.errors import ConfigError

Position = Sequence[int]

# The length of a stream without end: what fits wherever a length is asked for.
ENDLESS = 2**62
# Windows that are kept: threads read a few batches ahead of each other.
KEPT = 4


class Rows:
    """Item i is the i-th row after a position, of one shard of a plan.

    Windows are planned when they are first needed, and once again if one goes back
    further than a few of them. Threads may share it; another process gets a copy.
    """

    def __init__(self, plan: Plan, shard: int = 0, origin: Position | None = None):
        """See the class.

        Args:
          origin: A position of this shard; None is the beginning of the stream.

        Raises:
          ConfigError: the position belongs to another plan.
        """
        self.plan = plan
        self.shard = shard
        epoch, window, row = origin or (*plan.label(shard), 0)
        self._first = plan.number(epoch, window)
        self._row = row
        if self._first % plan.plan_shards != shard:
            raise ConfigError(
                f"position {list(origin or ())} is not of shard {shard}: "
                f"data.plan_shards={plan.plan_shards} was another"
            )
        # The item after the last of each window planned so far.
        self._stops: list[int] = []
        self._windows: collections.OrderedDict[int, PlannedWindow] = (
            collections.OrderedDict()
        )
        self._lock = threading.RLock()

    def __getstate__(self):
        origin = (*self.plan.label(self._first), self._row)
        return {"plan": self.plan, "shard": self.shard, "origin": origin}

    def __setstate__(self, state: dict[str, Any]):
        self.__init__(**state)

    def __len__(self) -> int:
        """In evaluation the rows that there are; in training there is no end."""
        if self.plan.training:
            return ENDLESS
        self._find(ENDLESS)
        return self._stops[-1] if self._stops else 0

    def __getitem__(self, i: int) -> PlannedRow:
        """Row i, from 0.

        Raises:
          IndexError: evaluation has no such row.
        """
        window, row = self._find(i)
        if row is None:
            raise IndexError(i)
        return self._planned(window).row(row)

    def position(self, i: int) -> list[int]:
        """The position of row i: that after row i - 1. JSON-able."""
        window, row = self._find(i)
        return [*self.plan.label(self._number(window)), row or 0]

    def images_before(self, i: int) -> int:
        """Images of this shard, since the beginning of the stream, before row i."""
        window, row = self._find(i)
        number = self._number(window)
        before = np.arange(self.shard, number, self.plan.plan_shards)
        sizes = self.plan.images_before(before + 1) - self.plan.images_before(before)
        inside = self._planned(window).starts[row] if row else 0
        return int(sizes.sum() + inside)

    def _number(self, window: int) -> int:
        """The number in the stream of the window that is so many after the first."""
        return self._first + window * self.plan.plan_shards

    def _find(self, i: int) -> tuple[int, int | None]:
        """The window (counted from the first) and the row in it; None after the end."""
        with self._lock:
            while not self._stops or self._stops[-1] <= i:
                window = len(self._stops)
                if self.plan.is_over(self._number(window)):
                    return window, None
                rows = len(self._planned(window))
                before = self._stops[-1] if self._stops else -self._row
                self._stops.append(before + rows)
        window = bisect.bisect_right(self._stops, i)
        return window, i - (self._stops[window - 1] if window else -self._row)

    def _planned(self, window: int) -> PlannedWindow:
        with self._lock:
            if window not in self._windows:
                number = self._number(window)
                planned = self.plan.plan_window(*self.plan.label(number))
                self._windows[window] = planned
                if len(self._windows) > KEPT:
                    self._windows.popitem(last=False)
            self._windows.move_to_end(window)
            return self._windows[window]


class Batches:
    """Item k is the k-th global batch after some positions, as a list of B rows.

    Each of the V shards gives B / V rows of it, in the order of the shards. Whoever
    asks for a slice of the rows plans only the shards of that slice.
    """

    def __init__(self, plan: Plan, positions: Sequence[Position] | None = None):
        """See the class.

        Args:
          positions: One for each shard, as `position` gives them; None begins.

        Raises:
          ConfigError: the positions belong to another plan.
        """
        self.plan = plan
        shards = plan.plan_shards
        if positions is not None and len(positions) != shards:
            raise ConfigError(
                f"data.plan_shards={shards}, but the position is of {len(positions)} "
                "shards: continue with as many, or begin a new run"
            )
        origins = [None] * shards if positions is None else positions
        self._shards = [Rows(plan, i, origin) for i, origin in enumerate(origins)]
        self._rows_a_shard = plan.rows // shards

    def __len__(self) -> int:
        """In evaluation the batches that hold all rows; in training there is no end."""
        if self.plan.training:
            return ENDLESS
        return max(-(-len(rows) // self._rows_a_shard) for rows in self._shards)

    def __getitem__(self, k: int) -> list[PlannedRow]:
        """All rows of batch k; see `rows`."""
        return self.rows(k)

    def rows(self, k: int, start: int = 0, stop: int | None = None) -> list[PlannedRow]:
        """Rows start..stop of batch k; in evaluation empty ones fill the last batch.

        Raises:
          IndexError: evaluation has no such batch.
        """
        # Only evaluation pays for its length: all rows are planned for it.
        if not self.plan.training and k >= len(self):
            raise IndexError(k)
        rows = []
        for r in range(start, self.plan.rows if stop is None else stop):
            shard, place = divmod(r, self._rows_a_shard)
            try:
                rows.append(self._shards[shard][k * self._rows_a_shard + place])
            except IndexError:
                rows.append(EMPTY)
        return rows

    def position(
        self, k: int, start: int = 0, stop: int | None = None
    ) -> list[list[int] | None]:
        """The positions of all shards after batch k: what to continue from. JSON-able.

        With a slice of rows only their shards are planned; None stands for the others.
        """
        positions: list[list[int] | None] = [None] * len(self._shards)
        for shard in self._of(start, stop):
            after = (k + 1) * self._rows_a_shard
            positions[shard] = self._shards[shard].position(after)
        return positions

    def images_seen(self, k: int, start: int = 0, stop: int | None = None) -> int:
        """Images planned from the beginning of the stream up to and with batch k.

        With a slice of rows, only those of its shards.
        """
        after = (k + 1) * self._rows_a_shard
        return sum(self._shards[i].images_before(after) for i in self._of(start, stop))

    def _of(self, start: int, stop: int | None) -> range:
        """The shards of a slice of rows."""
        stop = self.plan.rows if stop is None else stop
        return range(start // self._rows_a_shard, -(-stop // self._rows_a_shard))
