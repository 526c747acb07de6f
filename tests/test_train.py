import functools
import json
import signal
import subprocess
import sys
import time

import chex
import commands
import jax
import kills
import numpy as np
import pytest
import tiny
from etils import epath
from PIL import Image

from navit_jax import (
    checkpoint,
    compile,
    culprits,
    data,
    evaluate,
    evaluator,
    experiment,
    host_signals,
    records,
    reporting,
    run_folder,
    sharding,
    train,
    train_state,
    watch,
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


def small(**changes):
    """Six steps, judged after the third and the last."""
    changes = {"train__report_every": 1, "train__evaluate_every": 3, **changes}
    return tiny.config(evals=EVALS, **{**tiny.PLAIN, **changes})


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("unbroken")
    # Leaves the window of the trace open at the end, and begins after its start.
    assert train.train(small(), workdir, profile=(5, 9)) == 0
    return workdir


def test_a_run_leaves_config_metrics_checkpoint_and_evaluation(unbroken):
    assert run_folder.read_config(epath.Path(unbroken))["steps"] == 6
    records = reporting.read_metrics(epath.Path(unbroken))
    last = {k: v for r in records for k, v in r.items()}
    assert [r["step"] for r in records] == [1, 2, 3, 3, 4, 5, 6, 6]
    assert 0 <= last["pack/padding"] < 0.5
    assert last["eval/validation_48/images"] == last["eval/validation_32/images"] > 100
    assert last["throughput/mfu"] < last["throughput/mfu_padded"]
    assert (unbroken / "tensorboard").is_dir()
    assert list((unbroken / "profile").rglob("*.xplane.pb"))
    assert params(unbroken)[0] == 6


# Of a run of six steps: the function that is interrupted, at which of its calls, how
# often it has been called when the run has left, and what is saved then.
INTERRUPTED = {
    "the build": (compile.Program, "step", 1, 1, []),
    "compilation": (train_state, "train_step", 1, 1, [3]),
    "a step": (host_signals, "encode", 4, 6, [3, 6]),  # read a step late
    "a save": (records, "make", 1, 1, [3]),
    # After three steps, the first of many batches to judge, which is placed twice.
    "an evaluation": (sharding, "place", 5, 5, [3]),
    "the last evaluation": (evaluator.Evaluator, "_run_one", 4, 4, [3, 6]),
}


@pytest.mark.parametrize("point", INTERRUPTED)
def test_a_run_told_to_stop_saves_once_and_goes_on_without_a_trace(
    point, unbroken, tmp_path, monkeypatch, caplog
):
    caplog.set_level("INFO", "absl")
    owner, name, call, num_calls, saved = INTERRUPTED[point]
    with monkeypatch.context() as patch:
        calls = kills.signal_at(owner, name, call, replace=patch.setattr)
        assert train.train(small(), tmp_path) == 42
    assert len(calls) == num_calls
    left = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert left == [str(step) for step in saved]
    assert f"goes on after step {max(saved, default=0)}" in caplog.text
    assert not list(tmp_path.glob("lock*"))
    # A third time there is nothing to do, and nothing more to tell.
    for _ in range(2):
        assert train.train(small(), tmp_path) == 0
        kills.assert_same_runs(tmp_path, unbroken)


def test_a_second_interrupt_in_a_save_leaves_at_once_and_tears_nothing(
    tmp_path, monkeypatch
):
    hook = {"number": signal.SIGINT, "replace": monkeypatch.setattr}
    kills.signal_at(records, "make", 2, **hook)
    with pytest.raises(KeyboardInterrupt):
        train.train(small(), tmp_path)
    left = [path.name for path in (tmp_path / "checkpoints").iterdir()]
    assert left == ["3"]
    assert params(tmp_path)[0] == 3
    assert not list(tmp_path.glob("lock*"))


def test_another_folder_goes_on_from_a_run_to_the_same_parameters_to_the_bit(
    unbroken, tmp_path, monkeypatch
):
    first, second = tmp_path / "first", tmp_path / "second"
    with monkeypatch.context() as patch:
        kills.signal_at(records, "make", 1, replace=patch.setattr)
        assert train.train(small(), first) == 42
    before = {p: p.stat().st_mtime_ns for p in first.rglob("*")}
    config = small()
    config["checkpoint"]["resume"] = str(first)
    config["model"]["init"] = {"workdir": str(tmp_path / "none")}  # comes after it
    assert train.train(config, second) == 0
    chex.assert_trees_all_equal(params(second), params(unbroken))
    assert kills.told(second) == kills.told(unbroken)[4:]
    assert {p: p.stat().st_mtime_ns for p in first.rglob("*")} == before


def test_other_data_are_no_continuation(tmp_path, unbroken):
    config = small(data__tokens=48, steps=8)
    config["checkpoint"]["resume"] = str(unbroken)
    with pytest.raises(ConfigError, match="stream of images"):
        train.train(config, tmp_path / "run")


def test_a_run_that_has_done_all_steps_is_no_origin(tmp_path, unbroken):
    config = small()
    config["checkpoint"]["resume"] = str(unbroken)
    with pytest.raises(
        ConfigError, match=r"goes on after step 6: raise config.steps=6"
    ):
        train.train(config, tmp_path)


def test_after_the_first_step_nothing_compiles_and_nothing_moves_by_itself(
    tmp_path, monkeypatch
):
    # The first step, its evaluation and its checkpoint compile what there is.
    config = tiny.config(evals=EVALS, train__report_every=1, train__save_every=1)
    config["train"]["evaluate_every"] = 1
    steps, compiled = [], []
    begin = host_signals.encode
    listener = lambda name, _, **__: (  # noqa: E731
        compiled.append((len(steps), name)) if "/jax/core/compile" in name else None
    )

    def step(*args):
        steps.append(args)
        if len(steps) == 2:
            jax.config.update("jax_transfer_guard", "disallow")
        return begin(*args)

    monkeypatch.setattr(host_signals, "encode", step)
    jax.monitoring.register_event_duration_secs_listener(listener)
    try:
        assert train.train(config, tmp_path) == 0
    finally:
        jax.monitoring.unregister_event_duration_listener(listener)
        jax.config.update("jax_transfer_guard", "allow")
    assert len(steps) == 6
    assert {number for number, _ in compiled} == {0, 1}


def test_a_slow_reader_is_named_and_the_run_goes_on(tmp_path, monkeypatch, caplog):
    load = data.LoadBatch.__getitem__

    def stall(self, k):
        time.sleep(0.8 if k == 1 else 0)
        return load(self, k)

    monkeypatch.setattr(data.LoadBatch, "__getitem__", stall)
    monkeypatch.setattr(train, "SLOW_READER_SECONDS", 0.4)
    monkeypatch.setattr(watch, "CHECK_SECONDS", 0.1)
    # Nothing is read ahead, so that the stall is not hidden.
    config = tiny.config(steps=3, data__prefetch=0, data__threads=0)
    assert train.train(config, tmp_path) == 0
    said = "slow: reading the images of step 2 takes more than 0 s; it is the only"
    assert said in caplog.text
    assert caplog.text.count("slow: ") == 1


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
            model__dtype=dtype, train__report_every=1, train__accumulate=passes,
            **tiny.PLAIN,
        )  # fmt: skip
        with monkeypatch.context() as patch:
            use_devices(patch, number)
            if code:
                # Asked before its first step.
                kills.signal_at(data.Stream, "batches", 1, replace=patch.setattr)
            assert train.train(config, tmp_path) == code
    mine_all, wanted = (
        [r for r in kills.told(w) if "position" in r] for w in (tmp_path, unbroken)
    )
    assert [r["step"] for r in mine_all] == list(range(1, 7))
    same = ("position", "data/images_seen", "data/tokens_seen", "pack/images_per_row")
    for mine, theirs in zip(mine_all, wanted, strict=True):
        assert {k: mine[k] for k in same} == {k: theirs[k] for k in same}
        if dtype == "float32":
            assert mine["train/loss"] == pytest.approx(theirs["train/loss"], rel=1e-4)


