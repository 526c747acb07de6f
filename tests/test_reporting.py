import io
import math
import struct
import types

import jax
import numpy as np
import pytest
import tqdm
from etils import epath
from tensorboardX.proto import event_pb2

from navit_jax import peak_flops, progress, reporting
from navit_jax.batch import BatchInfo
from navit_jax.errors import CheckpointError
from navit_jax.host_signals import Totals


def test_a_full_disk_ends_the_run_when_its_metrics_can_not_be_written(
    tmp_path, full_at
):
    writer = reporting.MetricWriter(epath.Path(tmp_path))
    writer.write(1, {"train/loss": 0.5})
    full_at((tmp_path / "metrics.jsonl").stat().st_size + 5)
    with pytest.raises(
        CheckpointError, match=r"metrics.jsonl can not be written.*room"
    ):
        writer.write(2, {"train/loss": 0.25})
    full_at(-1)
    writer.close()
    # The cut line is none, and the run that goes on has its history.
    again = reporting.MetricWriter(epath.Path(tmp_path), first_step=1)
    again.write(2, {"train/loss": 0.25})
    again.close()
    assert reporting.read_metrics(epath.Path(tmp_path)) == [
        {"step": 1, "train/loss": 0.5}, {"step": 2, "train/loss": 0.25}
    ]  # fmt: skip


def test_a_disk_full_of_events_ends_the_events_alone(tmp_path, full_at, caplog):
    writer = reporting.MetricWriter(epath.Path(tmp_path))
    writer.write(1, {"a": 1.0})
    (events,) = (tmp_path / "tensorboard").iterdir()
    full_at(events.stat().st_size + 10)
    for step in (2, 3):
        writer.write(step, {"a": 1.0})
    writer.close()
    assert caplog.text.count("TensorBoard events stop here") == 1
    assert [r["step"] for r in reporting.read_metrics(epath.Path(tmp_path))] == [
        1,
        2,
        3,
    ]


def read_events(workdir):
    """The events of all files of a run, in order of writing, parsed by hand."""
    found = []
    for path in sorted((workdir / "tensorboard").iterdir()):
        data = path.read_bytes()
        while data:
            (length,) = struct.unpack("Q", data[:8])
            found.append(event_pb2.Event.FromString(data[12 : 12 + length]))
            data = data[16 + length :]
    return found


def test_events_hold_the_scalars_and_a_resumed_run_hides_what_it_makes_again(tmp_path):
    writer = reporting.MetricWriter(epath.Path(tmp_path))
    writer.write(7, {"train/loss": 0.5, "n": 3, "position": [[0, 0, 1]]})
    writer.close()
    version, start, *scalars = read_events(tmp_path)
    assert version.file_version == "brain.Event:2"
    assert (start.step, start.session_log.status) == (1, event_pb2.SessionLog.START)
    assert [
        (e.step, v.tag, v.simple_value) for e in scalars for v in e.summary.value
    ] == [(7, "train/loss", 0.5), (7, "n", 3)]


def one_device(kind, platform="gpu"):
    return types.SimpleNamespace(device_kind=kind, platform=platform)


def test_the_peak_is_that_of_the_longest_name_in_the_table():
    assert peak_flops.peak_flops(one_device("NVIDIA H200 NVL")) == 989e12
    assert peak_flops.peak_flops(one_device("TPU v5p", "tpu")) == 459e12
    assert peak_flops.peak_flops(one_device("TPU v5 lite", "tpu")) == 197e12


def test_a_gpu_that_is_not_in_the_table_has_no_utilisation(tmp_path, caplog):
    peak = peak_flops.peak_flops(one_device("NVIDIA Unheard Of"))
    assert math.isnan(peak)
    assert "the peak of 'NVIDIA Unheard Of' is not known" in caplog.text
    told = run_progress(tmp_path / "unknown", peak)
    assert told["throughput/images_per_second"] > 0
    assert not any("mfu" in name for name in told)
    known = run_progress(tmp_path / "known", 1e12)
    assert known["throughput/mfu_padded"] > known["throughput/mfu"] > 0
    assert set(known) - set(told) == {"throughput/mfu", "throughput/mfu_padded"}


def run_progress(workdir, peak):
    """The last record of two steps of one row of four tokens, three of them used."""
    workdir.mkdir()
    gathered = progress.Progress(
        writer=reporting.MetricWriter(epath.Path(workdir)), steps=2, report_every=1,
        rows=1, num_tokens=4, peak_flops=peak,
        flops=lambda counts: 1e6 * counts["tokens"] + counts["attention_pairs"],
    )  # fmt: skip
    info = BatchInfo(
        position=[[0, 0, 1]], images_seen=[1], keys=[["a:0"]], skipped=[], notes={},
        shrunk=[],
    )  # fmt: skip
    metrics = {
        "means": {}, "counts": {"images": 1.0, "tokens": 3.0, "attention_pairs": 9.0},
        "gradient_norm": 1.0, "learning_rate": 0.1, "finite": True, "nonfinite": 0,
    }  # fmt: skip
    for step in (1, 2):
        place = Totals(step, 0, False, [[0, 0, step]], step)
        gathered.add(step, info, place, metrics)
    gathered.close()
    return reporting.read_metrics(epath.Path(workdir))[-1]


@pytest.mark.parametrize("process", [0, 1])
def test_a_long_pass_over_pictures_tells_how_many_are_done_on_all_hosts(
    process, monkeypatch
):
    told, masks = io.StringIO(), ([[1, 1, 0]], [[1, 0, 0]])
    hosts = [types.SimpleNamespace(image_mask=np.array(mask)) for mask in masks]
    tables = [np.zeros((5, 2)), np.zeros((1, 2))]
    stream = types.SimpleNamespace(
        plan=types.SimpleNamespace(rows=1, tables=tables),
        batches=lambda rows: zip(hosts, "ab", strict=True),
    )

    def bar(**given):
        # Nothing is told of a pass that is over in seconds.
        assert given["delay"] > 1
        return tqdm.tqdm(**(given | {"delay": 0, "mininterval": 0, "file": told}))

    monkeypatch.setattr(reporting, "tqdm", types.SimpleNamespace(tqdm=bar))
    monkeypatch.setattr(jax, "process_index", lambda: process)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    passed = reporting.watch(stream, "pictures")
    assert [each for _, each in passed] == ["a", "b"]
    if process:
        assert not told.getvalue()
        return
    first, *_, last = told.getvalue().split("\r")[1:]
    assert ("pictures" in first, "0/6" in first, "6/6" in last) == (True, True, True)
