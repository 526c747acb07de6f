import sys

import commands
import pytest
import tiny
from absl import flags

from navit_jax import command_line, experiment
from navit_jax import config as config_lib
from navit_jax.errors import ConfigError

# Of ml_collections, which loads config files.
pytestmark = pytest.mark.filterwarnings("ignore:the load_module")


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--config.optim.lrr=1"], "config.optim.lrr is unknown; did you mean 'lr'?"),
        (["--config.mesh.fsd=1"], "config.mesh.fsd is unknown; did you mean 'fsdp'?"),
        (["--config.steps=many"], "--config.steps=many"),
        (["--workdirr=x"], "Unknown command line flag 'workdirr'"),
        (["stray"], "unknown arguments ['stray']"),
    ],
    ids=["key", "section", "value", "flag", "word"],
)
def test_a_wrong_command_is_one_line_and_exit_code_2(arguments, message, tmp_path):
    done = commands.run(
        "navit_jax.train", "--config=configs/smoke.py", f"--workdir={tmp_path}",
        *arguments,
    )  # fmt: skip
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    # The folder is as it was: the right command finds nothing in its way.
    assert not list(tmp_path.iterdir())


def parse(monkeypatch, *arguments, config="configs/smoke.py"):
    """The resolved config of a command line, checked as `train` checks it."""
    argv = ["train", f"--config={tiny.ROOT / config}", *arguments]
    monkeypatch.setattr(sys, "argv", argv)
    monkeypatch.setattr(flags, "FLAGS", flags.FlagValues())
    holder = command_line.define_config(required=False)
    command_line._parse(argv)
    resolved = config_lib.resolve(holder.value)
    experiment.check_sections(resolved)
    return resolved


@pytest.mark.parametrize(
    "argument, path, value",
    [
        ("train.accumulate=2", "train.accumulate", 2),
        ("mesh.fsdp=4", "mesh.fsdp", 4),
        ("data.square=true", "data.square", True),
        ("model.attention=blocks", "model.attention", "blocks"),
        ("optim.freeze=(('encoder/.*',True),)", "optim.freeze", [["encoder/.*", True]]),
        ("model.init.workdir=runs/a", "model.init.workdir", "runs/a"),
        ("data.rows=8", "data.rows", 8),
        ("optim.schedule.warmup=100", "optim.schedule.warmup", 100),
        ("evals.validation.sides=32,64", "evals.validation.sides", [32, 64]),
    ],
    ids=lambda value: value if isinstance(value, str) and "=" in value else "",
)
def test_every_key_that_something_reads_can_be_set(monkeypatch, argument, path, value):
    found = config_lib.flatten(parse(monkeypatch, f"--config.{argument}"))
    assert found[path] == value
    before = config_lib.flatten(config_lib.resolve(tiny.load("configs/smoke.py")))
    assert {k: v for k, v in found.items() if k != path} == {
        k: v for k, v in before.items() if k != path
    }


@pytest.mark.parametrize(
    "argument, message",
    [
        ("train.accumulat=2", "train.accumulat is unknown; did you mean 'accumulate'"),
        ("train.accumulate=two", "train.accumulate='two': give a number"),
        ("model.attention=3", "model.attention=3: give text"),
        ("model.init.workdi=x", "did you mean 'workdir'"),
        ("optimm.lr=1", "config.optimm: did you mean 'optim'"),
        ("data.sources.clipart.splt=test", "did you mean 'split'"),
        ("data.token_drop.mean=0.5", "data.token_drop.mean is unknown"),
        ("evals.validation.sources.clipart.splt=x", "did you mean 'split'"),
        ("optim.schedule.name=cosin", "did you mean 'cosine'"),
        ("steps.more=1", "steps.more"),
    ],
    ids=lambda value: value if "=" in value else "",
)
def test_a_key_that_nothing_reads_is_refused_before_anything_is_built(
    monkeypatch, argument, message
):
    with pytest.raises(ConfigError, match=message):
        parse(monkeypatch, f"--config.{argument}")


def test_a_value_is_read_as_a_literal_and_never_evaluated(monkeypatch, tmp_path):
    code = f"__import__('pathlib').Path('{tmp_path}/made').touch()"
    for key in ("model.attention", "model.pooling"):  # absent from the file, and in it
        assert parse(monkeypatch, f"--config.{key}={code}")["model"][key[6:]] == code
    assert not list(tmp_path.iterdir())


def test_a_config_that_raises_says_what_without_a_traceback(monkeypatch):
    with pytest.raises(ConfigError, match=r":side=3: ValueError: argument") as e:
        parse(monkeypatch, config="configs/navit_classification.py:side=3")
    assert "\n" not in str(e.value)


def test_a_config_that_takes_no_argument_says_so(monkeypatch):
    found = r"smoke\.py takes no argument; given 'foo'"
    with pytest.raises(ConfigError, match=found) as e:
        parse(monkeypatch, config="configs/smoke.py:foo")
    assert "get_config" not in str(e.value)


@pytest.mark.parametrize(
    "texts", [["1"], ["1", "2", "3"], ["5", "5"], ["-1", "4"], ["a", "4"], ["1", "2.5"]]
)
def test_a_window_of_steps_is_two_whole_numbers(texts):
    assert command_line.parse_window("profile", ["10", "15"]) == (10, 15)
    assert command_line.parse_window("profile", None) is None
    with pytest.raises(ConfigError, match=f"--profile={','.join(texts)}: give two"):
        command_line.parse_window("profile", texts)


def test_a_workdir_that_can_not_be_written_fails_before_anything_compiles(tmp_path):
    (tmp_path / "file").write_text("")
    where = f"--workdir={tmp_path}/file/run"
    done = commands.run("navit_jax.train", "--config=configs/smoke.py", where)
    assert done.returncode == 2
    assert "can not be written" in done.stderr
