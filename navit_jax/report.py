"""Writes the page of one run or several: `python -m navit_jax.report RUN...`.

One self-contained HTML file: what differs, how they learned, accuracy over resolution,
padding, packed rows, predictions on real pictures, environment, commands. Text that
comes from data or configs is escaped.
"""

import base64
import html
import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from absl import app, flags, logging
from etils import epath

from navit_jax import (
    charts,
    command_line,
    experiment,
    plan,
    reporting,
    run_folder,
    samples,
)
from navit_jax import config as config_lib
from navit_jax.errors import ConfigError

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 62rem;
       margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
table { border-collapse: collapse; font-size: 13px; display: block; overflow-x: auto; }
td, th { border-bottom: 1px solid #ddd; padding: .2rem .8rem .2rem 0; text-align: left;
         vertical-align: top; font-variant-numeric: tabular-nums; }
img, svg { max-width: 100%; height: auto; }
code, pre { font-size: 12.5px; background: #f6f6f6; }
pre { padding: .6rem; overflow-x: auto; } .note { color: #666; }
.samples { display: flex; flex-wrap: wrap; gap: .7rem; }
figure { margin: 0; font-size: 12px; border-top: 3px solid #bbb; padding-top: 3px; }
figure img { height: 88px; display: block; } figcaption { max-width: 9rem; }
figure.right { border-color: #54a24b; } figure.wrong { border-color: #e45756; }
"""


class RunOnDisk:
    """What a run's folder holds of it.

    Attributes:
      name: Of the folder.
      records: Of metrics.jsonl.
      judged: Of `evaluate` if it ran on the newest checkpoint that was judged, else the
        last evaluation of the run.
      judged_step: Of that checkpoint.
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
        if not self.judged or self.judged_step < max(steps, default=0):
            named = self.last.items()
            self.judged = {k: v for k, v in named if k.startswith("eval/")}
            self.judged_step = max(steps, default=0)

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
    try:
        output.open("a").close()
    except OSError as error:
        raise ConfigError(
            f"--output={output} can not be written: {error}; name a file in a folder "
            "that exists"
        ) from error
    records = _named(runs, [run.records for run in runs])
    title = ", ".join(records)
    body = [
        f"<h1>{_text(title)}</h1>",
        _summary(runs),
        _section("What differs", _differences(runs)),
        _section("Learning", charts.draw_curves(records)),
        _section("Accuracy over resolution", _resolutions(runs)),
    ]
    for name, run in _named(runs, runs).items():
        of = f" of {name}" if len(runs) > 1 else ""
        body += [
            _section(f"Packed rows{of}", _rows(run)),
            _section(f"Predictions{of}", _samples(run, num_samples)),
            _section(f"Commands{of}", _commands(run)),
            _section(f"Config{of}", _folded(_table(_flat(run.config)))),
            _section(f"Environment{of}", _folded(_table(_flat(run.environment)))),
        ]
    output.write_text(
        "<!doctype html><html lang='en'><head><meta charset='utf-8'>"
        "<meta name='viewport' content='width=device-width'>"
        f"<title>{_text(title)}</title><style>{STYLE}</style></head>"
        f"<body>{''.join(body)}</body></html>"
    )


def _named(runs: Sequence[RunOnDisk], values: Sequence[Any]) -> dict[str, Any]:
    """By the run's name; by its path where two have the same name."""
    names = [run.name for run in runs]
    unique = len(set(names)) == len(names)
    labels = names if unique else [str(run.workdir) for run in runs]
    return dict(zip(labels, values, strict=True))


def _text(value: Any) -> str:
    return html.escape(str(value))


def _section(title: str, content: str) -> str:
    return f"<h2>{_text(title)}</h2>{content}" if content else ""


def _table(rows: Iterable[Sequence[Any]], header: Sequence[Any] = ()) -> str:
    head = "".join(f"<th>{_text(cell)}</th>" for cell in header)
    lines = [f"<tr>{head}</tr>"] if header else []
    for row in rows:
        lines.append("<tr>" + "".join(f"<td>{_text(c)}</td>" for c in row) + "</tr>")
    return f"<table>{''.join(lines)}</table>"


def _folded(content: str) -> str:
    return f"<details><summary>show</summary>{content}</details>"


def _flat(values: Mapping[str, Any]) -> Iterable[tuple[str, Any]]:
    return config_lib.flatten(values).items()


def _summary(runs: Sequence[RunOnDisk]) -> str:
    accuracies = sorted({
        name for run in runs for name in run.last
        if name.startswith("eval/") and name.endswith("/accuracy")
    })  # fmt: skip
    lines = [
        ("step", [f"{r.last.get('step', 0)} of {r.config['steps']}" for r in runs]),
        ("step that was judged", [r.judged_step or "-" for r in runs]),
        *(
            (label, [shape(run.last.get(name)) for run in runs])
            for label, name, shape in (
                ("images seen", "data/images_seen", _count),
                ("tokens seen", "data/tokens_seen", _count),
                ("loss of the last interval", "train/loss", _number),
                ("padding of the last interval", "pack/padding", _share),
                ("images a row", "pack/images_per_row", _number),
                ("images/s", "throughput/images_per_second", _number),
                ("images that could not be used", "data/skipped", _count),
                ("steps skipped as not finite", "train/nonfinite_steps", _count),
            )
        ),
        *((name, [_number(r.last.get(name)) for r in runs]) for name in accuracies),
    ]
    if not any(run.records for run in runs):
        return "<p class='note'>No step was reported yet.</p>"
    header = ["", *_named(runs, runs)] if len(runs) > 1 else []
    return _table([[label, *cells] for label, cells in lines], header)


def _count(value: Any) -> str:
    return "-" if value is None else f"{value:,}"


def _number(value: Any) -> str:
    return "-" if value is None else f"{value:.4g}"


def _share(value: Any) -> str:
    return "-" if value is None else f"{value:.2%}"


def _differences(runs: Sequence[RunOnDisk]) -> str:
    if len(runs) < 2:
        return ""
    flat = [config_lib.flatten(run.config) for run in runs]
    keys = sorted({key for config in flat for key in config})
    rows = [[key, *(config.get(key, "unset") for config in flat)] for key in keys]
    rows = [row for row in rows if any(cell != row[1] for cell in row[2:])]
    if not rows:
        return "<p class='note'>The configs are the same.</p>"
    return _table(rows, ["config", *_named(runs, runs)])


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
    return drawing + _folded(_table(rows, ["", *judged] if len(runs) > 1 else []))


def _rows(run: RunOnDisk) -> str:
    path = run.workdir / "rows.png"
    try:
        if not path.exists():
            plan.draw_images(experiment.build_stream(run.config), path)
    except (ValueError, OSError) as error:
        logging.warning("no picture of the rows of %s: %s", run.name, error)
        return f"<p class='note'>No picture: {_text(error)}</p>"
    data = base64.b64encode(path.read_bytes()).decode()
    return f"<img alt='packed rows' src='data:image/png;base64,{data}'>"


def _samples(run: RunOnDisk, num: int) -> str:
    if not num:
        return ""
    try:
        return samples.show_samples(run.workdir, run.config, num)
    except (ValueError, OSError, RuntimeError) as error:  # errors.py has all three
        logging.warning("no predictions of %s: %s", run.name, error)
        return f"<p class='note'>None: {_text(error)}</p>"


def _commands(run: RunOnDisk) -> str:
    folder = shlex.quote(str(run.workdir))
    argv = [str(arg) for arg in run.environment.get("command", [])[1:]]
    made = f"python -m navit_jax.train {shlex.join(argv)}\n" if argv else ""
    return "<pre>" + _text(
        f"{made}python -m navit_jax.evaluate --workdir={folder} --sides=32,64,128\n"
        f"python -m navit_jax.predict --workdir={folder} --images=FOLDER "
        "--output=predictions.csv"
    ) + "</pre>"  # fmt: skip


def define_main() -> Callable[[Sequence[str]], None]:
    """Defines the flags, and returns what reads them and writes the page."""
    output = flags.DEFINE_string(
        "output", None, "The page; default: report.html in the run's folder, or here"
    )
    num_samples = flags.DEFINE_integer("samples", 24, "Pictures to predict; 0: none")

    def main(argv: Sequence[str]) -> None:
        if len(argv) < 2:
            usage = "name one run or more: python -m navit_jax.report RUN..."
            raise app.UsageError(usage)
        command_line.quiet_libraries()
        folders = [epath.Path(folder) for folder in argv[1:]]
        default = folders[0] / "report.html" if len(folders) == 1 else "report.html"
        page = epath.Path(output.value or default)
        with command_line.exit_codes():
            write_report(folders, page, num_samples.value)
        print(f"report: {page}")

    return main


if __name__ == "__main__":
    app.run(define_main())
