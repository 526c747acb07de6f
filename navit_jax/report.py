"""Writes `report.html` of a run: `python -m navit_jax.report runs/demo`.

One self-contained page: what ran, how it learned, accuracy over resolution, padding, a
picture of packed rows. Text that comes from data or configs is escaped.
"""

import base64
import html
import io
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from absl import app, logging
from etils import epath

from navit_jax import config as config_lib
from navit_jax import pictures, reporting, run_folder
from navit_jax.errors import ConfigError

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 60rem;
       margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
table { border-collapse: collapse; font-size: 13px; }
td, th { border-bottom: 1px solid #ddd; padding: .2rem .8rem .2rem 0; text-align: left;
         vertical-align: top; }
td.number { text-align: right; font-variant-numeric: tabular-nums; }
img { max-width: 100%; } code, pre { font-size: 12.5px; background: #f6f6f6; }
pre { padding: .6rem; overflow-x: auto; } .note { color: #666; }
"""


def write_report(workdir: epath.Path) -> epath.Path:
    """Writes the page of one run and returns its path.

    Raises:
      ConfigError: the folder holds no run.
    """
    config = run_folder.read_config(workdir)
    records = reporting.read_metrics(workdir)
    body = "".join(
        [
            f"<h1>{_text(workdir.name)}</h1>",
            _summary(config, records),
            _section("Learning", _curves(records)),
            _section("Accuracy over resolution", _resolutions(workdir, records)),
            _section("Packed rows", _picture(workdir / "rows.png")),
            _section("Commands", _commands(workdir)),
            _section("Config", _table(config_lib.flatten(config).items())),
            _section("Environment", _environment(workdir)),
        ]
    )
    page = (
        "<!doctype html><html lang='en'><head><meta charset='utf-8'>"
        f"<title>{_text(workdir.name)}</title><style>{STYLE}</style></head>"
        f"<body>{body}</body></html>"
    )
    path = workdir / "report.html"
    path.write_text(page)
    return path


def _text(value: Any) -> str:
    return html.escape(str(value))


def _section(title: str, content: str) -> str:
    return f"<h2>{_text(title)}</h2>{content}" if content else ""


def _table(pairs: Iterable[tuple[str, Any]]) -> str:
    rows = "".join(
        f"<tr><td>{_text(key)}</td><td>{_text(value)}</td></tr>" for key, value in pairs
    )
    return f"<table>{rows}</table>"


def _summary(config: Mapping[str, Any], records: Sequence[Mapping[str, Any]]) -> str:
    if not records:
        return "<p class='note'>No step was reported yet.</p>"
    last: dict[str, Any] = {}
    for record in records:
        last |= record
    shown = [
        ("step", f"{last['step']} of {config['steps']}"),
        ("images seen", f"{last.get('data/images_seen', 0):,}"),
        ("tokens seen", f"{last.get('data/tokens_seen', 0):,}"),
        ("loss of the last interval", _number(last.get("train/loss"))),
        ("padding of the last interval", _share(last.get("pack/padding"))),
        ("images a row", _number(last.get("pack/images_per_row"))),
        ("images/s", _number(last.get("throughput/images_per_second"))),
        ("images that could not be used", last.get("data/skipped", 0)),
        ("steps skipped as not finite", last.get("train/nonfinite_steps", 0)),
    ]
    shown += [
        (name, _number(value)) for name, value in last.items()
        if name.startswith("eval/") and name.endswith("/accuracy")
    ]  # fmt: skip
    return _table(shown)


def _number(value: Any) -> str:
    return "?" if value is None else f"{value:.4g}"


def _share(value: Any) -> str:
    return "?" if value is None else f"{value:.2%}"


def _series(records: Sequence[Mapping[str, Any]], name: str) -> tuple[list, list]:
    found = [(r["step"], r[name]) for r in records if r.get(name) is not None]
    return [step for step, _ in found], [value for _, value in found]


def _curves(records: Sequence[Mapping[str, Any]]) -> str:
    evals = sorted(
        {k for r in records for k in r if re.fullmatch(r"eval/.*/(loss|accuracy)", k)}
    )
    panels = [
        ("loss", ["train/loss", *(k for k in evals if k.endswith("/loss"))]),
        (
            "accuracy",
            ["train/accuracy", *(k for k in evals if k.endswith("/accuracy"))],
        ),
        ("padding", ["pack/padding"]),
        ("images/s", ["throughput/images_per_second"]),
    ]
    panels = [(t, [n for n in names if _series(records, n)[0]]) for t, names in panels]
    panels = [(title, names) for title, names in panels if names]
    if not panels:
        return ""
    figure = pictures.figure(9, 2.8 * -(-len(panels) // 2))
    grid = figure.subplots(-(-len(panels) // 2), 2, squeeze=False).ravel()
    for axes in grid[len(panels) :]:
        axes.axis("off")
    for axes, (title, names) in zip(grid, panels, strict=False):
        for name in names:
            steps, values = _series(records, name)
            axes.plot(steps, values, marker="o" if len(steps) < 20 else "", ms=3,
                      lw=1.3, label=name)  # fmt: skip
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("step", fontsize=8)
        axes.tick_params(labelsize=8)
        axes.grid(alpha=0.3)
        if title in ("padding", "images/s"):
            axes.set_ylim(bottom=0)
        if len(names) > 1:
            axes.legend(fontsize=7, frameon=False)
    return _svg(figure)


def _resolutions(workdir: epath.Path, records: Sequence[Mapping[str, Any]]) -> str:
    """Accuracy against the side, from `evaluate` if it ran, else from the run."""
    path = workdir / "evaluation.json"
    found = json.loads(path.read_text())["values"] if path.exists() else {}
    for record in [] if found else records:
        found |= {k: v for k, v in record.items() if k.startswith("eval/")}
    sets: dict[str, list[tuple[float, ...]]] = {}
    for name, value in found.items():
        match = re.fullmatch(r"eval/(.+)_([\d.]+)/accuracy", name)
        if match and value is not None:
            low, high = (
                found.get(f"{name}_low", value),
                found.get(f"{name}_high", value),
            )
            point = (float(match[2]), value, low, high)
            sets.setdefault(match[1], []).append(point)
    if not sets:
        return ""
    figure = pictures.figure(6, 3.2)
    axes = figure.subplots()
    for label, points in sets.items():
        sides, values, lows, highs = zip(*sorted(points), strict=True)
        axes.plot(sides, values, marker="o", label=label)
        axes.fill_between(sides, lows, highs, alpha=0.15)
    for name in (n for n in found if n.startswith("baseline/")):
        axes.axhline(found[name], ls="--", lw=1, color="#888888")
        left = axes.get_xlim()[0]
        axes.text(left, found[name], name.split("/")[1], fontsize=7, va="bottom")
    axes.set_xlabel("side of the square with the image's area, pixels", fontsize=9)
    axes.set_ylabel("accuracy (band: 95 %, by group)", fontsize=9)
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize=8)
    pairs = [
        (k, _number(v)) for k, v in found.items() if not k.endswith(("_low", "_high"))
    ]
    return _svg(figure) + _table(pairs)


def _svg(figure: Any) -> str:
    file = io.StringIO()
    figure.savefig(file, format="svg")
    text = file.getvalue()
    return text[text.index("<svg") :]


def _picture(path: epath.Path) -> str:
    if not path.exists():
        return ""
    data = base64.b64encode(path.read_bytes()).decode()
    return f"<img alt='packed rows' src='data:image/png;base64,{data}'>"


def _commands(workdir: epath.Path) -> str:
    folder = _text(workdir)
    return (
        f"<pre>python -m navit_jax.train --config=... --workdir={folder}  # resumes\n"
        f"python -m navit_jax.evaluate --workdir={folder} --sides=32,64,128\n"
        f"python -m navit_jax.report {folder}</pre>"
    )


def _environment(workdir: epath.Path) -> str:
    path = workdir / "environment.json"
    if not path.exists():
        return ""
    return _table(config_lib.flatten(json.loads(path.read_text())).items())


def main(argv: Sequence[str]) -> None:
    """Writes the report of each run named."""
    if len(argv) < 2:
        raise app.UsageError("name one run or more: python -m navit_jax.report RUN...")
    for folder in argv[1:]:
        try:
            print(f"report: {write_report(epath.Path(folder))}")
        except ConfigError as error:
            logging.error("%s", error)
            raise SystemExit(error.exit_code) from error


if __name__ == "__main__":
    app.run(main)
