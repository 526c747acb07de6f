"""launch/cluster.py, and how processes of one run meet, fail and end together."""

import os
import pathlib
import re
import signal
import subprocess
import sys
import time

import jax
import pytest
import tiny

from navit_jax import processes

CLUSTER = tiny.ROOT / "launch" / "cluster.py"
# Two processes that exchange numbers, as a step does; one of them may do otherwise.
PROGRAM = """
import os, sys, time
from absl import app, flags
from navit_jax import command_line, processes

start = processes.define_flags()
trouble = flags.DEFINE_string("trouble", "", "Of process 1")
folder = flags.DEFINE_string("folder", "", "")

def main():
    start(folder.value)
    import jax, numpy
    from jax.experimental import multihost_utils
    index = jax.process_index()
    if trouble.value == "other":
        processes.check_same({"optim": {"lr": 0.1 + index}}, "runs/one")
    for step in range(20):
        sums = multihost_utils.process_allgather(numpy.array([index + step]))
        if index == 1 and step == 3:
            if trouble.value == "killed":
                os.kill(os.getpid(), 9)
            if trouble.value == "stopped":
                os.kill(os.getpid(), 19)
            if trouble.value == "bug":
                raise ValueError("a bug of its own")
            if trouble.value == "exit":
                sys.exit(3)
            if trouble.value == "interrupt":
                raise KeyboardInterrupt
            if trouble.value == "memory":
                raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: of a barrier")
    print("sum", sums.sum(), "of", jax.device_count(), "devices")

command_line.run(main)
"""


def run(*words, timeout=120, env=None):
    """What launch/cluster.py prints, by line, and its exit code."""
    done = subprocess.run(
        [sys.executable, CLUSTER, *words],
        capture_output=True,
        text=True,
        timeout=timeout,
        env={**os.environ, "PYTHONPATH": str(tiny.ROOT), **(env or {})},
    )
    return done.stdout.splitlines(), done.returncode


def meet(folder, trouble="", *more):
    command = [sys.executable, "-c", PROGRAM, f"--folder={folder}"]
    return run("2", "--devices=2", "--", *command, f"--trouble={trouble}", *more)


def own(lines, index):
    """What one process said."""
    return "\n".join(line for line in lines if line.startswith(f"[{index}] "))


def test_two_processes_are_one_run(tmp_path):
    lines, code = meet(tmp_path)
    assert code == 0, "\n".join(lines)
    for index in (0, 1):
        assert "sum 39 of 4 devices" in own(lines, index)
    # Who ends is not there any more.
    assert not list((tmp_path / "processes").iterdir())


@pytest.mark.parametrize(
    "trouble, code, message",
    [
        ("killed", 137, ""),
        ("bug", 1, "a bug of its own"),
        ("exit", 3, ""),
        ("interrupt", 130, "interrupted"),
        ("memory", 1, "RESOURCE_EXHAUSTED"),
    ],
)
def test_who_lost_another_leaves_with_44_and_who_failed_with_its_own(
    trouble, code, message, tmp_path
):
    lines, left = meet(tmp_path, trouble)
    assert left == code, "\n".join(lines)
    assert "process 0 left with 44" in lines
    assert f"process 1 left with {code}" in lines
    assert message in own(lines, 1)
    assert "a process was lost" in own(lines, 0)
    assert "a process was lost" not in own(lines, 1)


def test_a_silent_process_is_lost_too(tmp_path):
    # It can not answer, and no connection breaks; so its own runtime can not end it.
    begun = time.monotonic()
    lines, left = run(
        "2", "--devices=2", "--grace=1", "--", sys.executable, "-c", PROGRAM,
        f"--folder={tmp_path}", "--trouble=stopped", "--heartbeat_timeout=5",
    )  # fmt: skip
    assert "process 0 left with 44" in lines, "\n".join(lines)
    assert "process 1 is still there: killed" in lines
    assert left == 44
    assert time.monotonic() - begun < 60


