import json
import shutil

import commands
import numpy as np
import pytest
import tiny
from etils import epath

import navit_jax
from navit_jax import (
    baselines,
    calibration,
    evaluate,
    few_shot,
    linear_probe,
    reporting,
    train,
)
from navit_jax.data.records import Selection
from navit_jax.data.resolution import Fixed
from navit_jax.data.sizes import size_table
from navit_jax.data.sources import clipart
from navit_jax.errors import ConfigError, DataError

SET = {"sources": {"clipart": {"name": "clipart", "split": "validation"}}}


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    evals = {"validation": {**SET, "sides": (32,)}}
    config = tiny.config(steps=2, evals=evals, **tiny.PLAIN)
    config["train"] |= {"report_every": 1, "evaluate_every": 1}
    config["optim"] |= {"lr": 0.01, "schedule": {"name": "constant"}}
    assert train.train(config, folder) == 0
    return folder


@pytest.fixture(scope="module")
def values(workdir):
    return evaluate.evaluate(
        workdir, ["native", 32, 96], [9], upscale=[True, False], shots=[1]
    )


@pytest.fixture
def judge_others(workdir, tmp_path):
    """Evaluates a copy of the run whose config has other eval sets."""
    folder = epath.Path(tmp_path) / "run"
    shutil.copytree(workdir, folder)

    def judge(evals, mesh=(), **changes):
        config = json.loads((folder / "config.json").read_text())
        config |= {"evals": evals, "mesh": dict(mesh)}
        (folder / "config.json").write_text(json.dumps(config))
        values = evaluate.evaluate(folder, **changes)
        written = (folder / "evaluation.json").read_text()
        return values, json.loads(written, parse_constant=lambda name: 1 / 0)

    return judge


def plain_grid(size, scale):
    return [max(1, int(pixels * scale / 16 + 1e-9)) for pixels in size]


@pytest.mark.parametrize("upscale", [True, False])
@pytest.mark.parametrize("side", [32, 96, "native"])
def test_tokens_and_the_share_of_enlarged_images_are_those_of_a_loop(
    values, side, upscale
):
    tokens, enlarged = [], []
    for height, width in size_table(clipart("validation")).astype(int).tolist():
        scale = 1.0 if side == "native" else side / np.sqrt(height * width)
        enlarged.append(upscale and scale > 1 + 1e-9)
        tokens.append(
            np.prod(plain_grid((height, width), min(scale, 1e9 if upscale else 1)))
        )
    stem = f"eval/validation{'' if upscale else '_no_upscale'}_{side}"
    assert values[f"{stem}/images"] == len(tokens)
    assert values[f"{stem}/tokens_per_image"] == pytest.approx(np.mean(tokens))
    assert values[f"{stem}/shrunk"] == 0
    assert values[f"{stem}/upscaled"] == pytest.approx(np.mean(enlarged))
    assert values[f"{stem}/seconds_per_image"] > 0


def test_no_image_takes_more_than_its_budget(values):
    assert 4 < values["eval/validation_9tokens/tokens_per_image"] <= 9


def test_probabilities_are_judged_as_the_predictor_gives_them(values, workdir):
    source = clipart("validation")
    probabilities = navit_jax.load(workdir).predict(source, side=96)
    labels = [source[i].labels for i in range(len(source))]
    targets = np.zeros(probabilities.shape)
    for row, own in zip(targets, labels, strict=True):
        row[list(own)] = 1
    confidence = probabilities.max(1)
    right = targets[np.arange(len(targets)), probabilities.argmax(1)]
    nll = -np.log(np.where(targets, probabilities, 1 - probabilities)).sum(1)
    expected = {
        "accuracy": right.mean(),
        "confidence": confidence.mean(),
        "brier": ((probabilities - targets) ** 2).sum(1).mean(),
        "nll": nll.mean(),
        "loss": nll.mean(),
        "calibration_error": calibration.calibration_error(confidence, right),
        "calibrated_error": calibration.calibrated_error(confidence),
    }
    for name, value in expected.items():
        assert values[f"eval/validation_96/{name}"] == pytest.approx(value, abs=1e-5), (
            name
        )


