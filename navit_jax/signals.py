"""SIGTERM and SIGINT ask the loop to save and leave; a second SIGINT leaves at once."""

import contextlib
import os
import signal
from collections.abc import Iterator
from types import FrameType

import numpy as np
from jax.experimental import multihost_utils


class StopRequest:
    """Whether this process was asked to stop; read by the loop between steps."""

    requested = False

    def __call__(self, number: int, frame: FrameType | None) -> None:
        """The signal handler."""
        if self.requested and number == signal.SIGINT:
            signal.default_int_handler(number, frame)
        if not self.requested:
            self.requested = True
            name = signal.Signals(number).name
            # Not by logging: what the signal interrupted may be writing to its buffer.
            with contextlib.suppress(OSError):
                os.write(2, f"{name}: leaving with 42 as soon as saved\n".encode())

    def agreed(self) -> bool:
        """Whether any process was asked to stop; all must call this at one point."""
        asked = multihost_utils.process_allgather(np.bool_(self.requested))
        return bool(asked.any())


@contextlib.contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """Handles both signals inside of the block, and restores the handlers after it."""
    request = StopRequest()
    numbers = (signal.SIGTERM, signal.SIGINT)
    before = {number: signal.signal(number, request) for number in numbers}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
