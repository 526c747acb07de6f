import subprocess
import sys

import pytest
import tiny


def run(*arguments):
    command = [sys.executable, "-m", *arguments]
    return subprocess.run(command, cwd=tiny.ROOT, capture_output=True, text=True)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--config.optim.lrr=1"], "--config.optim.lrr: no such key; did you mean"),
        (["--config.steps=many"], "--config.steps=many"),
        (["--workdirr=x"], "Unknown command line flag 'workdirr'"),
        (["stray"], "unknown arguments ['stray']"),
    ],
    ids=["key", "value", "flag", "word"],
)
def test_a_wrong_command_is_one_line_and_exit_code_2(arguments, message, tmp_path):
    done = run(
        "navit_jax.train", "--config=configs/smoke.py", f"--workdir={tmp_path}",
        *arguments,
    )  # fmt: skip
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_a_workdir_that_can_not_be_written_fails_before_anything_compiles(tmp_path):
    (tmp_path / "file").write_text("")
    where = f"--workdir={tmp_path}/file/run"
    done = run("navit_jax.train", "--config=configs/smoke.py", where)
    assert done.returncode == 2
    assert "can not be written" in done.stderr
