"""Writes the page of one run or several: `python -m navit_jax.report RUN...`.

One self-contained HTML file: what differs, how they learned, accuracy over resolution,
of which pictures that is, padding, packed rows, predictions on real pictures, or for
captions the pictures found and back, what a SparseFormer looks at, environment,
commands.
"""

import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from absl import flags, logging
from etils import epath

from navit_jax import (
    charts,
    command_line,
    commands,
    experiment,
    gallery,
    page,
    pictures,
    plan,
    predictor,
    reporting,
    run_folder,
    samples,
    seeing,
)
from navit_jax import config as config_lib
from navit_jax.errors import ConfigError


class RunOnDisk:
    """What a run's folder holds of it.

    Attributes:
      name: Of the folder.
      records: Of metrics.jsonl.
      judged: Of `evaluate` if it ran on the newest checkpoint that was judged, else the
        last evaluation of the run.
      judged_step: Of that checkpoint.
      judged_by: The arguments of `evaluate`; none of the run itself.
      environment: What it ran on, and by which command.
    """

    def __init__(self, workdir: epath.Path):
        """Reads the folder.

        Raises:
          ConfigError: it holds no run, or a file of it is damaged.
        """
        self.workdir, self.name = workdir, workdir.name
        self.config = run_folder.read_config(workdir)
        self.records = reporting.read_metrics(workdir)
        judged = self._read("evaluation.json")
        self.environment = self._read("environment.json")
        self.last: dict[str, Any] = {}
        for record in self.records:
            self.last |= record
        steps = [r["step"] for r in self.records if any("eval/" in key for key in r)]
        self.judged, self.judged_step = judged.get("values", {}), judged.get("step", 0)
        self.judged_by = judged.get("command", [])[1:]
        if not self.judged or self.judged_step < max(steps, default=0):
            named = self.last.items()
            self.judged = {k: v for k, v in named if k.startswith("eval/")}
            self.judged_step, self.judged_by = max(steps, default=0), []

    def _read(self, name: str) -> dict[str, Any]:
        path = self.workdir / name
        remedy = "delete it; evaluating, or training on, writes it again"
        return run_folder.read_json(path, remedy) if path.exists() else {}


def write_report(
    workdirs: Sequence[epath.Path], output: epath.Path, num_samples: int = 24
) -> None:
    """Writes the page of some runs.

    Args:
      num_samples: Pictures that each run's model is asked about; 0 loads no model.

    Raises:
      ConfigError: a folder holds no run or is named twice, the page can not be
        written, or the number of pictures is negative.
    """
    if num_samples < 0:
        raise ConfigError(f"--samples={num_samples}: give 0 or more")
    if len({workdir.resolve() for workdir in workdirs}) < len(workdirs):
        named = " ".join(map(str, workdirs))
        raise ConfigError(f"{named}: a run is named twice; name each once")
    runs = [RunOnDisk(workdir) for workdir in workdirs]
    page.write(output, lambda: _compose(runs, num_samples))


def _compose(runs: Sequence[RunOnDisk], num_samples: int) -> str:
    records = _named(runs, [run.records for run in runs])
    parts = [
        _summary(runs),
        page.section("What differs", _differences(runs)),
        page.section("Learning", charts.draw_curves(records)),
        page.section("Accuracy over resolution", _resolutions(runs)),
    ]
    for name, run in _named(runs, runs).items():
        sections = {
            "Pictures of these numbers": _sets(run),
            "Packed rows": _rows(run),
            **_samples(run, num_samples),
            **_show("Commands", run, lambda run=run: _commands(run)),
            "Config": page.fold(page.table(_flat(run.config))),
            "Environment": page.fold(page.table(_flat(run.environment))),
        }
        of = f" of {name}" if len(runs) > 1 else ""
        parts += [page.section(f"{k}{of}", content) for k, content in sections.items()]
    return page.build(", ".join(records), parts)


def _named(runs: Sequence[RunOnDisk], values: Sequence[Any]) -> dict[str, Any]:
    """By the run's name; by its path where two have the same name."""
    names = [run.name for run in runs]
    unique = len(set(names)) == len(names)
    labels = names if unique else [str(run.workdir) for run in runs]
    return dict(zip(labels, values, strict=True))


def _flat(values: Mapping[str, Any]) -> Iterable[tuple[str, Any]]:
    return config_lib.flatten(values).items()


def _summary(runs: Sequence[RunOnDisk]) -> str:
    if not any(run.records for run in runs):
        return page.note("No step was reported yet.")
    right = sorted({
        name for run in runs for name in run.last
        if name.startswith("eval/") and name.endswith(RIGHT)
    })  # fmt: skip
    lines = [
        ("step", [f"{r.last.get('step', 0)} of {r.config['steps']}" for r in runs]),
        ("step that was judged", [r.judged_step or "-" for r in runs]),
        *(
            (label, [shape(run.last.get(name)) for run in runs])
            for label, name, shape in (
                *LINES,
                *((name, name, _number) for name in right),
            )
            if name != "pack/text_padding" or any(name in run.last for run in runs)
        ),
    ]
    header = ["", *_named(runs, runs)] if len(runs) > 1 else []
    return page.table([[label, *cells] for label, cells in lines], header)


def _count(value: Any) -> str:
    return "-" if value is None else f"{value:,}"