def test_other_configs_are_found_before_anything_is_compiled(tmp_path):
    lines, left = meet(tmp_path, "other")
    assert left == 2, "\n".join(lines)
    for index in (0, 1):
        assert "process 1: config.optim.lr: 0.1 -> 1.1" in own(lines, index)


def test_who_is_missing_is_named(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, f"--folder={tmp_path}", "--start_timeout=2",
         "--coordinator=127.0.0.1:1", "--num_processes=3", "--process_id=1"],
        capture_output=True, text=True, timeout=60,
        env={**os.environ, "PYTHONPATH": str(tiny.ROOT)},
    )  # fmt: skip
    assert done.returncode == 44
    assert "not there: 0, 2 of 3; process 1 (" in done.stderr
    for part in ("--worker=all", "127.0.0.1:1"):
        assert part in done.stderr


def test_a_folder_that_can_not_be_written_is_refused_before_anybody_is_met(tmp_path):
    (tmp_path / "file").touch()
    lines, code = meet(tmp_path / "file" / "run")
    assert code == 2, "\n".join(lines)
    assert "the run's folder" in own(lines, 0)
    assert "can not be written" in own(lines, 0)


ECHO = "import os, signal, sys, time; leave = lambda *_: sys.exit(42); "
ECHO += "signal.signal(15, leave); signal.signal(1, leave); "
ECHO += "print('ready', flush=True); time.sleep(60)"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_signals_are_passed_on_and_a_common_code_is_handed_back(number):
    command = [sys.executable, CLUSTER, "3", "--", sys.executable, "-c", ECHO]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    said = ""
    while len(re.findall("ready", said)) < 3:
        said += process.stdout.readline()
    process.send_signal(number)
    rest, _ = process.communicate(timeout=30)
    assert process.returncode == 42
    assert len(re.findall(r"process \d left with 42", rest)) == 3


@pytest.mark.parametrize(
    "text, lost",
    [
        ("UNAVAILABLE: connection refused", True),
        ("DEADLINE_EXCEEDED: Barrier timed out", True),
        ("UNKNOWN: Gloo AllGather failed: Read error: Connection reset by peer", True),
        ("INTERNAL: NCCL operation failed: remote process exited", True),
        ("RESOURCE_EXHAUSTED: jit(step)/optimization_barrier", False),
        ("INTERNAL: Mosaic failed", False),
        ("INVALID_ARGUMENT: gloo", False),
        ("the heartbeat of the barrier", False),
    ],
)
def test_only_the_runtime_says_that_a_process_was_lost(text, lost):
    assert processes.is_lost(jax.errors.JaxRuntimeError(text)) == lost
    assert processes.is_lost(ValueError(text)) == lost
    assert not processes.is_lost(KeyError(text))


def test_what_a_killed_process_has_started_ends_with_it():
    program = "import os, subprocess, sys, time; i = os.environ['JAX_PROCESS_ID']\n"
    program += "i == '1' and sys.exit(7)\n"
    program += "child = subprocess.Popen(['sleep', '50']); print('child', child.pid)\n"
    program += "time.sleep(50)"
    lines, code = run("2", "--grace=1", "--", sys.executable, "-c", program, timeout=30)
    assert code == 7
    child = int(re.search(r"child (\d+)", own(lines, 0))[1])
    deadline = time.monotonic() + 5
    while pathlib.Path(f"/proc/{child}").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    status = pathlib.Path(f"/proc/{child}/stat")
    assert not status.exists() or " Z " in status.read_text()


def test_who_does_not_leave_after_a_failure_is_killed():
    program = (
        "import os, sys, time; os.environ['JAX_PROCESS_ID'] == '1' and sys.exit(7)"
    )
    lines, code = run("2", "--grace=1", "--", sys.executable, "-c",
                      f"{program}; time.sleep(60)", timeout=30)  # fmt: skip
    assert code == 7
    assert "process 0 is still there: killed" in lines
