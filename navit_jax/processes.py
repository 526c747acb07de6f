"""How the processes of one run meet, and how they end when one of them is lost.

JAX's own runtime connects them. What it does when a process is missing or gone is to
abort the others; here they say who it was, and leave with 44: start me again.
"""

import contextlib
import ctypes
import faulthandler
import hashlib
import json
import os
import pathlib
import re
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping
from importlib import metadata
from typing import Any

import jax
import numpy as np
from absl import flags, logging
from etils import epath
from jax.experimental import multihost_utils

from navit_jax import config as config_lib
from navit_jax import joining, roll_call, run_folder
from navit_jax.errors import LOST_PEER, PREEMPTED, ConfigError

# What JAX's runtime says when another process is gone; it begins with a status.
LOST = re.compile(
    r"UNAVAILABLE|DEADLINE_EXCEEDED|ABORTED|CANCELLED|"
    r"(UNKNOWN|INTERNAL|FAILED_PRECONDITION).*(gloo|nccl|coordination|connection|socket)",
    re.IGNORECASE | re.DOTALL,
)
# What changes the program that a process compiles.
COMPILING = ("XLA_FLAGS", "LIBTPU_INIT_ARGS", "JAX_DEFAULT_MATMUL_PRECISION")
# JAX's own limit comes after ours, which can say who is missing.
LATER_SECONDS = 60


def define_flags() -> Callable[[epath.PathLike], None]:
    """Defines the flags, and returns what starts the runtime by them.

    It takes the run's folder, which all processes see.
    """
    find = joining.define_flags()
    timeout = flags.DEFINE_integer(
        "start_timeout", 300, "Seconds in which all processes must come"
    )
    heartbeat = flags.DEFINE_integer(
        "heartbeat_timeout", 100, "Seconds after which a silent process counts as lost"
    )

    def start_by_flags(folder: epath.PathLike) -> None:
        place = find()
        if place is not None:
            start(place, folder, timeout.value, heartbeat.value)

    return start_by_flags


def start(
    place: joining.Place,
    folder: epath.PathLike,
    timeout: int = 300,
    heartbeat: int = 100,
) -> None:
    """Connects this process with the others, and sees to what ends them together.

    If they do not all come in time, this says who did not and ends the process.

    Args:
      folder: The run's, which all see.
      timeout: Seconds in which all must come.
      heartbeat: Seconds after which a silent process counts as lost.

    Raises:
      ConfigError: the folder can not be written.
    """
    run_folder.check_writable(epath.Path(folder), f"the run's folder {folder}")
    global _call
    _call = calls = roll_call.RollCall(folder, place.process_id)
    _leave_on_abort()
    come = threading.Event()

    def watch() -> None:
        if come.wait(timeout):
            return
        there = roll_call.describe(calls.read(place.num_processes), place.num_processes)
        if not come.is_set():
            end(
                LOST_PEER,
                f"after {timeout} s not all processes have come: {there}. Start the "
                "same command on every host (gcloud ... --worker=all; srun), with the "
                f"same coordinator, here {place.coordinator} (of {place.cluster}); for "
                f"slow hosts raise --start_timeout. {joining.tell_environment()}",
            )

    threading.Thread(target=watch, daemon=True, name="start_timeout").start()
    logging.info(
        "process %d of %d (%s), coordinator %s",
        place.process_id, place.num_processes, place.cluster, place.coordinator,
    )  # fmt: skip
    try:
        jax.distributed.initialize(
            place.coordinator,
            place.num_processes,
            place.process_id,
            list(place.devices) if place.devices is not None else None,
            cluster_detection_method="deactivate",
            initialization_timeout=timeout + LATER_SECONDS,
            heartbeat_timeout_seconds=heartbeat,
        )
    finally:
        come.set()


@contextlib.contextmanager
def together() -> Iterator[None]:
    """Of several processes, one that fails ends at once, so that the others notice.

    Else it would wait for them at its end, and they for it. An error that says that
    another process is gone becomes the exit code 44.
    """
    try:
        yield
    except Exception as error:
        if jax.distributed.is_initialized():
            traceback.print_exc()
            lost = is_lost(error)
            end(LOST_PEER if lost else 1, "a process was lost" if lost else "")
        raise
    except KeyboardInterrupt:
        if jax.distributed.is_initialized():
            end(130, "interrupted")
        raise
    except SystemExit as left:
        if jax.distributed.is_initialized() and left.code not in (0, None, PREEMPTED):
            text = isinstance(left.code, str)
            end(1 if text else int(left.code), str(left.code) if text else "")
        raise


def is_lost(error: Exception) -> bool:
    """Whether JAX's runtime says by an error that another process is gone."""
    # Of some collectives it raises a ValueError with the same text.
    runtime = isinstance(error, jax.errors.JaxRuntimeError | ValueError)
    return runtime and LOST.match(str(error)) is not None


def check_same(config: Mapping[str, Any], workdir: epath.PathLike) -> None:
    """Makes sure that all processes run the same config by the same code.

    Raises:
      ConfigError: they do not; it names the processes and what differs from process 0.
    """
    if jax.process_count() == 1:
        return
    sources = sorted(pathlib.Path(__file__).parent.rglob("*.py"))
    code = hashlib.sha256(b"".join(path.read_bytes() for path in sources))
    own = {
        "config": config,
        "workdir": str(workdir),
        "code of navit_jax": code.hexdigest()[:12],
        "versions": {name: metadata.version(name) for name in ("jax", "jaxlib")},
        "environment": {name: os.environ.get(name, "") for name in COMPILING},
    }
    first, *others = map(json.loads, _gather(json.dumps(own)))
    lines = [
        f"  process {index}: {key}: {there!r} -> {here!r}"
        for index, other in enumerate(others, 1)
        for key, there, here in config_lib.differences(first, other)
    ]
    if lines:
        raise ConfigError(
            "the processes of this run were not started alike; next to process 0:\n"
            + "\n".join(lines)
            + "\nstart the same command with the same code on all hosts"
        )


def _gather(text: str) -> list[str]:
    """The texts of all processes."""
    own = np.frombuffer(text.encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.int32(len(own)))
    padded = np.pad(own, (0, int(sizes.max()) - len(own)))
    texts = multihost_utils.process_allgather(padded)
    return [
        row[:size].tobytes().decode() for row, size in zip(texts, sizes, strict=True)
    ]


def tell(doing: str) -> None:
    """Lets the other processes know what this one does."""
    if _call is not None:
        _call.tell(doing)


def describe() -> str:
    """What each process does; of several it takes some seconds to know."""
    if _call is None:
        return "it is the only process"
    num = jax.process_count()
    return roll_call.describe(_call.read(num), num)


def end(code: int, message: str) -> None:
    """Leaves at once, without waiting for other processes or threads."""
    if message:
        print(message, file=sys.stderr)
    logging.flush()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _leave_on_abort() -> None:
    """The runtime aborts a process whose peers are gone; it shall leave with 44."""

    def leave(_: int) -> None:
        faulthandler.dump_traceback()
        os.write(2, b"ended by the runtime, as said above: a process was lost?\n")
        os._exit(LOST_PEER)

    # Python's own handlers run between its instructions, which is too late here.
    _KEPT.append(ctypes.CFUNCTYPE(None, ctypes.c_int)(leave))
    ctypes.CDLL(None).signal(signal.SIGABRT, _KEPT[-1])


_KEPT: list[object] = []
# That of this process, if it is one of several.
_call: roll_call.RollCall | None = None