def test_a_stopped_run_reports_what_an_unbroken_one_does(tmp_path, monkeypatch):
    config = tiny.config(train__report_every=4)
    config["train"]["save_every"] = 1  # saved at each step, and stopped all the same
    with monkeypatch.context() as patch:
        kills.signal_at(host_signals, "encode", 1, replace=patch.setattr)
        assert train.train(config, tmp_path / "a") == 42
    assert params(tmp_path / "a")[0] < 4
    assert train.train(config, tmp_path / "a") == 0
    assert train.train(config, tmp_path / "b") == 0
    assert kills.told(tmp_path / "a") == kills.told(tmp_path / "b")
    assert [r["step"] for r in kills.told(tmp_path / "a")] == [1, 4, 6]


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
        **tiny.PLAIN,
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
    for name in kills.told(unbroken)[-1].keys() - {"step"}:
        assert records[-1][name] == pytest.approx(values[name], rel=1e-5), name
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


def test_a_best_that_no_evaluation_writes_is_refused(tmp_path):
    config = tiny.config(checkpoint__best="eval/validation/accuracy")
    with pytest.raises(ConfigError, match=r"best='eval/validation/accuracy' is of no"):
        train.train(config, tmp_path)


def test_too_many_bad_pictures_end_the_run_with_the_table_of_reasons(tmp_path):
    (tmp_path / "data" / "a").mkdir(parents=True)
    for i in range(6):
        Image.new("RGB", (40, 40)).save(tmp_path / "data" / "a" / f"{i}.png")
    for i in range(6):
        (tmp_path / "data" / "a" / f"cut{i}.png").write_bytes(b"")
    sources = {"mine": {"name": "folder", "path": str(tmp_path / "data")}}
    config = tiny.config(data__sources=sources, train__bad_images=0.0005, **tiny.PLAIN)
    with pytest.raises(DataError, match=r"(?s)of the last .* empty +first: .*cut") as e:
        train.train(config, tmp_path / "run")
    assert e.value.exit_code == 3


