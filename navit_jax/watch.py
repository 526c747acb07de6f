"""Says what a run waits for when it is slow, and ends it with 43 when it hangs."""

import faulthandler
import math
import tempfile
import threading
import time

import jax
from absl import logging
from etils import epath

from navit_jax import processes
from navit_jax.errors import HUNG

CHECK_SECONDS = 1.0
SLOW_SECONDS = 60.0
# In which the run's folder must take what is said of a hang.
FOLDER_SECONDS = 60.0


class Watch:
    """A thread that looks how long the loop has been at one thing.

    With `with`, which ends it.
    """

    def __init__(self, folder: epath.Path, limit: float | int):
        """Begins to look.

        Args:
          folder: The run's; what every thread does goes there when it hangs.
          limit: Seconds for one thing, above which the run hangs; 0 is no limit.
        """
        self._folder, self._limit = folder, limit
        self._doing, self._since, self._slow = "", time.monotonic(), SLOW_SECONDS
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._keep, daemon=True, name="watch")
        self._thread.start()

    def tell(self, doing: str, slow: float | int = SLOW_SECONDS) -> None:
        """Says what the loop does from now on.

        Args:
          doing: "" if it may take any time.
          slow: Seconds after which the log tells what all processes do.
        """
        self._doing, self._since, self._slow = doing, time.monotonic(), slow
        processes.tell(doing or "compiling")

    def __enter__(self) -> "Watch":
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _keep(self) -> None:
        while not self._stop.wait(CHECK_SECONDS):
            doing, seconds = self._doing, time.monotonic() - self._since
            if not doing:
                continue
            if seconds > self._slow:
                slow, self._slow = self._slow, math.inf
                said = processes.describe()
                logging.warning(
                    "slow: %s takes more than %.0f s; %s", doing, slow, said
                )
            if self._limit and seconds > self._limit and not self._stop.is_set():
                self._leave(doing)
                return

    def _leave(self, doing: str) -> None:
        path = self._folder / f"hung_{jax.process_index()}.txt"
        message = (
            f"{doing}: nothing has happened for {self._limit:.0f} s "
            "(config.train.hang_seconds)"
        )
        # The folder may be what hangs: it ends all the same.
        late = threading.Timer(FOLDER_SECONDS, processes.end, (HUNG, message))
        late.daemon = True
        late.start()
        faulthandler.dump_traceback()
        try:
            with tempfile.TemporaryFile("w+") as file:
                faulthandler.dump_traceback(file)
                file.seek(0)
                stacks = file.read()
            message = f"{message}; {processes.describe()}"
            path.write_text(f"{message}\n\n{stacks}")
            message += f". What each thread does: {path}"
        except OSError as error:
            message += f"; {path} can not be written: {error}"
        late.cancel()
        processes.end(HUNG, message)
