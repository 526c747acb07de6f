"""Rules of the layout, read from the syntax trees."""

import ast
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent
PACKAGE = ROOT / "navit_jax"

# What may import what: a module may import from its own layer and those before it.
LAYERS = (
    {"batch", "metrics", "errors", "config"},
    {
        "calibration", "charts", "checkpoint", "checksums", "command_line", "culprits",
        "data", "foreground", "hlo", "host_signals", "inheritance", "initialise",
        "isolation", "joining", "linear_probe", "look_pictures", "losses", "models",
        "optim", "page", "paths", "peak_flops", "pictures", "processes", "progress",
        "records", "reporting", "results", "retention", "retrieval", "roll_call",
        "run_folder", "run_lock", "saved_steps", "schedules", "sharding", "signals",
        "storage", "topology", "tracing", "train_options", "watch", "weights",
        "zero_shot",
    },
    {"tasks"},
    {"agreement", "train_state", "experiment", "compile", "dial", "judges", "judging",
     "mean_iou", "text_embedder", "train_flops"},
    {"baselines", "evaluate", "evaluator", "few_shot", "predictor", "pretrained"},
    {"commands", "train", "predict", "plan", "pod_search", "pods", "doctor", "gallery",
     "report", "samples", "seeing", "teach"},
)  # fmt: skip
LAYER = {name: number for number, names in enumerate(LAYERS) for name in names}
MODULES = sorted(p for p in PACKAGE.rglob("*.py") if p != PACKAGE / "__init__.py")


def imported(path: pathlib.Path) -> set[str]:
    """Full names of what a file imports, anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path} imports relatively"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_go_one_way(path):
    mine = path.relative_to(PACKAGE).with_suffix("").parts[0]
    for name in imported(path):
        if name.startswith("navit_jax."):
            other = name.split(".")[1]
            if other != "__version__":
                assert LAYER[other] <= LAYER[mine], f"{mine} imports {other}"


def test_data_workers_touch_no_device_and_nobody_needs_tensorflow():
    for path in MODULES:
        names = imported(path)
        assert not any(n.split(".")[0] == "tensorflow" for n in names), path
        if path.is_relative_to(PACKAGE / "data"):
            assert not any(n.split(".")[0] in ("jax", "flax") for n in names), path


def test_configs_import_nothing_of_the_package():
    for path in (ROOT / "configs").rglob("*.py"):
        assert not any(n.startswith("navit_jax") for n in imported(path)), path


def test_files_are_short_and_none_is_a_drawer():
    for path in [*MODULES, *(ROOT / "configs").rglob("*.py")]:
        assert len(path.read_text().splitlines()) <= 300, path
        assert path.stem not in ("utils", "util", "common", "helpers", "misc"), path


def test_the_package_imports_within_two_seconds_and_without_a_device():
    code = "import time; t = time.time(); import navit_jax, sys; print(time.time() - t)"
    code += "; assert 'jaxlib' not in sys.modules"
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert float(out.stdout) < 2