def test_too_many_steps_that_are_not_finite_end_the_run_and_name_the_images(
    tmp_path, monkeypatch
):
    config = tiny.config(optim__lr=1e38, train__nonfinite_steps=1, **tiny.PLAIN)
    # Looking for culprits, too, moves nothing but what it says.
    find = jax.transfer_guard("disallow")(culprits.find)
    monkeypatch.setattr(culprits, "find", find)
    with pytest.raises(NumericsError, match=r"2 steps were not finite") as e:
        train.train(config, tmp_path)
    assert e.value.exit_code == 4
    named = sorted(tmp_path.glob("nonfinite_step_*.txt"))
    assert len(named) == 2
    assert "alone not finite: clipart:" in named[0].read_text()


def test_a_culprit_with_the_number_0_is_named_and_empty_slots_are_not():
    host, info = next(experiment.build_stream(tiny.config()).batches(np.arange(8)))
    row, slot = np.argwhere(host.image_mask)[-1]
    ids = np.where(host.image_mask[..., None], host.image_ids + 1, 0)
    ids[row, slot] = 0
    host = host.replace(image_ids=ids.astype(np.uint32))
    assert not host.image_mask.all()

    def judge(batch):
        return np.where((batch.image_ids == 0).all(-1) & batch.image_mask, np.nan, 0.0)

    assert culprits.find(judge, host, info) == [info.keys[row][slot]]


@pytest.mark.parametrize("bad", [[], [(0, 0)], [(0, 0), (5, 1), (5, 2)]])
def test_of_several_processes_each_judges_as_often_whatever_it_finds(
    bad, monkeypatch, tmp_path
):
    host, info = next(experiment.build_stream(tiny.config()).batches(np.arange(8)))
    ids, calls = [tuple(host.image_ids[place]) for place in bad], []
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(jax, "process_index", lambda: 1)

    def judge(batch):
        calls.append(batch)
        hit = [(batch.image_ids == image).all(-1) for image in ids]
        found = np.any(hit, 0) if hit else np.zeros(batch.image_mask.shape, bool)
        return np.where(found & batch.image_mask, np.nan, 0.0)

    named = culprits.find(judge, host, info)
    assert named == [info.keys[row][slot] for row, slot in bad]
    assert len(calls) == 1 + host.image_mask.shape[1]
    metrics = {"loss": np.nan, "gradient_norm": np.nan}
    path = culprits.report(epath.Path(tmp_path), 3, named, info, metrics)
    assert path.name == "nonfinite_step_3_1.txt"


def command(workdir, *flags):
    return [
        sys.executable, "-m", "navit_jax.train", "--config=configs/smoke.py",
        f"--workdir={workdir}", "--config.model.width=32", "--config.model.depth=1",
        "--config.train.report_every=1", *flags,
    ]  # fmt: skip


def test_the_command_leaves_with_42_and_refuses_a_second_run(tmp_path):
    endless = command(tmp_path, "--config.steps=100000")
    with subprocess.Popen(endless, cwd=tiny.ROOT, stderr=-1, text=True) as first:
        try:
            said = []
            for line in first.stderr:
                said.append(line)
                if "step 2/" in line:
                    break
            assert first.poll() is None, "".join(said)
            second = commands.run("navit_jax.train", *endless[3:])
            assert second.returncode == 2, second.stderr
            assert f"in use by process {first.pid}" in second.stderr
        finally:
            first.send_signal(signal.SIGTERM)
            first.stderr.read()
    assert first.returncode == 42
    saved, _ = params(tmp_path)
    assert saved >= 3


@pytest.mark.slow
def test_the_command_killed_again_and_again_ends_as_if_it_had_not_been(tmp_path):
    flags = ["--config.steps=20", "--config.train.evaluate_every=5"]
    unbroken, broken = tmp_path / "unbroken", tmp_path / "broken"
    subprocess.run(command(unbroken, *flags), cwd=tiny.ROOT, check=True)
    codes = []
    # Lines of the log: before the first step, in steps, around evaluations and saves.
    for lines in (1, 12, 15, 0):
        process = subprocess.Popen(
            command(broken, *flags), cwd=tiny.ROOT, stderr=-1, text=True
        )
        with process:
            for _ in range(lines):
                process.stderr.readline()
            for _ in range(2 if lines else 0):
                process.send_signal(signal.SIGTERM)
            process.communicate(timeout=120)
        codes.append(process.returncode)
        left = [path.name for path in (broken / "checkpoints").iterdir()]
        assert all(name.isdigit() for name in left), left
    assert set(codes[:-1]) <= {0, 42}, codes
    assert codes[0] == 42, codes
    assert codes[-1] == 0, codes
    kills.assert_same_runs(broken, unbroken)


def test_fine_tuning_starts_from_another_run_with_a_new_head_and_longer_positions(
    unbroken,
):
    fresh = _start(tiny.config(**tiny.PLAIN))
    _, trained = params(unbroken)
    config = tiny.config(
        **tiny.PLAIN,
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
