"""Signals a process at a chosen point of its program, and compares what runs leave."""

import os
import signal

import chex
from etils import epath

from navit_jax import checkpoint, reporting


def signal_at(
    owner, name, call=1, number=signal.SIGTERM, times=2, replace=setattr
) -> list:
    """Replaces a function by one that signals this process before its n-th call.

    The handler has run when that call goes on.

    Args:
      times: How many signals are sent, one after the other.
      replace: `setattr`, or that of a monkeypatch.

    Returns:
      The arguments of all calls, as they are made.
    """
    function, calls = getattr(owner, name), []

    def signalled(*args, **kwargs):
        calls.append(args)
        if len(calls) == call:
            for _ in range(times):
                os.kill(os.getpid(), number)
        return function(*args, **kwargs)

    replace(owner, name, signalled)
    return calls


def told(workdir) -> list[dict]:
    """The records of a run, but for times."""
    times = ("throughput/", "seconds_per_image")
    return [
        {k: v for k, v in record.items() if not any(t in k for t in times)}
        for record in reporting.read_metrics(epath.Path(workdir))
    ]


def assert_same_runs(one, other) -> None:
    """Compares the newest parameters, to the bit, and the records of two runs."""
    first, second = (
        checkpoint.restore_params(epath.Path(workdir) / "checkpoints")
        for workdir in (one, other)
    )
    assert first.step == second.step
    chex.assert_trees_all_equal(first.state, second.state)
    assert told(one) == told(other)
