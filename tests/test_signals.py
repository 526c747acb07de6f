import itertools
import os
import signal
import subprocess
import sys

import numpy as np
import psutil
import pytest
import tiny

from navit_jax import experiment, signals


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_asks_to_stop_and_ends_nothing(number):
    before = signal.getsignal(number)
    with signals.stop_requests() as stop:
        assert not stop.requested
        os.kill(os.getpid(), number)
        assert stop.requested
    assert signal.getsignal(number) == before


def test_a_second_interrupt_leaves_at_once_but_a_second_sigterm_does_not():
    with signals.stop_requests() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.requested
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_a_signal_while_stderr_is_being_written_raises_nothing():
    # Python forbids to write to a stream in a handler that interrupted its write.
    code = """
import os, signal, sys, threading, time
from navit_jax import signals
def kill():
    time.sleep(1)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(0.5)
    print("asked", flush=True)
threading.Thread(target=kill).start()
with signals.stop_requests() as stop:
    sys.stderr.write("x" * 200_000)
sys.exit(42 if stop.requested else 1)
"""
    command = [sys.executable, "-c", code]
    buffered = {k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"}
    with subprocess.Popen(command, stdout=-1, stderr=-1, env=buffered) as process:
        assert process.stdout.readline() == b"asked\n"
        said = process.stderr.read()
    assert process.returncode == 42, said[-2000:]


def test_workers_leave_signals_to_the_run():
    config = tiny.config(data__workers=1, data__prefetch=1)
    batches = experiment.build_stream(config).batches(np.arange(8))
    next(batches)
    children = psutil.Process().children()
    workers = [c for c in children if "spawn_main" in " ".join(c.cmdline())]
    assert workers
    for worker in workers:
        worker.send_signal(signal.SIGINT)
        worker.send_signal(signal.SIGTERM)
    # More than were ready before.
    assert len(list(itertools.islice(batches, 50))) == 50
    batches.close()


@pytest.mark.slow
def test_workers_end_with_the_run(tmp_path):
    code = """
import os, signal, sys
from absl import flags
flags.FLAGS.mark_as_parsed()
import numpy as np, psutil, tiny
from navit_jax import experiment
if __name__ == "__main__":
    config = tiny.config(data__workers=1)
    batches = experiment.build_stream(config).batches(np.arange(8))
    next(batches)
    children = psutil.Process().children()
    workers = [c.pid for c in children if "spawn_main" in " ".join(c.cmdline())]
    print(*workers, file=open(sys.argv[1], "w"), flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""
    program, pids = tmp_path / "program.py", tmp_path / "pids"
    program.write_text(code)
    environment = {**os.environ, "PYTHONPATH": str(tiny.ROOT / "tests")}
    killed = subprocess.run([sys.executable, program, pids], env=environment)
    assert killed.returncode == -signal.SIGKILL
    numbers = [int(pid) for pid in pids.read_text().split()]
    assert numbers
    there = [psutil.Process(pid) for pid in numbers if psutil.pid_exists(pid)]
    _, alive = psutil.wait_procs(there, timeout=20)
    for process in alive:
        process.kill()
    assert not alive