def _number(value: Any) -> str:
    return "-" if value is None else f"{value:.4g}"


def _share(value: Any) -> str:
    return "-" if value is None else f"{value:.2%}"


RIGHT = ("/accuracy", "_r1", "_r5", "/r1", "/centred_cosine")
LINES = (
    ("images seen", "data/images_seen", _count),
    ("tokens seen", "data/tokens_seen", _count),
    ("loss of the last interval", "train/loss", _number),
    ("padding of the last interval", "pack/padding", _share),
    ("padding of its texts", "pack/text_padding", _share),
    ("images a row", "pack/images_per_row", _number),
    ("images/s", "throughput/images_per_second", _number),
    ("images that could not be used", "data/skipped", _count),
    ("steps skipped as not finite", "train/nonfinite_steps", _count),
)


def _differences(runs: Sequence[RunOnDisk]) -> str:
    if len(runs) < 2:
        return ""
    flat = [config_lib.flatten(run.config) for run in runs]
    keys = sorted({key for config in flat for key in config})
    rows = [[key, *(config.get(key, "unset") for config in flat)] for key in keys]
    rows = [row for row in rows if any(cell != row[1] for cell in row[2:])]
    if not rows:
        return page.note("The configs are the same.")
    return page.table(rows, ["config", *_named(runs, runs)])


def _resolutions(runs: Sequence[RunOnDisk]) -> str:
    judged = _named(runs, [run.judged for run in runs])
    drawing = charts.draw_resolutions(judged)
    names = sorted({name for values in judged.values() for name in values})
    rows = [
        [name, *(_number(values.get(name)) for values in judged.values())]
        for name in names
        if not name.endswith(("_low", "_high"))
    ]
    if not rows:
        return ""
    return drawing + page.fold(page.table(rows, ["", *judged] if len(runs) > 1 else []))


def _rows(run: RunOnDisk) -> str:
    try:
        config = run_folder.use_own_vocabulary(run.workdir, run.config)
        drawing = plan.draw_images(experiment.build_stream(config))
    except (ValueError, OSError) as error:
        logging.warning("no picture of the rows of %s: %s", run.name, error)
        return page.note(f"No picture: {error}")
    return page.embed_image(pictures.encode(drawing, "png"), "png", "packed rows")


def _sets(run: RunOnDisk) -> str:
    """Of which pictures the numbers of training and of each eval set are."""
    rows = samples.list_sets(run.config)
    shown = page.table(rows, ["", "pictures", "judged by", "sides or budgets"])
    by = f"python -m navit_jax.evaluate {shlex.join(map(str, run.judged_by))}"
    note = f"Judged by: {by if run.judged_by else 'the run itself'}; step "
    return shown + (page.note(f"{note}{run.judged_step}") if run.judged else "")


def _samples(run: RunOnDisk, num: int) -> dict[str, str]:
    """What the model says of pictures of the eval sets, by title."""
    evals = run.config.get("evals", {})
    if not num:
        return {}
    if not evals:
        return {"Predictions": page.note("None: config.evals is empty")}
    try:
        model = predictor.load(run.workdir)
    except FAILURES as error:
        return _tell("Predictions", run, error)
    return {
        **_show("Captions", run, lambda: gallery.show_gallery(model, evals, num)),
        **_show("Predictions", run, lambda: _predictions(model, evals, num)),
        **_show("Where it looks", run, lambda: seeing.show_looks(model, evals)),
    }


def _predictions(
    model: predictor.Predictor, evals: Mapping[str, Mapping[str, Any]], num: int
) -> dict[str, str]:
    if hasattr(model.task, "vectors"):  # of a student and its teacher
        return {}
    return {"Predictions": samples.show_samples(model, evals, num)}


FAILURES = ValueError, OSError, RuntimeError  # errors.py has all three


def _show(title: str, run: RunOnDisk, show: Callable[[], dict[str, str]]) -> Any:
    """What `show` returns, or why it could not, under the title."""
    try:
        return show()
    except FAILURES as error:
        return _tell(title, run, error)


def _tell(title: str, run: RunOnDisk, error: Exception) -> dict[str, str]:
    logging.warning("%s of %s: %s", title, run.name, error)
    return {title: page.note(f"None: {error}")}


def _commands(run: RunOnDisk) -> dict[str, str]:
    argv = [str(arg) for arg in run.environment.get("command", [])[1:]]
    lines = commands.list_commands(run.config, str(run.workdir), argv)
    return {"Commands": "<pre>" + page.text("\n".join(lines)) + "</pre>"}


def define_main() -> Callable[[Sequence[str]], int]:
    """Defines the flags, and returns what takes the runs and writes the page."""
    output = flags.DEFINE_string(
        "output", None, "The page; default: report.html in the run's folder, or here"
    )
    num_samples = flags.DEFINE_integer("samples", 24, "Pictures to predict; 0: none")

    def main(workdirs: Sequence[str]) -> int:
        if not workdirs:
            raise ConfigError("name one run or more: python -m navit_jax.report RUN...")
        folders = [epath.Path(workdir) for workdir in workdirs]
        default = folders[0] / "report.html" if len(folders) == 1 else "report.html"
        path = epath.Path(output.value or default)
        write_report(folders, path, num_samples.value)
        print(f"report: {path}")
        return 0

    return main


if __name__ == "__main__":
    command_line.run(define_main(), words=True)
