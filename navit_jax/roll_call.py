"""Who of a run is there, and what each process does: small files that all can read.

`processes/INDEX.json` in the run's folder is rewritten every few seconds by process
INDEX alone. Who is there rewrites; so no clock is compared, and what an earlier run
left counts for nothing.
"""

import atexit
import json
import os
import socket
import threading
import time
from collections.abc import Mapping
from typing import Any

from absl import logging
from etils import epath

from navit_jax import storage

BEAT_SECONDS = 2.0


class RollCall:
    """Tells the others, until the process ends, that this one is there."""

    def __init__(self, folder: epath.PathLike, index: int):
        """Begins to tell.

        Args:
          folder: The run's, which all processes see.
          index: Of this process.
        """
        self.folder, self.index = epath.Path(folder) / "processes", index
        self._doing, self._since, self._beats = "starting", time.monotonic(), 0
        self._stop = threading.Event()
        self.folder.mkdir(parents=True, exist_ok=True)
        self._write()
        self._thread = threading.Thread(
            target=self._keep, daemon=True, name="roll_call"
        )
        self._thread.start()
        atexit.register(self.close)

    def close(self) -> None:
        """Takes this process off."""
        atexit.unregister(self.close)
        self._stop.set()
        self._thread.join()
        (self.folder / f"{self.index}.json").unlink(missing_ok=True)

    def tell(self, doing: str) -> None:
        """Sets what this process does from now on."""
        self._doing, self._since = doing, time.monotonic()

    def read(self, count: int) -> dict[int, dict[str, Any]]:
        """What those of `count` processes say of themselves that are there."""
        before = self._read_all(count)
        time.sleep(3 * BEAT_SECONDS)
        after = self._read_all(count)
        return {
            i: said
            for i, said in after.items()
            if said != before.get(i) or i == self.index
        }

    def _keep(self) -> None:
        while not self._stop.wait(BEAT_SECONDS):
            try:
                self._write()
            except OSError as error:
                logging.warning("%s can not be written: %s", self.folder, error)

    def _write(self) -> None:
        self._beats += 1
        said = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "beats": self._beats,
            "doing": self._doing,
            "seconds": round(time.monotonic() - self._since, 1),
        }
        storage.store(self.folder / f"{self.index}.json", json.dumps(said))

    def _read_all(self, count: int) -> dict[int, dict[str, Any]]:
        found = {}
        for index in range(count):
            try:
                text = (self.folder / f"{index}.json").read_text()
                found[index] = json.loads(text)
            except (OSError, ValueError):  # absent, or just being written
                continue
        return found


def describe(there: Mapping[int, Mapping[str, Any]], count: int) -> str:
    """Who is there, doing what, and who of `count` processes is not."""
    absent = [str(i) for i in range(count) if i not in there]
    parts = [
        f"process {i} ({said['host']}, pid {said['pid']}): {said['doing']} "
        f"for {said['seconds']:.0f} s"
        for i, said in sorted(there.items())
    ]
    missing = (
        f"not there: {', '.join(absent)} of {count}" if absent else "all are there"
    )
    return "; ".join([missing, *parts])