@pytest.mark.parametrize("side, upscale", [(32, True), (96, True), (96, False)])
def test_few_shot_is_least_squares_on_the_embeddings_of_a_few_images(
    values, workdir, side, upscale
):
    model, train_, judged = (
        navit_jax.load(workdir),
        clipart("train"),
        clipart("validation"),
    )
    dial = {"side": side, "upscale": upscale}
    features = model.embed(judged, **dial)
    own, _ = few_shot._features(model, judged, Fixed(side), upscale)
    np.testing.assert_allclose(own, features, atol=1e-4)  # packed otherwise: rounding
    accuracies = []
    for seed in range(5):

        def label_of(index):
            own = train_[index].labels
            return own[0] if len(own) == 1 else -1

        shots = linear_probe.choose_shots(label_of, len(train_), 1, 8, seed)
        few = model.embed([train_[int(i)].image for i in shots], **dial)
        targets = np.full((8, 8), -1.0)
        for row, i in zip(targets, shots, strict=True):
            row[train_[int(i)].labels[0]] = 1
        guesses = linear_probe.predict(features, *linear_probe.fit(few, targets))
        right = [g in judged[i].labels for i, g in enumerate(guesses)]
        accuracies.append(np.mean(right))
    stem = f"eval/validation{'' if upscale else '_no_upscale'}_{side}/1_shot"
    assert values[f"{stem}_accuracy"] == pytest.approx(np.mean(accuracies), abs=1e-2)
    assert values[f"{stem}_std"] == pytest.approx(np.std(accuracies), abs=1e-2)


def test_few_shot_enlarges_images_where_its_set_does(judge_others, monkeypatch):
    asked = []

    def note(model, train_, judged, shots, law, upscale=True):
        asked.append(upscale)
        return {}

    monkeypatch.setattr(evaluate, "few_shot", note)
    judge_others({"v": {**SET, "sides": (32,)}}, upscale=[False, True], shots=[1])
    assert asked == [False, True]


def test_few_shot_leaves_out_pictures_that_can_not_be_used(workdir):
    model, judged = navit_jax.load(workdir), clipart("validation")

    class Broken(Selection):
        def __getitem__(self, index):
            if index == 3:
                raise OSError
            return super().__getitem__(index)

    broken = Broken(judged, np.arange(8))
    used = few_shot._features(model, broken, Fixed(32), True)[1]
    assert used.tolist() == [0, 1, 2, 4, 5, 6, 7]
    with pytest.raises(DataError, match=f"asked of {judged.name} can be used"):
        few_shot._features(model, Broken(judged, np.arange(0)), Fixed(32), True)


@pytest.mark.parametrize(
    "changes, message",
    [
        (
            {"sides": [32, 513.0 + 16]},
            r"^--sides=529.0 reaches 529 px, 33 patches a side, but positions.length=32"
            ": 512 px, 1024 patches, are the most",
        ),
        ({"budgets": [1100]}, r"^--budgets=1100 reaches 528 px, 33 patches a side"),
        ({"shots": [10_000]}, "--shots=10000: class . has"),
        ({"upscale": [False, False]}, "two sets .* as 'validation_no_upscale': rename"),
    ],
)
def test_what_can_not_be_judged_is_named(workdir, changes, message):
    with pytest.raises(ConfigError, match=message):
        evaluate.evaluate(workdir, **{"sides": [32], **changes})


def read_set(split):
    source = clipart(split)
    hot = np.zeros((len(source), len(source.class_names)), bool)
    for i in range(len(source)):
        hot[i, list(source[i].labels)] = True
    height, width = size_table(source).astype(float).T
    return hot, np.log(height / width)


