"""A profiler trace of a window of steps."""

import jax
from absl import logging
from etils import epath


class Trace:
    """Writes the trace of the steps of a window, if there is one."""

    def __init__(self, folder: epath.Path, window: tuple[int, int] | None):
        """Traces nothing yet.

        Args:
          folder: For the trace.
          window: First and last step.
        """
        self._folder, self._window, self._on = folder, window, False

    def reach(self, step: int) -> None:
        """Starts or stops, so many steps being done."""
        inside = self._window is not None and (
            self._window[0] <= step < self._window[1]
        )
        if inside and not self._on:
            jax.profiler.start_trace(str(self._folder))
        if self._on and not inside:
            self.stop()
        self._on = inside

    def stop(self) -> None:
        """Writes what there is."""
        if self._on:
            self._on = False
            jax.profiler.stop_trace()
            logging.info("profiler trace: %s", self._folder)
