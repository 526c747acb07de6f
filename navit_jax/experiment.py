"""From a resolved config to the things it names: encoder, task, sources, plans."""

import fnmatch
import functools
import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from navit_jax import checkpoint, data, initialise, judges, models, optim, sharding
from navit_jax import config as config_lib
from navit_jax.data import (
    crop,
    eval_sizes,
    resolution,
    teacher_outputs,
    token_drop,
    tokenizer,
)
from navit_jax.data.given import lengthen, row_length
from navit_jax.data.sources import SOURCES
from navit_jax.errors import ConfigError, TooLarge
from navit_jax.models.positions import POSITIONS
from navit_jax.schedules import SCHEDULES
from navit_jax.tasks import TASKS, Task
from navit_jax.tasks.bootstrapping import longest_side
from navit_jax.train_options import TrainOptions

SECTIONS = ("data", "model", "task", "optim", "mesh", "checkpoint", "evals", "train")
REQUIRED = ("seed", "steps", "data", "model", "task", "optim")


# Who reads the keys of a section: factories, or a table from which its `name` chooses
# one; then the arguments that are not the config's, and keys that are read elsewhere.
READERS: dict[str, tuple[Sequence[Any], Sequence[str], Sequence[str]]] = {
    "checkpoint": ([checkpoint.Checkpoints], ["folder"], []),
    "data": ([data.open_stream], ["seed", "patch", "max_side", "training"], []),
    "data.crop": ([crop.LAWS], [], []),
    "data.resolution": ([resolution.LAWS], [], []),
    "data.text": ([tokenizer.open_tokenizer], [], ["tokens", "captions"]),
    "data.token_drop": ([token_drop.LAWS], [], []),
    "data.token_drop.schedule": ([token_drop.Schedule], [], []),
    "*.sources.*": ([SOURCES], [], ["weight"]),
    "mesh": ([sharding.make_mesh], ["devices"], []),
    "model": ([models.MODELS], [], ["init"]),
    "model.init": ([initialise.from_run], ["params"], []),
    "model.positions": ([POSITIONS], ["width"], []),
    "optim": ([optim.compose, optim.OPTIMIZERS], optim.GIVEN, []),
    "optim.schedule": ([SCHEDULES], ["peak", "steps"], []),
    "task": ([TASKS], ["encoder", "num_classes", "vocab_size", "text_length"], []),
    "task.teacher": ([models.MODELS], [], []),
    "task.teacher.positions": ([POSITIONS], ["width"], []),
    "task.text": ([models.TextTower], ["vocab_size", "length"], []),
    "train": ([TrainOptions], [], []),
}


def check_sections(config: Mapping[str, Any]) -> None:
    """Refuses keys that nothing reads, and names those that are missing.

    Nothing is built or opened. Those of evaluation sets: see `build_eval_streams`.
    """
    known = (*SECTIONS, "seed", "steps")
    for key in config:
        if key not in known:
            raise ConfigError(f"config.{key}: {config_lib.nearest(key, known)}")
    for key in REQUIRED:
        if key not in config:
            raise ConfigError(f"config.{key} is missing")
    if config["steps"] < 1:
        raise ConfigError(f"config.steps={config['steps']}: give at least 1")
    for name, section in config.get("evals", {}).items():
        if not isinstance(section, Mapping):
            raise ConfigError(f"config.evals.{name}={section!r}: give a section")
    for where in READERS:
        value = functools.reduce(_entry, where.split("."), config)
        if value is not None and not isinstance(value, Mapping):
            raise ConfigError(
                f"config.{where}={value!r}: give a section, as {{'name': ...}}"
            )
    for where, section in config_lib.sections(config):
        for pattern, reader in READERS.items():
            if fnmatch.fnmatchcase(where, pattern):
                _check_keys(section, where, *reader)


def _entry(section: Any, key: str) -> Any:
    return section.get(key) if isinstance(section, Mapping) else None


def _check_keys(
    section: Mapping[str, Any],
    where: str,
    readers: Sequence[Any],
    given: Sequence[str],
    elsewhere: Sequence[str],
) -> None:
    keys = {key: value for key, value in section.items() if key not in elsewhere}
    factories = []
    for reader in readers:
        if isinstance(reader, Mapping):
            reader, keys = config_lib.choose(keys, reader, where)
        factories.append(reader)
    config_lib.check(keys, factories, where, given)


def train_options(config: Mapping[str, Any]) -> TrainOptions:
    """The section `train`, its defaults filled in."""
    options = config_lib.call(TrainOptions, config.get("train", {}), "train")
    for name in ("accumulate", "report_every"):
        if getattr(options, name) < 1:
            raise ConfigError(f"config.train.{name} must be at least 1")
    return options


def build_encoder(config: Mapping[str, Any]) -> models.Encoder:
    """The packed encoder that section `model` names.

    Raises:
      ConfigError: patches are dropped of pictures that it reads whole.
    """
    section = {k: v for k, v in config["model"].items() if k != "init"}
    encoder = config_lib.build(section, models.MODELS, "model")
    drop = (config["data"].get("token_drop") or {}).get("name", "none")
    if isinstance(encoder, models.SparseFormer) and drop != "none":
        raise ConfigError(
            f"config.data.token_drop.name={drop!r}: a SparseFormer reads whole "
            "pictures; use 'none', and config.model.counts for fewer tokens"
        )
    return encoder


