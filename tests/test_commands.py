"""The commands that a report tells fit the run, whatever its sizes and its task."""

import shlex

import tiny

from navit_jax import commands


def lines_of(config, argv=()):
    """Arguments by module, as a shell reads them."""
    lines = commands.list_commands(config, "/a run/of me", argv)
    split = [shlex.split(line) for line in lines]
    assert all(words[:2] == ["python", "-m"] for words in split)
    return {words[2].removeprefix("navit_jax."): words[3:] for words in split}


def with_sets(**changes):
    source = {"clipart": {"name": "clipart", "split": "validation"}}
    evals = {
        "a": {"sources": source, "sides": (48, "native", 96)},
        "b": {"sources": source, "sides": (96, 64.5), "budgets": (9, 25)},
    }
    return tiny.config(evals=evals, **changes)


def test_evaluation_is_told_with_the_sizes_of_all_sets():
    asked = ["--workdir=/a run/of me", "--sides=48,native,96,64.5", "--budgets=9,25"]
    assert lines_of(with_sets())["evaluate"] == asked


def test_sizes_that_the_positions_do_not_reach_are_not_told():
    positions = {"name": "factorized", "length": 4}  # patches of 16
    asked = lines_of(with_sets(model__positions=positions))["evaluate"]
    assert asked == ["--workdir=/a run/of me", "--sides=48,native,64.5", "--budgets=9"]


def test_without_sets_there_is_nothing_to_evaluate():
    assert list(lines_of(tiny.config())) == ["predict"]


def test_only_a_run_that_knows_classes_predicts():
    for found, expected in (
        (with_sets(), ["evaluate", "predict"]),
        (with_sets(task={"name": "bootstrapping"}), ["evaluate"]),
        (tiny.contrastive(), []),
    ):
        assert list(lines_of(found)) == expected


def test_training_is_told_as_it_was_asked_for():
    argv = ["--config=my configs/a.py", "--workdir=x"]
    assert lines_of(tiny.config(), argv)["train"] == argv
