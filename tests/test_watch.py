"""A loop that is slow is told of, and one that hangs ends with 43 and its stacks."""

import subprocess
import sys
import threading
import time

import pytest
import tiny
from etils import epath

from navit_jax import processes, watch


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(watch, "CHECK_SECONDS", 0.05)


@pytest.fixture
def ends(monkeypatch):
    """What would have ended the process."""
    found, ended = [], threading.Event()

    def end(*what):
        found.append(what)
        ended.set()

    monkeypatch.setattr(processes, "end", end)
    yield lambda: ended.wait(10) and found[0]
    assert len(found) == 1


def test_a_hang_writes_what_each_thread_does_and_leaves_with_43(tmp_path, ends):
    with watch.Watch(epath.Path(tmp_path), 0.3) as looking:
        looking.tell("step 7")
        code, message = ends()
    assert code == 43
    assert message.startswith("step 7: nothing has happened for 0 s")
    said = (tmp_path / "hung_0.txt").read_text()
    assert "config.train.hang_seconds" in said
    # This thread, which waits here, is among them.
    assert "test_a_hang_writes_what" in said


def test_a_folder_that_hangs_or_is_full_keeps_nobody(tmp_path, ends):
    (tmp_path / "file").touch()
    with watch.Watch(epath.Path(tmp_path / "file" / "run"), 0.2) as looking:
        looking.tell("saving step 3")
        code, message = ends()
    assert code == 43
    assert message.startswith("saving step 3: nothing has happened")


def test_what_goes_on_and_what_may_take_any_time_is_no_hang(tmp_path, monkeypatch):
    ended = []
    monkeypatch.setattr(processes, "end", lambda *what: ended.append(what))
    with watch.Watch(epath.Path(tmp_path), 0.4) as looking:
        for step in range(6):
            looking.tell(f"step {step}")
            time.sleep(0.15)
        looking.tell("")
        time.sleep(0.7)
    with watch.Watch(epath.Path(tmp_path), 0) as looking:
        looking.tell("step 8")
        time.sleep(0.3)
    assert not ended


def test_what_is_slow_is_told_once(tmp_path, caplog):
    with watch.Watch(epath.Path(tmp_path), 0) as looking:
        for step in (1, 2):
            looking.tell(f"reading the images of step {step}", 0.2)
            time.sleep(0.5 if step == 1 else 0.05)
    slow = [line for line in caplog.messages if line.startswith("slow: ")]
    assert slow == [
        "slow: reading the images of step 1 takes more than 0 s; it is the only process"
    ]


@pytest.mark.slow
def test_the_process_that_the_others_wait_for_is_named(tmp_path):
    program = (
        "import sys, time; from navit_jax import command_line, data, train\n"
        "load = data.LoadBatch.__getitem__\n"
        "def stall(self, k):\n"
        "    import jax; late = jax.process_index() == 1 and k == 3\n"
        "    time.sleep(600 if late else 0); return load(self, k)\n"
        "data.LoadBatch.__getitem__ = stall\n"
        "command_line.run(train.define_main())\n"
    )
    command = [
        sys.executable, tiny.ROOT / "launch" / "cluster.py", "2", "--", sys.executable,
        "-c", program, "--config=configs/smoke.py", f"--workdir={tmp_path}",
        "--config.steps=9", "--config.data.rows=8", "--config.data.prefetch=0",
        "--config.data.threads=0", "--config.train.hang_seconds=30",
    ]  # fmt: skip
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, cwd=tiny.ROOT
    )
    assert done.returncode == 43, done.stdout
    # Who waits for nobody is at an earlier thing than all others.
    assert "process 1 (" in done.stdout
    assert "reading the images of step 4" in done.stdout
    assert "stall" in (tmp_path / "hung_1.txt").read_text()
