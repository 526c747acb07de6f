import os
import subprocess
import sys

import pytest
import tiny


@pytest.mark.slow
@pytest.mark.parametrize("name, rows", [("packing", 36), ("pipeline", 10)])
def test_a_benchmark_prints_its_tables(name, rows):
    done = subprocess.run(
        [sys.executable, f"benchmarks/{name}.py", "--tiny"],
        cwd=tiny.ROOT,
        env={**os.environ, "PYTHONPATH": str(tiny.ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    lines = [line for line in done.stdout.splitlines() if line]
    assert all(line.startswith("| ") or set(line) <= set("|-:") for line in lines)
    assert sum(line.startswith("| ") for line in lines) == rows + 2
    assert "nan" not in done.stdout
