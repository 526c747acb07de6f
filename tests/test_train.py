import functools
import json
import signal
import subprocess
import sys

import chex
import jax
import numpy as np
import pytest
import tiny
from etils import epath
from PIL import Image

from navit_jax import (
    checkpoint,
    compile,
    evaluate,
    experiment,
    reporting,
    run_folder,
    sharding,
    signals,
    train,
)
from navit_jax.errors import ConfigError, DataError, NumericsError

EVALS = {
    "validation": {
        "sources": {"clipart": {"name": "clipart", "split": "validation"}},
        "sides": (32, 48),
    }
}


def params(workdir):
    found = checkpoint.restore_params(epath.Path(workdir) / "checkpoints")
    return found.step, jax.device_get(found.state)


def losses(workdir):
    records = reporting.read_metrics(epath.Path(workdir))
    return {r["step"]: r["train/loss"] for r in records if "train/loss" in r}


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("unbroken")
    # Leaves the window of the trace open at the end, and begins after its start.
    config = tiny.config(evals=EVALS, train__report_every=1)
    assert train.train(config, workdir, profile=(5, 9)) == 0
    return workdir


def stop_after(monkeypatch, num_reads):
    """Asks a run to stop when the loop looks for the so-manieth time."""
    reads = iter(range(10**6))
    wanted = property(lambda self: next(reads) >= num_reads)
    monkeypatch.setattr(signals.StopRequest, "requested", wanted)


def test_a_run_leaves_config_metrics_checkpoint_and_evaluation(unbroken):
    assert run_folder.read_config(epath.Path(unbroken))["steps"] == 6
    records = reporting.read_metrics(epath.Path(unbroken))
    last = {k: v for r in records for k, v in r.items()}
    assert [r["step"] for r in records] == [1, 2, 3, 4, 5, 6, 6]
    assert 0 <= last["pack/padding"] < 0.5
    assert last["eval/validation_48/images"] == last["eval/validation_32/images"] > 100
    assert last["throughput/mfu"] < last["throughput/mfu_padded"]
    assert (unbroken / "tensorboard").is_dir()
    assert list((unbroken / "profile").rglob("*.xplane.pb"))
    assert params(unbroken)[0] == 6


def test_a_stopped_run_goes_on_to_the_same_parameters_to_the_bit(
    unbroken, tmp_path, monkeypatch
):
    config = tiny.config(evals=EVALS, train__report_every=1)
    with monkeypatch.context() as patch:
        stop_after(patch, 2)
        assert train.train(config, tmp_path) == 42
    step, _ = params(tmp_path)
    assert step == 4  # asked at step 3, read one step late
    assert train.train(config, tmp_path) == 0
    chex.assert_trees_all_equal(params(tmp_path), params(unbroken))
    assert losses(tmp_path) == losses(unbroken)


def use_devices(monkeypatch, number):
    """Lets a run see the first devices only."""
    make = functools.partial(sharding.make_mesh, devices=jax.devices()[:number])
    # What a config may say of a mesh is read from the signature.
    named = lambda replica=1, fsdp=-1, tensor=1: make(replica, fsdp, tensor)  # noqa: E731
    monkeypatch.setattr(sharding, "make_mesh", named)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_8_then_4_then_1_devices_go_on_with_the_same_batches(
    unbroken, tmp_path, monkeypatch, dtype
):
    for number, passes, code in ((8, 1, 42), (4, 2, 42), (1, 4, 0)):
        config = tiny.config(
            model__dtype=dtype, train__report_every=1, train__accumulate=passes
        )
        with monkeypatch.context() as patch:
            use_devices(patch, number)
            if code:
                stop_after(patch, 0)
            assert train.train(config, tmp_path) == code
    told, wanted = (
        [r for r in reporting.read_metrics(epath.Path(w)) if "position" in r]
        for w in (tmp_path, unbroken)
    )
    assert [r["step"] for r in told] == list(range(1, 7))
    same = ("position", "data/images_seen", "data/tokens_seen", "pack/images_per_row")
    for mine, theirs in zip(told, wanted, strict=True):
        assert {k: mine[k] for k in same} == {k: theirs[k] for k in same}
        if dtype == "float32":
            assert mine["train/loss"] == pytest.approx(theirs["train/loss"], rel=1e-4)


def test_a_stopped_run_reports_what_an_unbroken_one_does(tmp_path, monkeypatch):
    config = tiny.config(train__report_every=4)
    config["train"]["save_every"] = 1  # saved at each step, and stopped all the same
    with monkeypatch.context() as patch:
        stop_after(patch, 1)
        assert train.train(config, tmp_path / "a") == 42
    assert params(tmp_path / "a")[0] < 4
    assert train.train(config, tmp_path / "a") == 0
    assert train.train(config, tmp_path / "b") == 0
    told, wanted = (
        [
            {k: v for k, v in r.items() if not k.startswith("throughput/")}
            for r in reporting.read_metrics(epath.Path(tmp_path / name))
        ]
        for name in "ab"
    )
    assert told == wanted
    assert [r["step"] for r in told] == [1, 4, 6]


def test_a_task_with_a_target_for_each_token_trains_and_is_judged(tmp_path):
    source = {"name": "clipart", "split": "validation", "labels": "none"}
    training = {"name": "clipart", "split": "train", "labels": "none"}
    evals = {"v": {"sources": {"c": source}, "sides": (32,)}}
    config = tiny.config(
        task={"name": "masked_patches"},
        data__sources={"c": training},
        evals=evals,
        steps=12,
        optim__lr=0.01,
    )
    assert train.train(config, tmp_path) == 0
    told = losses(tmp_path)
    assert told[12] < told[1]
    last = reporting.read_metrics(epath.Path(tmp_path))[-1]
    assert last["eval/v_32/images"] == 332
    assert 0 < last["eval/v_32/loss"] < told[1]


