"""A run's folder on object storage: no append, no rename, no lock."""

import contextlib
import io
import json
import stat
import time

import numpy as np
import pytest
import tiny
from etils import epath
from etils.epath import backend, gpath, stat_utils

from navit_jax import checkpoint, reporting, roll_call, run_lock, storage, train
from navit_jax.errors import ConfigError


class Bucket(backend.Backend):
    """Objects by name, in memory: written whole, read, listed, deleted; no more."""

    def __init__(self):
        self.objects, self.written = {}, []

    def _name(self, path):
        return str(path).removeprefix("s3://").rstrip("/")

    def open(self, path, mode):
        name = self._name(path)
        if mode in ("r", "rb"):
            if name not in self.objects:
                raise FileNotFoundError(name)
            data = self.objects[name][0]
            return io.BytesIO(data) if mode == "rb" else io.StringIO(data.decode())
        assert mode in ("w", "wb"), f"object storage has no mode {mode!r}"
        return contextlib.closing(self._writer(name, mode))

    def _writer(self, name, mode):
        own, file = self, io.BytesIO() if mode == "wb" else io.StringIO()
        close = file.close

        def put():
            data = file.getvalue()
            data = data if mode == "wb" else data.encode()
            own.objects[name] = (data, time.time())
            own.written.append(name)
            close()

        file.close = put
        return file

    def exists(self, path):
        return self._name(path) in self.objects or self.isdir(path)

    def isdir(self, path):
        prefix = self._name(path) + "/"
        return any(name.startswith(prefix) for name in self.objects)

    def listdir(self, path):
        prefix = self._name(path) + "/"
        rest = [n.removeprefix(prefix) for n in self.objects if n.startswith(prefix)]
        return sorted({name.split("/")[0] for name in rest})

    def mkdir(self, path, *, exist_ok=False, mode=None):
        pass

    makedirs = mkdir

    def remove(self, path):
        if self.objects.pop(self._name(path), None) is None:
            raise FileNotFoundError(path)

    def stat(self, path):
        data, changed = self.objects[self._name(path)]
        return stat_utils.StatResult(
            is_directory=False, length=len(data), mtime=int(changed),
            mode=stat.S_IFREG, owner=None, group=None,
        )  # fmt: skip

    def refuse(self, *_, **__):
        raise AssertionError("object storage has no such thing")

    rename = replace = copy = walk = glob = rmtree = refuse


@pytest.fixture
def bucket(monkeypatch):
    made = Bucket()
    monkeypatch.setitem(gpath._PREFIX_TO_BACKEND, "s3", made)
    monkeypatch.setattr(storage, "SETTLE_SECONDS", 0.05)
    return made


def folder():
    return epath.Path("s3://bucket/run")


def test_a_log_is_kept_in_parts_that_are_read_as_one(bucket, monkeypatch):
    monkeypatch.setattr(storage, "PART_LINES", 3)
    path = folder() / "log.jsonl"
    log, lines = storage.Log(path, []), []
    for number in range(8):
        log.append(f"line {number}")
        lines.append(f"line {number}")
        assert storage.read_log(path) == lines
    names = [f"bucket/run/{name}.jsonl" for name in ("log", "log-1", "log-2")]
    assert set(bucket.objects) == {*names}
    # Only the last part is written with a line.
    assert bucket.written[-1] == names[-1]
    assert bucket.written.count(names[0]) == 1 + 3
    # It goes on from fewer lines: the rest is gone, and what stays is not written.
    bucket.written.clear()
    storage.Log(path, lines[:4]).append("other")
    assert storage.read_log(path) == [*lines[:4], "other"]
    assert set(bucket.written) == {names[1]}


def test_parts_that_were_copied_to_a_disk_become_one_file(tmp_path):
    path = epath.Path(tmp_path) / "log.jsonl"
    path.write_text("a\nb\n")
    (path.parent / "log-1.jsonl").write_text("c\n")
    assert storage.read_log(path) == ["a", "b", "c"]
    storage.Log(path, storage.read_log(path)).append("d")
    assert path.read_text() == "a\nb\nc\nd\n"
    assert [p.name for p in path.parent.iterdir()] == ["log.jsonl"]


def test_of_two_who_create_an_object_at_one_time_one_succeeds(bucket, monkeypatch):
    path, outcomes = folder() / "lock", []

    def other(seconds):
        if not outcomes:
            outcomes.append("begun")
            # It saw none either; what it writes comes last.
            path.write_text("second")

    monkeypatch.setattr(storage.time, "sleep", other)
    assert not storage.create(path, "first")
    assert path.read_text() == "second"
    assert not storage.create(path, "third")
    path.unlink()
    assert storage.create(path, "fourth")


def test_a_second_run_is_refused_and_the_first_gives_the_folder_free(bucket):
    with run_lock.hold(folder()):
        with pytest.raises(ConfigError, match="is in use by process"):
            run_lock.hold(folder())
        with run_lock.hold(folder(), take_over=True) as second:
            second.check()
    assert not bucket.objects


def test_who_is_there_is_told(bucket, monkeypatch):
    monkeypatch.setattr(roll_call, "BEAT_SECONDS", 0.02)
    calls = roll_call.RollCall(folder(), 1)
    calls.tell("step 3")
    (folder() / "processes" / "0.json").write_text(json.dumps({"beats": 4}))
    there = calls.read(3)
    # 0 has left it by an earlier run, and 2 never came.
    assert list(there) == [1]
    assert there[1]["doing"] == "step 3"
    calls.close()
    assert list(bucket.objects) == ["bucket/run/processes/0.json"]


def test_a_run_trains_and_goes_on_there(bucket, tmp_path, monkeypatch):
    # Checkpoints are orbax's, which speaks with storage itself.
    kept = checkpoint.Checkpoints

    def locally(**options):
        return kept(**{**options, "folder": tmp_path / "checkpoints"})

    monkeypatch.setattr(train.checkpoint, "Checkpoints", locally)
    monkeypatch.setattr(train.config_lib, "call", called(train.config_lib.call))
    config = tiny.config(steps=4, train__report_every=1, train__save_every=2)
    first = tiny.config(steps=2, train__report_every=1)
    constant = {"optim": {**config["optim"], "schedule": {"name": "constant"}}}
    assert train.train(first | constant, str(folder())) == 0
    code = train.train(config | constant, str(folder()), allow_config_change=True)
    assert code == 0
    records = reporting.read_metrics(folder())
    losses = [r["train/loss"] for r in records if "train/loss" in r]
    assert len(losses) == 4
    assert np.isfinite(losses).all()
    names = {name.removeprefix("bucket/run/") for name in bucket.objects}
    assert names == {"config.json", "environment.json", "classes.json", "metrics.jsonl"}


def called(call):
    """`config.call`, of what stands in for a factory."""

    def called_so(factory, section, where, **given):
        if where != "checkpoint":
            return call(factory, section, where, **given)
        return factory(**section, **given)

    return called_so
