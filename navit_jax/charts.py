"""Charts of runs for the report: curves over steps, accuracy over resolution."""

import io
import re
from collections.abc import Mapping, Sequence
from typing import Any

from navit_jax import pictures

Records = Sequence[Mapping[str, Any]]
# Evaluations by name of the run, then by name of the number.
Judged = Mapping[str, Mapping[str, float | None]]
PANELS = {
    "loss": r"train/loss|eval/.*/loss",
    "accuracy": r"train/accuracy|eval/.*/accuracy",
    "padding": r"pack/padding",
    "images/s": r"throughput/images_per_second",
}


def draw_curves(runs: Mapping[str, Records]) -> str:
    """What was measured along the steps, a panel a kind, as SVG; "" of no steps."""
    panels = []
    for title, pattern in PANELS.items():
        lines = [
            (f"{run}: {name}" if len(runs) > 1 else name, *points)
            for run, records in runs.items()
            for name in sorted({key for record in records for key in record})
            if re.fullmatch(pattern, name) and (points := _series(records, name))[0]
        ]
        if lines:
            panels.append((title, lines))
    if not panels:
        return ""
    rows = -(-len(panels) // 2)
    figure = pictures.figure(9, 2.9 * rows)
    grid = figure.subplots(rows, 2, squeeze=False).ravel()
    for axes in grid[len(panels) :]:
        axes.axis("off")
    for axes, (title, lines) in zip(grid, panels, strict=False):
        for label, steps, values in lines:
            marker = "o" if len(steps) < 20 else ""
            axes.plot(steps, values, marker=marker, ms=3, lw=1.3, label=_plain(label))
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("step", fontsize=8)
        axes.tick_params(labelsize=8)
        axes.grid(alpha=0.3)
        if title in ("padding", "images/s"):
            axes.set_ylim(bottom=0)
        if len(lines) > 1:
            axes.legend(fontsize=6.5, frameon=False)
    return _svg(figure)


def draw_resolutions(judged: Judged) -> str:
    """Accuracy over the side, and over the tokens an image takes, as SVG.

    Under a point that had to enlarge images stands their share. "" without accuracies.
    """
    figure = pictures.figure(9, 3.4)
    left, right = figure.subplots(1, 2, sharey=True)
    drawn = False
    for run, values in judged.items():
        for label, points in _by_set(run if len(judged) > 1 else "", values).items():
            drawn = True
            _line(left, label, [p for p in points if p["side"]], "side")
            _line(right, label, [p for p in points if p["tokens"]], "tokens")
        baselines = {
            name.removeprefix("baseline/").removesuffix("/accuracy"): value
            for name, value in values.items()
            if name.startswith("baseline/") and value is not None
        }
        for name, value in baselines.items():
            for axes in (left, right) if right.lines else (left,):
                axes.axhline(value, ls="--", lw=1, color="#888888")
            left.text(
                0.01, value, _plain(name), fontsize=7, va="bottom",
                transform=left.get_yaxis_transform(),
            )  # fmt: skip
    if not drawn:
        return ""
    if not right.lines:  # an evaluation that did not count them
        right.axis("off")
    left.set_xlabel("side of the square of the image's area, pixels", fontsize=9)
    right.set_xlabel("tokens an image, mean", fontsize=9)
    left.set_ylabel("accuracy (band: 95 %, by group)", fontsize=9)
    left.set_ylim(bottom=0)
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.tick_params(labelsize=8)
    left.legend(frameon=False, fontsize=7, loc="lower right")
    return _svg(figure)


def _by_set(run: str, values: Mapping[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """The points of each eval set, from `eval/<set>_<dial>/<metric>`."""
    sets: dict[str, list[dict[str, Any]]] = {}
    for name, value in values.items():
        match = re.fullmatch(r"eval/(.+)_([^_/]+)/accuracy", name)
        if match is None or value is None:
            continue
        stem = name.removesuffix("accuracy")
        side = re.fullmatch(r"\d+(\.\d+)?", match[2])
        point = {
            "side": float(match[2]) if side else None,
            "tokens": values.get(f"{stem}tokens_per_image"),
            "upscaled": values.get(f"{stem}upscaled"),
            "accuracy": value,
            "low": values.get(f"{name}_low", value),
            "high": values.get(f"{name}_high", value),
        }
        label = f"{run}: {match[1]}" if run else match[1]
        sets.setdefault(label, []).append(point)
    return sets


def _line(axes: Any, label: str, points: list[dict[str, Any]], over: str) -> None:
    points = sorted(points, key=lambda point: point[over])
    if not points:
        return
    x, *ys = ([p[k] for p in points] for k in (over, "accuracy", "low", "high"))
    axes.plot(x, ys[0], marker="o", ms=4, label=_plain(label))
    axes.fill_between(x, ys[1], ys[2], alpha=0.15)
    for point in points:
        if point["upscaled"]:
            axes.annotate(
                f"{point['upscaled']:.0%} up", (point[over], point["accuracy"]),
                xytext=(0, -11), textcoords="offset points", ha="center", fontsize=6,
                color="#666666",
            )  # fmt: skip


def _series(records: Records, name: str) -> tuple[list[int], list[float]]:
    found = [(r["step"], r[name]) for r in records if r.get(name) is not None]
    return [step for step, _ in found], [value for _, value in found]


def _plain(label: str) -> str:
    """A label as it is: matplotlib takes $...$ for formulas, and leaves out _names."""
    return label.replace("$", r"\$").replace("_", " _", label.startswith("_"))


def _svg(figure: Any) -> str:
    import matplotlib

    file = io.StringIO()
    # Letters stay letters: they can be searched, and the page is smaller.
    with matplotlib.rc_context({"svg.fonttype": "none"}):
        figure.savefig(file, format="svg")
    text = file.getvalue()
    return text[text.index("<svg") :]