def test_each_set_has_its_own_baselines_from_the_training_set(judge_others):
    sources = {"clipart": {"name": "clipart", "split": "test"}}
    evals = {
        "validation": {**SET, "sides": (32, 48)},
        "also": {"sources": sources, "sides": (32,)},
    }
    values, _ = judge_others(evals, baselines=True)
    expected = {}
    for name, split in (("validation", "validation"), ("also", "test")):
        train_, judged = read_set("train"), read_set(split)
        guess = baselines.aspect_only(*train_, *judged)
        expected[f"baseline/{name}/aspect_only/accuracy"] = guess
        guess = baselines.majority(train_[0], judged[0])
        expected[f"baseline/{name}/majority/accuracy"] = guess
    found = {name: v for name, v in values.items() if name.startswith("baseline/")}
    assert found == pytest.approx(expected)
    lines = [line.split()[0] for line in evaluate.format_table(values).splitlines()]
    assert lines[4:] == [f"baseline/{set_}/{guess}" for set_ in ("validation", "also")
                         for guess in ("majority", "aspect_only")]  # fmt: skip


def test_sets_of_the_same_records_have_their_baselines_once(judge_others):
    evals = {"a": {**SET, "sides": (32,)}}
    values, _ = judge_others(evals, baselines=True, upscale=[True, False])
    names = {name.split("/")[1] for name in values if name.startswith("baseline/")}
    assert names == {"a"}


@pytest.mark.parametrize("mesh, rows", [({"fsdp": 2}, 8), ({}, 3), ({}, 9)])
def test_a_checkpoint_is_judged_on_whatever_devices_there_are(
    values, judge_others, mesh, rows
):
    found, _ = judge_others({"v": {**SET, "sides": (32,), "rows": rows}}, mesh)
    for metric in ("images", "accuracy", "loss", "tokens_per_image"):
        expected = values[f"eval/validation_32/{metric}"]
        assert found[f"eval/v_32/{metric}"] == pytest.approx(expected, rel=1e-5)


def test_every_flag_of_the_command_is_obeyed(workdir, tmp_path):
    flags = [
        "--sides=32", "--budgets=9", "--upscale=yes,no", "--split=test", "--step=1",
        "--baselines", "--shots=1", f"--output={tmp_path}/found.json",
    ]  # fmt: skip
    done = commands.run("navit_jax.evaluate", f"--workdir={workdir}", *flags)
    assert done.returncode == 0, done.stderr
    written = json.loads((tmp_path / "found.json").read_text())
    assert written["step"] == 1
    expected = evaluate.evaluate(
        workdir, [32], [9], [True, False], "test", 1, True, [1], tmp_path / "own.json"
    )
    found = written["values"]
    assert found.keys() == expected.keys()
    for name in found.keys() - {n for n in found if n.endswith("/seconds_per_image")}:
        # Packed alike, but to another number of rows: a guess may change by rounding.
        assert found[name] == pytest.approx(expected[name], abs=2e-2), name
    points = [
        f"test{suffix}_{size}"
        for suffix in ("", "_no_upscale")
        for size in ("32", "9tokens")
    ]
    baselines_ = [f"baseline/test/{guess}" for guess in ("majority", "aspect_only")]
    lines = done.stdout.splitlines()
    assert [line.split()[0] for line in lines[1:]] == points + baselines_
    assert {"1_shot_accuracy", "accuracy"} <= set(lines[0].split())
    judged, trained = read_set("test")[0], read_set("train")[0]
    assert len(judged) != len(clipart("validation"))
    assert [found[f"eval/{point}/images"] for point in points] == 4 * [len(judged)]
    guess = baselines.majority(trained, judged)
    assert found["baseline/test/majority/accuracy"] == pytest.approx(guess)


