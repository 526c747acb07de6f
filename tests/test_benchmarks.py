"""The benchmarks run end to end in their tiny form; what they measure is not judged."""

import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent
QUICK = {
    **os.environ,
    "XLA_FLAGS": "--xla_backend_optimization_level=0",
    "JAX_COMPILATION_CACHE_DIR": str(ROOT / ".cache" / "xla"),
}


def run(*command, **environment):
    done = subprocess.run(
        command, cwd=ROOT, env={**QUICK, **environment}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_gpu_script_compares_and_times_everything_on_any_backend():
    out = run("bash", "benchmarks/gpu.sh", "--tiny", PYTHON=sys.executable)
    lines = [line.split("|")[1:-1] for line in out.splitlines() if line[:1] == "|"]
    errors = [line for line in lines if line[1].strip() in ("float32", "bfloat16")]
    assert [line[0].strip() for line in errors] == 2 * ["dense", "blocks", "mha"]
    for line in errors:
        worst = 1e-5 if line[1].strip() == "float32" else 2e-2
        assert all(float(cell) <= worst for cell in line[2:]), line
    assert sum(line[0].strip() == "Ti/16" for line in lines) == 2


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, words",
    [
        ("attention", ["dense / blocks", "work / sum n^2"]),
        ("train_step", ["Packed against plain", "Long rows", "Where the time goes"]),
        ("compiling", ["scanned / unrolled", "with a full cache"]),
    ],
)
def test_a_benchmark_prints_its_tables(name, words):
    out = run(sys.executable, f"benchmarks/{name}.py", "--tiny")
    for word in words:
        assert word in out
