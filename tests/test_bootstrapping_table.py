"""The table that a bootstrapping run is judged by, and what it is made of."""

import dataclasses
import importlib
import os
import pathlib
import subprocess
import sys
import types

import numpy as np
import pytest
from etils import epath
from packed import image, pack
from test_agreement import bootstrapped

from navit_jax import experiment, train
from navit_jax.data.records import Record
from navit_jax.errors import ConfigError
from navit_jax.judges import read_all

ROOT = pathlib.Path(__file__).parent.parent


@pytest.fixture
def benchmark_module(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module


def test_a_teacher_that_drops_patches_keeps_some_of_each_picture(benchmark_module):
    cases = benchmark_module("bootstrapping_cases")
    batch = pack([[image(1, (3, 4))], [image(2, (4, 3))]])
    # Padding may stand anywhere; it is never kept.
    batch = dataclasses.replace(
        batch, coords=np.where(batch.segment_ids[..., None] > 0, batch.coords, -1)
    )
    found = cases.drop(batch, 5)
    assert (found.segment_ids == 1).all()
    assert found.segment_ids.shape == (2, 5)
    for row in range(2):
        own = dict(zip(map(tuple, batch.coords[row]), batch.patches[row], strict=True))
        places = [tuple(np.asarray(c)) for c in found.coords[row]]
        assert len(set(places)) == 5
        for place, patch in zip(places, found.patches[row], strict=True):
            np.testing.assert_array_equal(patch, own[place])
    assert not np.array_equal(found.coords[0], found.coords[1])


def test_flops_of_a_class_token_are_those_of_a_token_without_a_patch(benchmark_module):
    cases = benchmark_module("bootstrapping_cases")
    config = bootstrapped()
    model = config["task"]["teacher"]
    encoder = experiment.build_encoder({**config, "model": model})
    case = cases.Case({"model": model}, encoder, 48, None, None, keep=4)
    D, hidden, patch = 16, 32, 16
    block = 5 * (4 * D * D + 2 * D * hidden) + 2 * 5 * 5 * D
    assert cases.count_flops(case) == 2 * (4 * 3 * patch**2 * D + 2 * block)


def test_neighbours_vote_by_cosine_and_any_label_is_right(
    benchmark_module, monkeypatch
):
    labelled = benchmark_module("labelled")
    monkeypatch.setattr(labelled, "NEIGHBOURS", 3)
    probe = object.__new__(labelled.Probe)
    probe.single = np.array([True, True, False, True, True])
    probe.classes = np.array([0, 0, 1, 1])
    probe.places, probe.labels = np.array([0, 2]), [(1,), (0, 1)]
    train = np.array([[1, 0.1], [1, -0.1], [1, 0], [0.1, 1], [-0.1, 1]])
    # By length the others would be nearer.
    train[[0, 1]] *= 0.01
    judged = 7.0 * np.array([[1, 0.2], [0, 0], [1, 0.2]])
    assert probe.find_neighbours(train, judged).tolist() == [0, 1]
    train[[0, 1]] *= 100
    assert probe.fit(train, judged).tolist() == [0, 1]


def test_probes_learn_of_single_labels_and_judge_what_has_any(
    benchmark_module, monkeypatch
):
    class Listed(list):
        name, class_names = "listed", ()

    labelled = benchmark_module("labelled")
    records = [Record(str(i), b"", own) for i, own in enumerate([(3,), (), (1, 2)])]
    parts = {"train": Listed([*records, Record("3", b"", (1,))])}
    monkeypatch.setattr(labelled, "read", lambda section: parts[section["split"]])
    labels = [record.labels for record in records[::-1]]
    judged = labelled.Judged({}, np.array([4, 5, 6]), labels, {"split": "train"})
    probe = labelled.Probe(judged)
    assert probe.single.tolist() == [True, False, False, True]
    assert probe.classes.tolist() == [3, 1]
    assert (probe.labels, probe.groups.tolist()) == ([(1, 2), (3,)], [4, 6])
    assert probe.places.tolist() == [0, 2]


def test_a_picture_that_can_not_be_used_is_left_out_of_all_rows_and_counted(
    benchmark_module, monkeypatch
):
    cases, labelled = map(benchmark_module, ("bootstrapping_cases", "labelled"))
    rng = np.random.default_rng(0)
    vectors = {name: rng.standard_normal((6, 4)) for name in ("student", "teacher")}
    whole = {name: v[[0, 1, 3, 4, 5]] for name, v in vectors.items()}
    for v in vectors.values():
        v[2] = 0
    there, found = cases.agree(vectors, "teacher")
    assert there.tolist() == [True, True, False, True, True, True]
    _, expected = cases.agree(whole, "teacher")
    assert list(found) == ["constant, the mean vector", "student", "teacher"]
    for name, terms in found.items():
        for term, values in terms.items():
            assert np.isfinite(values).all()
            np.testing.assert_array_equal(values, expected[name][term])

    monkeypatch.setattr(labelled, "NEIGHBOURS", 1)
    judged = labelled.Judged({}, np.arange(3), [(0,), (1,), (1,)], {})
    left = labelled.leave_out(judged, np.array([True, False, True]))
    probe = labelled.Probe(left)
    assert probe.groups.tolist() == [0, 2]
    probe.single, probe.classes = np.ones(3, bool), np.array([0, 0, 1])
    # The second is none of class 0.
    train, own = (
        np.array([[1.0, 0], [0, 0], [0, 1]]),
        np.array([[1.0, 0], [0, 0], [0, 1]]),
    )
    assert probe.find_neighbours(train, own).tolist() == [1, 1]
    assert probe.fit(train, own).tolist() == [1, 1]


def test_labels_of_a_split_stand_beside_all_of_its_pictures(benchmark_module):
    labelled = benchmark_module("labelled")
    judged = labelled.open_clipart("validation", False, True)
    whole = labelled.read(judged.section)
    known = {r.key: r.labels for r in read_all(labelled.read(judged.train))}
    assert len(judged.labels) == len(judged.groups) == len(whole) > len(known) > 0
    for record, own in zip(read_all(whole), judged.labels, strict=True):
        assert own == known.get(record.key, ())


def test_runs_are_compared_where_they_learn_the_same_of_one_teacher(benchmark_module):
    cases = benchmark_module("bootstrapping_cases")

    def run(**about):
        task = types.SimpleNamespace(about=lambda: about)
        return types.SimpleNamespace(task=task)

    cases.check_teachers(
        run(teacher="a", teacher_side=224), run(teacher="a", teacher_side=0)
    )
    with pytest.raises(ConfigError, match=r"its run learns .*'b'.*, the other .*'a'"):
        cases.check_teachers(
            run(teacher="a", teacher_side=224), run(teacher="b", teacher_side=224)
        )


@pytest.mark.slow
def test_a_run_is_judged_beside_its_baselines(tmp_path):
    config = {**bootstrapped(), "steps": 1, "evals": {}}
    run, other = tmp_path / "run", tmp_path / "other"
    train.train(config, epath.Path(run))
    plain = {
        "model": config["task"]["teacher"],
        "task": {**config["task"], "inherit": ()},
    }
    train.train({**config, **plain}, epath.Path(other))
    command = [
        sys.executable, "benchmarks/bootstrapping.py", "--tiny", "--side=48",
        f"--workdir={run}", "--split=validation", "--teacher_side=64", "--grid=2",
        "--latents=6", f"--plain={other}",
    ]  # fmt: skip
    quick = {"XLA_FLAGS": "--xla_backend_optimization_level=0"}
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, **quick}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    lines = [x for x in done.stdout.splitlines() if x.startswith("| ")][1:]
    table = {}
    for line in lines:
        name, *cells = (cell.strip() for cell in line.strip("|").split("|"))
        table[name] = cells
    assert list(table) == [
        "constant, the mean vector", "student, random front", "plain ViT, other",
        "teacher, 4 of its 9 patches", "teacher, 32 px", "teacher, 48 px",
        "teacher, 64 px", "student, 4 tokens", "student, 6 tokens",
    ]  # fmt: skip
    whole = table["teacher, 64 px"]
    assert (whole[0].split()[0], whole[2]) == ("1.000", "1.000")
    # Pictures that are there twice find each other as often as themselves.
    assert 0.98 < float(whole[1].split()[0]) < 1
    assert (whole[4], table["student, random front"][4]) == ("100%", "0%")
    assert table["constant, the mean vector"][1].split()[0] == f"{1 / 332:.3f}"
    # As many patches, so as many operations.
    assert table["teacher, 32 px"][5] == table["teacher, 4 of its 9 patches"][5]
    assert all(float(cells[6]) > 0 for cells in list(table.values())[1:])