@pytest.mark.parametrize(
    "output, message",
    [
        ("/proc/found.json", "--output=/proc/found.json can not be written: "),
        ("/dev/full", "--output=/dev/full is no file"),
        ("/proc", "--output=/proc is no file"),
    ],
)
def test_an_output_that_can_not_be_written_is_named_before_any_work(
    workdir, monkeypatch, output, message
):
    monkeypatch.setattr(evaluate.predictor, "restore", None)
    with pytest.raises(ConfigError, match=message):
        evaluate.evaluate(workdir, output=output)


def test_a_number_that_is_none_is_written_as_json_has_it(judge_others):
    values, written = judge_others({"v": {**SET, "sides": (32,), "square": True}})
    assert np.isnan(values["eval/v_32/upscaled"])
    assert written["values"]["eval/v_32/upscaled"] is None
    assert written["values"]["eval/v_32/loss"] == values["eval/v_32/loss"]


def test_sets_that_would_have_one_name_are_refused(judge_others):
    one = {**SET, "sides": (32,)}
    with pytest.raises(ConfigError, match="judged as 'a_no_upscale': rename one"):
        judge_others({"a": one, "a_no_upscale": one}, upscale=[True, False])


def test_a_checkpoint_is_judged_by_its_step(workdir):
    told = {r["step"]: r for r in reporting.read_metrics(epath.Path(workdir))}
    losses = [told[step]["eval/validation_32/loss"] for step in (1, 2)]
    assert losses[0] != pytest.approx(losses[1], rel=1e-3)
    for step in (1, 2, None):
        values = evaluate.evaluate(workdir, step=step)
        expected = losses[(step or 2) - 1]
        assert values["eval/validation_32/loss"] == pytest.approx(expected, rel=1e-5)
        written = json.loads((epath.Path(workdir) / "evaluation.json").read_text())
        assert written["step"] == (step or 2)


def test_a_full_disk_leaves_the_evaluation_that_was_there(workdir, full_at):
    evaluate.evaluate(workdir)
    path = epath.Path(workdir) / "evaluation.json"
    before = path.read_text()
    full_at(5)
    told = []
    with pytest.raises(ConfigError, match=r"evaluation\.json can not .* too large"):
        evaluate.evaluate(workdir, tell=told.append)
    full_at(-1)
    assert "eval/validation_32/accuracy" in told[0]
    assert path.read_text() == before


def test_the_table_shows_the_usual_numbers_with_the_interval():
    values = {
        "eval/v_32/images": 200.0,
        "eval/v_32/accuracy": 0.4812,
        "eval/v_32/accuracy_low": 0.391,
        "eval/v_32/accuracy_high": 0.571,
        "eval/v_32/loss": 2.48149,
        "eval/v_32/loss_low": 2.0,
        "eval/v_32/nll": 2.25,
        "eval/v_32/brier": 0.625,
        "eval/v_32/calibration_error": 0.0721,
        "eval/v_32/calibrated_error": 0.0312,
        "eval/v_32/10_shot_accuracy": 0.5,
        "eval/v_32/2_shot_accuracy": 0.25,
        "eval/v_32/2_shot_std": 0.125,
        "baseline/v/majority/accuracy": 0.26,
    }
    names = ["images", "accuracy", "loss", "NLL", "Brier", "ECE", "ECE if calibrated"]
    expected = [
        ["", *names, "2_shot_accuracy", "10_shot_accuracy"],
        ["v_32", "200", "0.4812 (0.391 .. 0.571)", "2.481", "2.25", "0.625", "0.0721",
         "0.0312", "0.25", "0.5"],
        ["baseline/v/majority", "", "0.26"],
    ]  # fmt: skip
    lines = evaluate.format_table(values).splitlines()
    starts = [0] + [lines[0].index(f"  {name}") + 2 for name in expected[0][1:]]
    for line, cells in zip(lines, expected, strict=True):
        ends = [*starts[1:], None]
        found = [line[a:b].strip() for a, b in zip(starts, ends, strict=True)]
        assert found == cells + [""] * (len(starts) - len(cells))
