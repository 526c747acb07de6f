"""The demo's config, shrunk until a step takes milliseconds."""

import importlib.util
import pathlib

from navit_jax import config as config_lib

ROOT = pathlib.Path(__file__).parent.parent
# For what does not depend on them: compiles in half the time.
PLAIN = {"model__attention": "dense", "model__remat": "none"}


def load(path: str, *arguments: str):
    """The ConfigDict of a config file."""
    spec = importlib.util.spec_from_file_location("config_file", ROOT / path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config(*arguments)


def config(**changes) -> dict:
    """`configs/smoke.py` resolved, tiny, with changes as in `change`."""
    found = load("configs/smoke.py").unlock()
    found.steps = 6
    found.data.update(rows=8, tokens=32, slots=6)
    found.data.resolution = {"name": "uniform", "low": 32, "high": 64}
    found.model.update(width=32, depth=2, num_heads=2, mlp=64)
    found.train.update(report_every=2, evaluate_every=0)
    found.evals = {}
    return change(config_lib.resolve(found), **changes)


def change(resolved: dict, **changes) -> dict:
    """A resolved config with changes by dotted path ("." is "__")."""
    for path, value in changes.items():
        *sections, key = path.split("__")
        node = resolved
        for section in sections:
            node = node[section]
        node[key] = value
    return resolved


def contrastive(**changes) -> dict:
    """`configs/contrastive_smoke.py` resolved and tiny, with changes as in `change`."""
    found = load("configs/contrastive_smoke.py").unlock()
    found.steps = 2
    found.data.update(rows=8, tokens=32, slots=6)
    found.data.text.tokens = 48
    found.data.resolution = {"name": "uniform", "low": 32, "high": 64}
    found.model.update(width=32, depth=1, num_heads=2, mlp=64)
    found.task.width = 16
    found.task.text.update(width=32, depth=1, num_heads=2, mlp=64)
    found.train.update(report_every=1, evaluate_every=0)
    found.evals = {}
    return change(config_lib.resolve(found), **changes)
