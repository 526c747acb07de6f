"""Evaluates: `python -m navit_jax.evaluate --workdir=runs/demo --sides=32,64,native`.

Judges a checkpoint on every set of `config.evals` at any resolutions; --shots adds
linear probes, --baselines what is had without seeing a pixel.
"""

import json
import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
from absl import flags
from etils import epath

from navit_jax import (
    command_line,
    data,
    experiment,
    predictor,
    processes,
    run_folder,
    sharding,
    storage,
)
from navit_jax.baselines import pixel_free, without_pictures
from navit_jax.errors import ConfigError
from navit_jax.evaluator import Evaluator
from navit_jax.few_shot import few_shot
from navit_jax.judges import Metrics, Retrieval
from navit_jax.retrieval import DEPTHS


def evaluate(
    workdir: epath.PathLike,
    sides: Sequence[float | int | str] = (),
    budgets: Sequence[int] = (),
    upscale: Sequence[bool] = (),
    split: str = "",
    step: int | str | None = None,
    baselines: bool = False,
    shots: Sequence[int] = (),
    output: epath.PathLike = "",
    tell: Callable[[Mapping[str, float]], None] = lambda values: None,
) -> dict[str, float]:
    """Judges a checkpoint of a run, on all devices here, and writes down what it finds.

    The mesh of the run's config need not be had: rows are split over the devices there
    are, of all processes, in a number that is a multiple of them.

    Args:
      sides: In pixels, or "native"; those of the config without sides and budgets.
      budgets: Most patches an image.
      upscale: Whether smaller images are enlarged; with both answers the sets are
        judged twice, and `_no_upscale` is added to the name of the second; () is as
        the config says.
      split: Of the eval sets' sources, e.g. "test"; that of the config if empty.
      step: Of the checkpoint; None is the newest, see `checkpoint.restore_params`.
      baselines: Whether to add what is had without seeing a pixel: by classifiers, and
        in retrieval by chance and by who knows the top category of a picture.
      shots: Images a class of linear probes on the pooled vectors, see `few_shot`.
      output: A .json file; `evaluation.json` in the run's folder if empty.
      tell: Is given the values before they are written.

    Returns:
      `eval/<set>_<resolution>/<metric>` and `baseline/<set>/<guess>/<metric>`.

    Raises:
      ConfigError: there is no set, or two get the same name, or what is asked does
        not fit the run, or the output can not be written.
      DataError: a set has no picture that can be used.
    """
    workdir = storage.locate(workdir)
    config = run_folder.read_config(workdir)
    path = epath.Path(output) if output else workdir / "evaluation.json"
    # A device would be replaced; epath calls it a file.
    if os.path.exists(path) and not os.path.isfile(path):
        raise ConfigError(f"--output={path} is no file: give the name of one")
    run_folder.check_writable(path.parent, f"--output={path}")
    dial = {"sides": list(sides), "budgets": list(budgets)} if sides or budgets else {}
    sections: dict[str, Any] = {}
    for name, section in _sections(config, dial, upscale, split):
        if name in sections:
            raise ConfigError(
                f"two sets of config.evals would be judged as {name!r}: rename one, or "
                "name each answer of --upscale once"
            )
        sections[name] = section
    if not sections:
        raise ConfigError("config.evals is empty: there is no set to judge on")
    if shots and not run_folder.read_class_names(workdir):
        raise ConfigError("--shots: the run has no classes to learn from a few images")
    model = predictor.restore(workdir, step, sharding.make_mesh())
    config = {**model.config, "evals": sections}
    with jax.set_mesh(model.mesh):
        evaluator = Evaluator(
            config,
            model.task,
            model.mesh,
            model.class_names,
            "--" if dial else "config.evals.{}.",
        )
        values = evaluator.run(model.params)
    if shots:
        values |= _few_shot(workdir, config, evaluator, model.step, shots)
    if baselines:
        values |= _baselines(config, evaluator)
    tell(values)
    # JSON has no NaN.
    finite = {k: v if math.isfinite(v) else None for k, v in values.items()}
    record = {"step": model.step, "values": finite, "command": sys.argv}
    if jax.process_index() == 0:
        try:
            run_folder.store(path, json.dumps(record, indent=2))
        except OSError as error:
            raise ConfigError(f"--output={path} can not be written: {error}") from error
    return values


def _sections(
    config: Mapping[str, Any],
    dial: Mapping[str, Any],
    upscale: Sequence[bool],
    split: str,
) -> Iterator[tuple[str, dict[str, Any]]]:
    """The eval sets of the config as the command asks for them, by name."""
    evals = config.get("evals", {})
    for name, section in evals.items():
        sources = {
            key: {**source, "split": split} if split else source
            for key, source in section["sources"].items()
        }
        kept = {k: v for k, v in section.items() if k not in ("sides", "budgets")}
        asked = {**(kept if dial else section), **dial, "sources": sources}
        label = f"{name}_{split}" if split and len(evals) > 1 else split or name
        if not upscale:
            yield label, asked
        for answer in upscale:
            suffix = "" if answer else "_no_upscale"
            yield f"{label}{suffix}", {**asked, "upscale": answer}


