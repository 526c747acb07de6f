"""Times alternatives in turn, so that what else the machine does hits all alike."""

import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np


def interleave(
    cases: Mapping[str, Callable[[], object]],
    repeats: int,
    settle: bool = False,
    clock: Callable[[], Any] = time.perf_counter,
) -> dict[str, np.ndarray]:
    """Seconds of each repeat of each case, which must wait for its own result.

    Args:
      clock: `time.process_time` counts core-seconds, of all threads; an array of
        several clocks gives a row a repeat.
      settle: Calls each case once untimed before it is timed: what ran before it has
        left the caches and the memory of the process in another state.
    """
    for call in cases.values():
        call()
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(repeats):
        for name, call in cases.items():
            if settle:
                call()
            start = clock()
            call()
            seconds[name].append(clock() - start)
    return {name: np.array(values) for name, values in seconds.items()}


def ratio(slow: np.ndarray, fast: np.ndarray) -> str:
    """The median of the ratios, round by round, and the range of their middle half."""
    pairs = slow / fast
    low, high = np.quantile(pairs, (0.25, 0.75))
    return f"{np.median(pairs):.2f} ({low:.2f} .. {high:.2f})"