def build_task(config: Mapping[str, Any], num_classes: int) -> Task:
    """The task that section `task` names, over the encoder of section `model`.

    Args:
      num_classes: Of the training sources; only a task that has classes takes it.
    """
    factory = TASKS.get((section := config["task"]).get("name"))
    given: dict[str, Any] = {"encoder": build_encoder(config)}
    wanted = inspect.signature(factory).parameters if factory else ()
    if "num_classes" in wanted:
        if num_classes < 1:
            raise ConfigError(
                f"config.task.name={section['name']!r} needs labels, and the sources "
                "of config.data.sources have none"
            )
        given["num_classes"] = num_classes
    if "vocab_size" in wanted and section.get("text") is not None:
        _, opened = open_text(config)
        given |= {"vocab_size": opened.vocab_size, "text_length": opened.length}
    task = config_lib.build(section, TASKS, "task", **given)
    teacher_outputs.check_about(config["data"], lambda: about_teacher(config, task))
    return task


def about_teacher(config: Mapping[str, Any], task: Any) -> dict[str, Any]:
    """What a task's teacher says of an image depends on this, the image aside.

    Raises:
      ConfigError: the task has none.
    """
    if (about := getattr(task, "about", None)) is None:
        raise ConfigError("config.task has no teacher: use name='bootstrapping'")
    begun = config["model"].get("init") or {"seed": config["seed"]}
    return {**about(), "init": begun, "square": config["data"].get("square", False)}


def open_text(config: Mapping[str, Any]) -> tuple[int, tokenizer.Tokenizer]:
    """T and the tokenizer of section `data.text`.

    Raises:
      ConfigError: there is no such section, or as `data.open_text`.
    """
    if not config["data"].get("text"):
        raise ConfigError(
            f"config.task.name={config['task'].get('name')!r} needs texts: give "
            "config.data.text, as {'tokens': 96}"
        )
    return data.open_text(config["data"]["text"])


def build_stream(config: Mapping[str, Any]) -> data.Stream:
    """The training stream of section `data`."""
    return _open(config, config["data"], "data", training=True)


# Keys of section `data` that no evaluation follows.
TRAINING_ONLY = (
    "resolution", "token_drop", "crop", "flip", "jitter", "fill", "plan_shards",
    "repeats", "rand_augment", "teacher",
)  # fmt: skip
# What an evaluation set takes from section `data` unless it says otherwise.
SHARED = (
    "rows", "tokens", "slots", "upscale", "square", "num_labels", "pixel_classes",
    "text", "codec", "threads",
)  # fmt: skip


def build_eval_streams(
    config: Mapping[str, Any],
    section: Mapping[str, Any],
    name: str,
    shards: int = 1,
    asked: str = "config.evals.{}.",
) -> Iterator[tuple[str, data.Stream]]:
    """(label, stream) for each of the resolutions at which a set of `evals` is judged.

    Rows and slots are those of training unless the set says otherwise. So are the
    tokens of a row, doubled until the largest square image fits, or at native size the
    longest image (`given.LONGEST` at most), with as many fewer rows.

    Args:
      section: `sources`; `sides`, in pixels or "native"; `budgets`, most patches an
        image; `name` and the keys of the judge of that name, see `judges.py`; and
        keys of section `data` to replace.
      name: Of the set.
      shards: Devices that split rows, which are rounded up to a multiple of them.
      asked: Where sides and budgets stand, for messages: {} is the name.

    Raises:
      ConfigError: no size is given, one that is none, or that the model's positions do
        not reach; a key that nothing reads, or that has an effect in training alone.
    """
    where = f"evals.{name}"
    for key in TRAINING_ONLY:
        if key in section:
            raise ConfigError(
                f"config.{where}.{key} has no effect: images are judged whole, at "
                f"{name}.sides or {name}.budgets; remove it"
            )
    patch = models.patch_size(config["model"]["size"])
    sizes = eval_sizes.laws(section, where, patch)
    laws = {label: (size, law) for label, size, law in sizes}
    judge, settings = judges.choose(section, where)
    own = {k: v for k, v in section.items() if k not in ("sides", "budgets", "name")}
    base = {key: config["data"][key] for key in SHARED if key in config["data"]}
    given = (*TRAINING_ONLY, "seed", "patch", "max_side", "training")
    # Retrieval and its like read texts and labels by themselves, not beside the images.
    aside = section.get("name", "metrics") != "metrics"
    if aside:
        given = (*given, "text", "num_labels")
        base = {k: v for k, v in base.items() if k not in given}
    config_lib.check({**base, **own}, [data.open_stream, judge], where, given)
    own = {k: v for k, v in own.items() if k not in settings}
    for label, (size, law) in laws.items():
        arguments = {**base, **own, "resolution": law}
        if aside:
            arguments["num_labels"] = 0
        arguments["rows"] = -(-arguments["rows"] // shards) * shards
        may_grow = "tokens" not in own
        if may_grow:
            largest = law.get("tokens", int((law.get("side", 0) / patch) ** 2))
            arguments["tokens"] = row_length(arguments["tokens"], largest)
        try:
            stream = _open(config, arguments, where, training=False)
        except TooLarge as error:
            raise TooLarge(error.text, asked.format(name) + size) from error
        if may_grow and law["name"] == "native":
            stream = lengthen(stream, shards)
        yield label, stream


def _open(
    config: Mapping[str, Any], section: Mapping[str, Any], where: str, training: bool
) -> data.Stream:
    return config_lib.call(
        data.open_stream,
        section,
        where,
        seed=config["seed"],
        patch=models.patch_size(config["model"]["size"]),
        max_side=longest_side(config["task"], build_encoder(config).max_side),
        training=training,
    )
