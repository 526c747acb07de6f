"""Keeps a second run out of a run's folder, without relying on file locks or renames.

`lock` is created only if absent, by its owner's token; `lock-heartbeat` is rewritten by
the owner alone. A run whose lock was taken over notices at its next heartbeat.
"""

import atexit
import contextlib
import json
import os
import secrets
import socket
import threading
import time
from typing import Any

from absl import logging
from etils import epath

from navit_jax import storage
from navit_jax.errors import ConfigError

HEARTBEAT_SECONDS = 30.0
# Hosts' clocks may differ by minutes, and a storage may stall.
STALE_SECONDS = 600.0


def hold(folder: epath.PathLike, take_over: bool = False) -> "RunLock":
    """Takes the lock of a folder, which is created if it is absent.

    In a job of several processes only one of them takes it.

    Args:
      take_over: Take it even from a run that seems to be alive.

    Returns:
      The lock, held until `release`, the end of its `with` or of the process.

    Raises:
      ConfigError: another run holds it; it names host, pid and start.
    """
    folder = epath.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    lock = RunLock(folder)
    if not lock.create():
        owner = lock.read_owner()
        reason = "--take_over was given" if take_over else lock.find_stale(owner)
        if not reason:
            raise ConfigError(
                f"{folder} is in use by {_describe(owner)}. Wait for it or stop it, "
                "take another folder, or pass --take_over if it is gone"
            )
        logging.warning("Taking %s over from %s: %s.", folder, _describe(owner), reason)
        lock.clear(owner)
        if not lock.create():
            raise ConfigError(
                f"{folder} was taken by {_describe(lock.read_owner())} at this moment: "
                "take another folder"
            )
    lock.start()
    return lock


class RunLock:
    """The lock of a run's folder; made by `hold`."""

    def __init__(self, folder: epath.Path):
        self._path, self._beat = folder / "lock", folder / "lock-heartbeat"
        self._token = secrets.token_hex(8)
        self._lost = False
        self._stop = threading.Event()

    def check(self) -> None:
        """Raises a ConfigError if another run has taken the folder over."""
        if self._lost:
            raise ConfigError(
                f"{self._path.parent} was taken over by "
                f"{_describe(self.read_owner())}; this run must not write to it"
            )

    def release(self) -> None:
        """Gives the folder free; does nothing if it was lost or released before."""
        if self._stop.is_set():
            return
        self._stop.set()
        atexit.unregister(self.release)
        if self._holds():
            self._beat.unlink(missing_ok=True)
            self._path.unlink(missing_ok=True)

    def __enter__(self) -> "RunLock":
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def create(self) -> bool:
        """Writes the lock if there is none."""
        owner = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "process": _process_start(os.getpid()),
            "started": time.time(),
            "token": self._token,
        }
        return storage.create(self._path, json.dumps(owner))

    def clear(self, owner: dict[str, Any]) -> None:
        """Removes the lock if it is still that owner's."""
        if self.read_owner() == owner:
            self._path.unlink(missing_ok=True)

    def start(self) -> None:
        """Begins the heartbeat, and sees to the release at the end of the process."""
        self._write_beat()
        threading.Thread(target=self._keep, daemon=True, name="run_lock").start()
        atexit.register(self.release)

    def read_owner(self) -> dict[str, Any]:
        """What the owner wrote; {} if it can not be read."""
        return _read(self._path)

    def find_stale(self, owner: dict[str, Any]) -> str:
        """Why the owner is gone, or "" if it may be alive."""
        if "token" not in owner:
            # Just being written, or left by a crash in that moment.
            age = time.time() - _changed(self._path)
            return f"unreadable for {age:.0f} s" if age > STALE_SECONDS else ""
        if owner["host"] == socket.gethostname():
            # A pid says little by itself: a restarted container gives the same again.
            if _process_start(owner["pid"]) == owner["process"]:
                return ""
            return f"process {owner['pid']} is gone"
        beat = _read(self._beat)
        mine = beat.get("token") == owner["token"]
        age = time.time() - (beat["time"] if mine else owner["started"])
        return f"no heartbeat for {age:.0f} s" if age > STALE_SECONDS else ""

    def _holds(self) -> bool:
        return self.read_owner().get("token") == self._token

    def _keep(self) -> None:
        while not self._stop.wait(HEARTBEAT_SECONDS):
            try:
                if not self._holds():
                    self._lost = True
                    logging.error("Lost %s to another run.", self._path)
                    return
                self._write_beat()
            except OSError as error:
                logging.warning("No heartbeat for %s: %s", self._path, error)

    def _write_beat(self) -> None:
        self._beat.write_text(json.dumps({"token": self._token, "time": time.time()}))


def _read(path: epath.Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except (FileNotFoundError, ValueError):
        return {}


def _process_start(pid: int) -> str:
    """When a process started, in ticks where the kernel tells; "" if it is gone."""
    try:
        with contextlib.suppress(PermissionError):  # It lives, and is another user's.
            os.kill(pid, 0)
    except ProcessLookupError:
        return ""
    try:
        stat = epath.Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        return "alive"
    # The name in parentheses may hold spaces; 22 is starttime in proc(5), 3 the state.
    fields = stat.rpartition(")")[2].split()
    return "" if fields[0] in "ZX" else fields[19]


def _changed(path: epath.Path) -> float:
    try:
        return float(path.stat().mtime)
    except FileNotFoundError:
        return 0.0


def _describe(owner: dict[str, Any]) -> str:
    if "token" not in owner:
        return "a run whose lock can not be read"
    start = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(owner["started"]))
    return f"process {owner['pid']} on {owner['host']}, started {start}"
