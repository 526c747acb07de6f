"""SIGTERM and SIGINT ask the loop to save and leave; a second SIGINT leaves at once."""

import contextlib
import signal
from collections.abc import Iterator
from types import FrameType

from absl import logging


class StopRequest:
    """Whether this process was asked to stop; read by the loop between steps."""

    requested = False

    def __call__(self, number: int, frame: FrameType | None) -> None:
        """The signal handler."""
        name = signal.Signals(number).name
        if self.requested and number == signal.SIGINT:
            signal.default_int_handler(number, frame)
        if not self.requested:
            logging.warning("%s: saving after this step, then leaving with 42", name)
        self.requested = True


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
