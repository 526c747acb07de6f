"""Charts of runs for the report: curves over steps, what is right over resolution."""

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
    "recall at 5": r"eval/.*/(image_to_text|text_to_image)_r5",
    "similarity": r"(train|eval/.*)/similarity",
    "agreement with the teacher": r"eval/.*/(centred_cosine|r1)",
    "padding": r"pack/padding",
    "padding of text": r"pack/text_padding",
    "images/s": r"throughput/images_per_second",
}
# What is right of an evaluation, and what to call it.
METRICS = {
    "accuracy": "accuracy",
    "image_to_text_r5": "R@5, image to text",
    "text_to_image_r5": "R@5, text to image",
}
LABELS = {
    "side": "side of the square of the image's area, pixels",
    "tokens": "tokens an image, mean",
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
        if "padding" in title or title == "images/s":
            axes.set_ylim(0, 1.1 * max(max(values) for _, _, values in lines) or 1)
        if len(lines) > 1:
            axes.legend(fontsize=6.5, frameon=False)
    return _svg(figure)


def draw_resolutions(judged: Judged) -> str:
    """Accuracy and recall over the side, and over the tokens an image takes, as SVG.

    A row of charts for each metric that was judged; "" of none. Dashed is what is had
    without a pixel. Under a point that had to enlarge images stands their share.
    """
    rows = {
        metric: {
            f"{run}: {name}" if len(judged) > 1 else name: points
            for run, values in judged.items()
            for name, points in _by_set(values, metric).items()
        }
        for metric in METRICS
    }
    rows = {metric: sets for metric, sets in rows.items() if sets}
    if not rows:
        return ""
    figure = pictures.figure(9, 3.4 * len(rows))
    for (metric, sets), axes in zip(
        rows.items(),
        figure.subplots(len(rows), 2, sharey="row", squeeze=False),
        strict=True,
    ):
        guesses = {
            name[len("baseline/") : -len(metric) - 1]: value
            for values in judged.values()
            for name, value in values.items()
            if re.fullmatch(f"baseline/.*/{metric}", name) and value is not None
        }
        for over, own in zip(("side", "tokens"), axes, strict=True):
            _draw_sets(own, sets, over)
        drawn = [own for own in axes if own.lines]
        for own in drawn:
            for value in guesses.values():
                own.axhline(value, ls="--", lw=1, color="#888888")
        for name, value in guesses.items():
            drawn[0].text(
                0.01, value, _plain(name), fontsize=7, va="bottom",
                transform=drawn[0].get_yaxis_transform(),
            )  # fmt: skip
        # Of charts that share an axis the second has no numbers of its own.
        drawn[0].tick_params(labelleft=True)
        drawn[0].set_title(METRICS[metric], fontsize=10, loc="left")
        drawn[0].set_ylabel("share (band: 95 %, by group)", fontsize=9)
        drawn[0].set_ylim(bottom=0)
        drawn[0].legend(frameon=False, fontsize=7, loc="best")
    return _svg(figure)


def _by_set(values: Mapping[str, Any], metric: str) -> dict[str, list[dict[str, Any]]]:
    """The points of each eval set, from `eval/<set>_<dial>/<metric>`."""
    sets: dict[str, list[dict[str, Any]]] = {}
    for name, value in values.items():
        match = re.fullmatch(f"eval/(.+)_([^_/]+)/{metric}", name)
        if match is None or value is None:
            continue
        stem, dial = name.removesuffix(metric), match[2]
        side = re.fullmatch(r"\d+(\.\d+)?", dial)
        point = {
            "side": float(dial) if side else None,
            "tokens": values.get(f"{stem}tokens_per_image"),
            "native": dial == "native",
            "upscaled": values.get(f"{stem}upscaled"),
            "value": value,
            "low": values.get(f"{name}_low", value),
            "high": values.get(f"{name}_high", value),
        }
        sets.setdefault(match[1], []).append(point)
    return sets


def _draw_sets(
    axes: Any, sets: Mapping[str, Sequence[Mapping[str, Any]]], over: str
) -> None:
    """A line a set; nothing to be seen if no point of any is over `over`."""
    for number, (label, every) in enumerate(sets.items()):
        points = sorted((p for p in every if p[over]), key=lambda point: point[over])
        if not points:
            continue
        colour = pictures.COLOURS[number % len(pictures.COLOURS)]
        # Of native size they are many sides at once: a point of its own, on no line.
        joined = [point for point in points if not point["native"]]
        x, y = ([point[key] for point in joined] for key in (over, "value"))
        axes.plot(x, y, marker="o", ms=4, color=colour, label=_plain(label))
        for point in points:
            place = point[over], point["value"]
            if point["native"] or len(joined) == 1:  # which have no band
                axes.vlines(place[0], point["low"], point["high"], colour, alpha=0.3)
            if point["native"]:
                axes.plot(*place, marker="D", ms=5, color=colour)
                _tell(axes, "native", place, 7)
            if point["upscaled"]:
                _tell(axes, f"{point['upscaled']:.0%} up", place, -11)
        low, high = ([point[key] for point in joined] for key in ("low", "high"))
        axes.fill_between(x, low, high, alpha=0.15, color=colour)
    if not axes.lines:
        axes.axis("off")
        return
    axes.set_xlabel(LABELS[over], fontsize=9)
    axes.grid(alpha=0.3)
    axes.tick_params(labelsize=8)


def _tell(
    axes: Any, text: str, place: tuple[float, float], height: float | int
) -> None:
    axes.annotate(
        text, place, xytext=(0, height), textcoords="offset points", ha="center",
        fontsize=6, color="#666666",
    )  # fmt: skip


def _series(records: Records, name: str) -> tuple[list[int], list[float]]:
    found = [(r["step"], r[name]) for r in records if r.get(name) is not None]
    return [step for step, _ in found], [value for _, value in found]


def _plain(label: str) -> str:
    """A label as it is: matplotlib takes $...$ for formulas, and leaves out _names."""
    return label.replace("$", r"\$").replace("_", " _", label.startswith("_"))


def _svg(figure: Any) -> str:
    text = pictures.encode(figure, "svg").decode()
    return text[text.index("<svg") :]