def _few_shot(
    workdir: epath.Path,
    config: Mapping[str, Any],
    evaluator: Evaluator,
    step: int,
    shots: Sequence[int],
) -> dict[str, float]:
    """Linear probes of every set and resolution, from the first training source."""
    model = predictor.load(workdir, step)
    (train, *_), _ = data.open_sources(config["data"]["sources"])
    values = {}
    for name, stream in evaluator.streams.items():
        (judged,), plan = stream.loader.sources, stream.plan
        law = plan.resolution
        found = few_shot(model, train, judged, shots, law, plan.upscale)
        values |= {f"eval/{name}/{metric}": value for metric, value in found.items()}
    return values


def _baselines(config: Mapping[str, Any], evaluator: Evaluator) -> dict[str, float]:
    """What is had without a pixel, by set; any of its resolutions has its records.

    Sets of the same records, judged alike, have the same: the first is named.
    """
    values: dict[str, float] = {}
    sets: dict[Any, tuple[str, data.Stream]] = {}
    for key, stream in evaluator.streams.items():
        name = evaluator.set_of[key]
        sources = json.dumps(config["evals"][name]["sources"])
        sets.setdefault((type(evaluator.judges[name]), sources), (name, stream))
    for name, stream in sets.values():
        found: dict[str, dict[str, float]] = {}
        if isinstance(evaluator.judges[name], Retrieval):
            found = without_pictures(stream.loader.sources[0])
        elif isinstance(evaluator.judges[name], Metrics) and stream.class_names:
            accuracies = pixel_free(experiment.build_stream(config), stream)
            found = {guess: {"accuracy": value} for guess, value in accuracies.items()}
        for guess, metrics in found.items():
            for metric, value in metrics.items():
                values[f"baseline/{name}/{guess}/{metric}"] = value
    if not values:
        raise ConfigError(
            "--baselines: no set has classes that the run has learned, or captions to "
            "retrieve"
        )
    return values


def format_table(values: Mapping[str, float]) -> str:
    """A line for each set and resolution, a column for each of the usual metrics.

    Beside accuracy and R@1 stands the 95 % interval by near-duplicate group, where
    there is one; all numbers are in `evaluation.json`.
    """
    points = dict.fromkeys(name.rsplit("/", 1)[0] for name in values)
    metrics = {name.rsplit("/", 1)[1] for name in values}
    shots = [m for m in metrics if m.endswith("_shot_accuracy")]
    shots.sort(key=lambda name: int(name.split("_")[0]))
    columns = [m for m in (*COLUMNS, *shots) if m in metrics]
    table = [["", *(COLUMNS.get(m, m) for m in columns)]]
    for point in points:
        cells = [_cell(values, f"{point}/{metric}") for metric in columns]
        table.append([point.removeprefix("eval/"), *cells])
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip()
        for line in table
    )


COLUMNS = {
    "images": "images",
    "tokens_per_image": "tokens an image",
    "upscaled": "upscaled",
    "shrunk": "shrunk",
    "seconds_per_image": "s an image",
    "accuracy": "accuracy",
    "loss": "loss",
    "centred_cosine": "centred cosine",
    "r1": "own teacher R@1",
    **{
        f"{way}_r{depth}": f"{short} R@{depth}"
        for way, short in (
            ("image_to_text", "image to text"),
            ("text_to_image", "text to image"),
        )
        for depth in DEPTHS
    },
    "accuracy_absent": "accuracy, names not in training",
    "similarity": "similarity",
    "nll": "NLL",
    "brier": "Brier",
    "calibration_error": "ECE",
    "calibrated_error": "ECE if calibrated",
}


def _cell(values: Mapping[str, float], name: str) -> str:
    if name not in values:
        return ""
    cell = f"{values[name]:.4g}"
    own = ("/accuracy", "_r1", "/r1", "/centred_cosine")
    if name.endswith(own) and f"{name}_low" in values:
        return f"{cell} ({values[f'{name}_low']:.3f} .. {values[f'{name}_high']:.3f})"
    return cell


def define_main() -> Callable[[], int]:
    """Defines the flags, and returns what reads them and evaluates."""
    workdir = flags.DEFINE_string("workdir", None, "Folder of the run", required=True)
    sides = flags.DEFINE_list("sides", [], "In pixels, or native, as 32,64,native")
    budgets = flags.DEFINE_list("budgets", [], "Most patches an image, as 16,49")
    upscale = flags.DEFINE_list(
        "upscale", [], "Enlarge smaller images: yes, no or both"
    )
    split = flags.DEFINE_string("split", "", "Split of the eval sets, e.g. test")
    step = command_line.define_step()
    baselines = flags.DEFINE_bool("baselines", False, "Add what is had without a pixel")
    shots = flags.DEFINE_list("shots", [], "Images a class of linear probes, as 1,10")
    output = flags.DEFINE_string(
        "output", "", "A .json file; default: evaluation.json in the run's folder"
    )
    start = processes.define_flags()

    def main() -> int:
        start(workdir.value)
        evaluate(
            workdir.value,
            [command_line.parse_side(side) for side in sides.value],
            command_line.parse_counts("budgets", budgets.value),
            command_line.parse_answers("upscale", upscale.value),
            split.value,
            step(),
            baselines.value,
            command_line.parse_counts("shots", shots.value),
            output.value,
            lambda values: print(format_table(values)),
        )
        return 0

    return main


if __name__ == "__main__":
    command_line.run(define_main())
