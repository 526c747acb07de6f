import json
import os
import socket
import subprocess
import sys
import time

import pytest

from navit_jax import run_lock
from navit_jax.errors import ConfigError

HOLD = """
import sys, time
from navit_jax import run_lock
lock = run_lock.hold(sys.argv[1])
print("held", flush=True)
time.sleep(60) if sys.argv[2] == "stay" else None
"""


def start(folder, then):
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder), then], stdout=subprocess.PIPE
    )
    assert process.stdout.readline() == b"held\n"
    return process


def write_owner(folder, **changes):
    owner = {"host": "elsewhere", "pid": 1, "process": "1", "started": time.time()}
    (folder / "lock").write_text(json.dumps(owner | {"token": "abc"} | changes))


def write_beat(folder, age, token="abc"):
    beat = {"token": token, "time": time.time() - age}
    (folder / "lock-heartbeat").write_text(json.dumps(beat))


def test_a_second_process_is_refused_until_the_first_is_gone(tmp_path, caplog):
    first = start(tmp_path, "stay")
    try:
        match = rf"process {first.pid} on \S+, started 20\d\d-.*--take_over"
        with pytest.raises(ConfigError, match=match):
            run_lock.hold(tmp_path)
    finally:
        first.kill()
        first.wait()
        first.stdout.close()
    with run_lock.hold(tmp_path) as lock:
        lock.check()
        assert f"process {first.pid} is gone" in caplog.text
    assert not list(tmp_path.iterdir())


def test_a_process_gives_the_folder_free_when_it_ends(tmp_path):
    with start(tmp_path, "end") as process:
        process.wait()
    assert not list(tmp_path.iterdir())


def test_one_process_can_not_hold_a_folder_twice(tmp_path):
    with run_lock.hold(tmp_path), pytest.raises(ConfigError, match=str(os.getpid())):
        run_lock.hold(tmp_path)


def test_a_pid_that_was_given_again_is_not_the_owner(tmp_path, caplog):
    write_owner(tmp_path, host=socket.gethostname(), pid=os.getpid(), process="1")
    with run_lock.hold(tmp_path):
        assert f"process {os.getpid()} is gone" in caplog.text


@pytest.mark.parametrize("age, alive", [(0, True), (500, True), (700, False)])
def test_a_heartbeat_tells_of_a_run_on_another_host(tmp_path, age, alive, caplog):
    write_owner(tmp_path, started=time.time() - 1e5)
    write_beat(tmp_path, age)
    if alive:
        with pytest.raises(ConfigError, match="process 1 on elsewhere"):
            run_lock.hold(tmp_path)
    else:
        with run_lock.hold(tmp_path):
            assert f"no heartbeat for {age} s" in caplog.text


def test_the_heartbeat_of_an_earlier_owner_does_not_count(tmp_path):
    write_owner(tmp_path)
    write_beat(tmp_path, 1e5, token="earlier")
    with pytest.raises(ConfigError):
        run_lock.hold(tmp_path)


@pytest.mark.parametrize("age, alive", [(0, True), (700, False)])
def test_a_lock_cut_short_is_kept_for_a_while(tmp_path, age, alive):
    (tmp_path / "lock").write_text('{"host": "el')
    os.utime(tmp_path / "lock", (time.time() - age,) * 2)
    if alive:
        with pytest.raises(ConfigError, match="can not be read"):
            run_lock.hold(tmp_path)
    else:
        run_lock.hold(tmp_path).release()


def test_take_over_takes_it_and_the_loser_notices(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(run_lock, "HEARTBEAT_SECONDS", 0.05)
    first = run_lock.hold(tmp_path)
    second = run_lock.hold(tmp_path, take_over=True)
    assert "--take_over was given" in caplog.text
    deadline = time.monotonic() + 5
    with pytest.raises(ConfigError, match="was taken over by process"):  # noqa: PT012
        while time.monotonic() < deadline:
            time.sleep(0.02)
            first.check()
    first.release()
    second.check()
    with pytest.raises(ConfigError):
        run_lock.hold(tmp_path)
    second.release()
    assert not list(tmp_path.iterdir())


def test_a_held_lock_beats(tmp_path, monkeypatch):
    monkeypatch.setattr(run_lock, "HEARTBEAT_SECONDS", 0.02)
    with run_lock.hold(tmp_path):
        before = (tmp_path / "lock-heartbeat").stat().st_mtime_ns
        time.sleep(0.2)
        assert (tmp_path / "lock-heartbeat").stat().st_mtime_ns > before
