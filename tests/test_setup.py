"""What `make setup` does, with stand-ins for uv and the interpreters."""

import os
import shutil
import subprocess

import pytest
import tiny

UV = """#!/bin/sh
[ "$1" = venv ] || exit 0
for folder; do :; done
mkdir -p "$folder/bin"
"""
PYTHON = """#!/bin/sh
case "$*" in
  *_base_executable*) echo "$0" ;;
  *version.split*) echo {version} ;;
  *version_info*) {new_enough} ;;
esac
"""


@pytest.fixture
def setup(tmp_path):
    if not shutil.which("git"):
        pytest.skip("git is missing")
    (tmp_path / "launch").mkdir()
    for name in ("launch/setup.sh", "requirements.txt", "setup.py"):
        shutil.copy(tiny.ROOT / name, tmp_path / name)
    (tmp_path / "bin").mkdir()
    programs = {
        "uv": UV,
        "python3.12": PYTHON.format(version="3.12.9", new_enough="exit 0"),
        "python3.11": PYTHON.format(version="3.11.9", new_enough="exit 0"),
        "python3.10": PYTHON.format(version="3.10.9", new_enough="exit 1"),
    }
    for name, text in programs.items():
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)

    def run(python=""):
        path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
        return subprocess.run(
            ["bash", "launch/setup.sh"],
            cwd=tmp_path,
            env={**os.environ, "PATH": path, "PYTHON": python},
            capture_output=True,
            text=True,
        )

    return run


def test_an_environment_of_another_python_is_replaced_and_said_to_be(setup, tmp_path):
    assert "installing into .venv with Python 3.12.9" in setup().stdout
    (tmp_path / ".venv" / "old").touch()
    assert setup().stdout == setup("python3.12").stdout == ""  # up to date
    said = setup("python3.11").stdout
    assert ".venv has Python 3.12.9 and is replaced; VENV=.venv-3.11.9 keeps" in said
    assert not (tmp_path / ".venv" / "old").exists()
    assert setup().stdout == ""  # without PYTHON the one that is there will do


def test_an_environment_of_other_requirements_is_replaced(setup, tmp_path):
    setup("python3.11")
    with open(tmp_path / "requirements.txt", "a") as file:
        file.write("# another\n")
    assert "replaced" not in (said := setup("python3.11").stdout)
    assert "installing into .venv with Python 3.11.9" in said


@pytest.mark.parametrize("python", ["python3.10", "/none/python"])
def test_a_python_that_will_not_do_is_named_and_nothing_is_removed(
    setup, tmp_path, python
):
    setup()
    refused = setup(python)
    assert refused.returncode == 2
    assert f"PYTHON={python} does not run or is older than 3.11" in refused.stderr
    assert (tmp_path / ".venv" / "bin").exists()
