"""A run's folder: its config, what it ran on, and what may change on resuming."""

import contextlib
import json
import os
import platform
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import metadata
from typing import Any

import jax
from absl import logging
from etils import epath

from navit_jax import config as config_lib
from navit_jax import run_lock, saved_steps
from navit_jax.data import codec
from navit_jax.data.tokenizer import Tokenizer
from navit_jax.errors import ConfigError
from navit_jax.storage import store

# Keys that change neither the batches nor what a step computes from them.
HARMLESS = re.compile(
    r"checkpoint\.|evals\.|mesh\.|train\.(?!ema)|data\.(workers|threads|prefetch)$|"
    r"model\.(attention|remat|scan)$|"
    # The file may move; that it is the same one, `store_vocabulary` makes sure.
    r"data\.text\.vocabulary$"
)

VOCABULARY = "vocabulary"
CONFIG_REMEDY = "delete it and train on with the run's --config, which writes it again"


@contextlib.contextmanager
def hold(workdir: epath.Path, take_over: bool) -> Iterator[Callable[[], None]]:
    """Keeps other runs out of the folder; process 0 holds the lock for its job.

    Returns:
      What raises a ConfigError if another run has taken the folder over since.

    Raises:
      ConfigError: the folder can not be written, or another run holds it.
    """
    check_writable(workdir, f"--workdir={workdir}")
    if jax.process_index() == 0:
        with run_lock.hold(workdir, take_over) as lock:
            yield lock.check
    else:
        yield lambda: None


def check_writable(folder: epath.Path, name: str) -> None:
    """Makes the folder if there is none.

    Raises:
      ConfigError: no file can be made in it; the message begins with the name.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".write_test_{os.getpid()}"
        probe.write_text("")
        # Another host may be here too, under the same number.
        probe.unlink(missing_ok=True)
    except OSError as error:
        raise ConfigError(f"{name} can not be written: {error}") from error


def store_config(
    workdir: epath.Path, config: Mapping[str, Any], allow_config_change: bool
) -> None:
    """Stores the resolved config, or checks it against the one stored there.

    Raises:
      ConfigError: the folder belongs to another config; the message lists the keys that
        may not differ.
    """
    path = workdir / "config.json"
    if path.exists() and has_begun(workdir):
        _check_same(path, config, allow_config_change)
    if jax.process_index() == 0:
        # In the config's own order: the first source is the first for whoever reads it.
        store(path, json.dumps(config, indent=2))
        store(workdir / "environment.json", json.dumps(environment(), indent=2))


def has_begun(workdir: epath.Path) -> bool:
    """Whether there is a record or a saved step; what ended before binds to nothing."""
    metrics = workdir / "metrics.jsonl"
    if metrics.exists() and metrics.stat().length:
        return True
    return bool(saved_steps.find(workdir / "checkpoints"))


def read_config(workdir: epath.Path) -> dict[str, Any]:
    """The resolved config a run stored; data, never code.

    Raises:
      ConfigError: the folder holds no run, or its config is damaged.
    """
    path = workdir / "config.json"
    if not path.exists():
        raise ConfigError(f"--workdir={workdir} holds no run: {path} is missing")
    return read_json(path, CONFIG_REMEDY)


def store_class_names(workdir: epath.Path, class_names: Sequence[str]) -> None:
    """Keeps the classes by number, for whoever uses the model without its data.

    Raises:
      ConfigError: the run has begun with other classes.
    """
    path, names = workdir / "classes.json", list(class_names)
    bound = path.exists() and has_begun(workdir)
    if bound and (old := read_class_names(workdir)) != names:
        changed = [
            f"{a!r} -> {b!r}" for a, b in zip(old, names, strict=False) if a != b
        ]
        raise ConfigError(
            f"the sources have other classes than {path}: {len(old)} then, "
            f"{len(names)} now; {', '.join(changed[:4])}; restore them, or use another "
            "--workdir"
        )
    if jax.process_index() == 0:
        store(path, json.dumps(names))


def read_class_names(workdir: epath.Path) -> list[str]:
    """The classes a run was trained on, by number; none if it had no labels.

    Raises:
      ConfigError: the folder has no such list, or it is damaged.
    """
    path = workdir / "classes.json"
    if not path.exists():
        raise ConfigError(
            f"{path} is missing, the list of the run's classes; train on in {workdir}, "
            "which writes it again"
        )
    return read_json(
        path, f"delete it and train on in {workdir}, which writes it again"
    )


def store_vocabulary(workdir: epath.Path, tokenizer: Tokenizer | None) -> None:
    """Keeps the vocabulary of the run's texts, if it has some, beside its model.

    Raises:
      ConfigError: the run has begun with another one.
    """
    if tokenizer is None:
        return
    path, contents = workdir / VOCABULARY, tokenizer.vocabulary.contents
    bound = path.exists() and has_begun(workdir)
    if bound and path.read_bytes() != contents:
        raise ConfigError(
            f"config.data.text.vocabulary is another one than {path}, with which the "
            "run has begun; restore it, or use another --workdir"
        )
    if jax.process_index() == 0:
        store(path, contents)


def use_own_vocabulary(
    workdir: epath.Path, config: Mapping[str, Any]
) -> Mapping[str, Any]:
    """The run's config, its texts read by the vocabulary that the folder keeps."""
    path, section = workdir / VOCABULARY, config["data"]
    if not path.exists() or not section.get("text"):
        return config
    text = {**section["text"], "vocabulary": str(path)}
    return {**config, "data": {**section, "text": text}}


def environment() -> dict[str, Any]:
    """What the numbers of a run may depend on besides its config."""
    names = ("navit_jax", "jax", "jaxlib", "flax", "optax", "numpy", "grain")
    return {
        "python": sys.version.split()[0],
        "machine": platform.machine(),
        "cpus": os.cpu_count(),
        "cpu_threads": len(os.sched_getaffinity(0)),
        "devices": [d.device_kind for d in jax.devices()],
        "processes": jax.process_count(),
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        "versions": {n: metadata.version(n) for n in names} | codec.versions(),
        "command": sys.argv,
    }


def read_json(path: epath.Path, remedy: str) -> Any:
    """What a JSON file of the folder says.

    Raises:
      ConfigError: it was cut or damaged; the message ends with the remedy.
    """
    try:
        return json.loads(path.read_text())
    except ValueError as error:  # of JSON and of UTF-8
        raise ConfigError(f"{path} is damaged: {error}; {remedy}") from error


def _check_same(path: epath.Path, config: Mapping[str, Any], allow: bool) -> None:
    changes = config_lib.differences(read_json(path, CONFIG_REMEDY), config)
    lines = {key: f"  {key}: {old!r} -> {new!r}" for key, old, new in changes}
    reasons = [line for key, line in lines.items() if not HARMLESS.match(key)]
    if reasons and not allow:
        raise ConfigError(
            f"{path} is of another config:\n"
            + "\n".join(reasons)
            + "\nuse another --workdir, "
            "or --allow_config_change if this is what you want"
        )
    if lines:
        logging.warning(
            "the config changed on resuming:\n%s", "\n".join(lines.values())
        )