def test_evaluation_of_the_folder_gives_what_the_run_said(unbroken):
    records = reporting.read_metrics(epath.Path(unbroken))
    values = evaluate.evaluate(unbroken)
    for name, value in values.items():
        assert records[-1][name] == pytest.approx(value, rel=1e-5), name
    written = json.loads((unbroken / "evaluation.json").read_text())
    assert written["step"] == 6
    assert written["values"] == values


def test_a_set_of_other_classes_is_not_judged(tmp_path):
    other = {"name": "clipart", "split": "validation", "labels": "classes34"}
    evals = {"other": {"sources": {"c": other}, "sides": (32,)}}
    with pytest.raises(ConfigError, match="must share their classes"):
        train.train(tiny.config(evals=evals), tmp_path)


def test_a_folder_of_another_config_is_refused_by_the_keys_that_differ(unbroken):
    with pytest.raises(ConfigError, match=r"optim.lr: 0.001 -> 0.5"):
        train.train(tiny.config(optim__lr=0.5), unbroken)


def test_a_key_that_nothing_reads_is_refused_with_the_nearest(tmp_path):
    config = tiny.config()
    config["data"]["flop"] = 1
    with pytest.raises(ConfigError, match=r"data.flop is unknown; did you mean 'flip'"):
        train.train(config, tmp_path)


def test_too_many_bad_pictures_end_the_run_with_the_table_of_reasons(tmp_path):
    (tmp_path / "data" / "a").mkdir(parents=True)
    for i in range(6):
        Image.new("RGB", (40, 40)).save(tmp_path / "data" / "a" / f"{i}.png")
    for i in range(6):
        (tmp_path / "data" / "a" / f"cut{i}.png").write_bytes(b"")
    sources = {"mine": {"name": "folder", "path": str(tmp_path / "data")}}
    config = tiny.config(data__sources=sources, train__bad_images=0.0005)
    with pytest.raises(DataError, match=r"(?s)of the last .* empty +first: .*cut") as e:
        train.train(config, tmp_path / "run")
    assert e.value.exit_code == 3


def test_too_many_steps_that_are_not_finite_end_the_run_and_name_the_images(tmp_path):
    config = tiny.config(optim__lr=1e38, train__nonfinite_steps=1)
    with pytest.raises(NumericsError, match=r"2 steps were not finite") as e:
        train.train(config, tmp_path)
    assert e.value.exit_code == 4
    named = sorted(tmp_path.glob("nonfinite_step_*.txt"))
    assert len(named) == 2
    assert "clipart:" in named[0].read_text()


def test_the_command_resumes_after_a_signal_and_refuses_a_second_run(tmp_path):
    command = [
        sys.executable, "-m", "navit_jax.train", "--config=configs/smoke.py",
        f"--workdir={tmp_path}", "--config.model.width=32", "--config.model.depth=1",
        "--config.train.report_every=1", "--config.steps=100000",
    ]  # fmt: skip
    with subprocess.Popen(command, cwd=tiny.ROOT, stderr=-1, text=True) as first:
        try:
            said = []
            for line in first.stderr:
                said.append(line)
                if "step 2/" in line:
                    break
            assert first.poll() is None, "".join(said)
            second = subprocess.run(
                command, cwd=tiny.ROOT, capture_output=True, text=True
            )
            assert second.returncode == 2, second.stderr
            assert f"in use by process {first.pid}" in second.stderr
        finally:
            first.send_signal(signal.SIGTERM)
            first.stderr.read()
    assert first.returncode == 42
    saved, _ = params(tmp_path)
    assert saved >= 3


def test_fine_tuning_starts_from_another_run_with_a_new_head_and_longer_positions(
    unbroken,
):
    fresh = _start(tiny.config())
    _, trained = params(unbroken)
    config = tiny.config(
        data__sources={
            "c": {"name": "clipart", "split": "train", "labels": "classes34"}
        },
        model__positions={"name": "factorized", "length": 40},
        model__init={
            "workdir": str(unbroken),
            "rules": [["head/.*", ""], ["(.*)", r"\1"]],
            "resample": [["encoder/position_embedding/.*", "copy"]],
            "allow_unused": ["head/.*"],
        },
    )
    started = _start(config)
    blocks = started["encoder"]["blocks"]
    chex.assert_trees_all_equal(blocks, trained["encoder"]["blocks"])
    table = started["encoder"]["position_embedding"]["tables"]
    old = trained["encoder"]["position_embedding"]["tables"]
    assert table.shape[1] == 40
    np.testing.assert_array_equal(table[:, :32], old)
    assert started["head"]["dense"]["kernel"].shape[-1] == 34
    with pytest.raises(AssertionError):
        chex.assert_trees_all_equal(blocks, fresh["encoder"]["blocks"])
    del config["model"]["init"]["allow_unused"]
    with pytest.raises(ConfigError, match="parameters of the source are not used"):
        _start(config)


def _start(config):
    """The parameters of a run before its first step."""
    mesh = sharding.make_mesh()
    stream = experiment.build_stream(config)
    with jax.set_mesh(mesh):
        task = experiment.build_task(config, stream.num_classes)
        program = compile.Program(config, task, stream.example(), mesh)
        return jax.device_get(program.first_state().params)
