"""Pictures of packed rows: the images of a row above the tokens they take.

B rows, L tokens a row.
"""

import io
from collections.abc import Sequence
from typing import Any

import numpy as np

from navit_jax.batch import PackedBatch
from navit_jax.data.patches import unpatchify

# Neighbouring images of a row differ in colour; padding is hatched.
COLOURS = ("#4c78a8", "#f58518", "#54a24b", "#b279a2", "#e45756", "#72b7b2", "#eeca3b")


def figure(width: float | int, height: float | int) -> Any:
    """An empty matplotlib figure, in inches; no window and no global state."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def encode(drawing: Any, kind: str) -> bytes:
    """The file of a matplotlib figure, `kind` "png", "jpeg" or "svg"."""
    import matplotlib

    file = io.BytesIO()
    # Letters stay letters: they can be searched, and the file is smaller.
    with matplotlib.rc_context({"svg.fonttype": "none"}):
        drawing.savefig(file, format=kind, dpi=110)
    return file.getvalue()


def draw_plan(rows: Sequence[Sequence[int]], num_tokens: int) -> Any:
    """A matplotlib figure: a bar a row, a coloured part for the tokens of each image.

    Args:
      rows: The kept tokens of each image, by row.
      num_tokens: L.
    """
    drawing = figure(9, 0.8 + 0.28 * len(rows))
    axes = drawing.subplots()
    for r, lengths in enumerate(rows):
        start = 0
        for i, length in enumerate(lengths):
            colour = COLOURS[i % len(COLOURS)]
            axes.barh(
                r, length, left=start, color=colour, edgecolor="white", height=0.8
            )
            if length > num_tokens / 25:
                axes.text(
                    start + length / 2, r, str(length), ha="center", va="center",
                    fontsize=7, color="white",
                )  # fmt: skip
            start += length
        rest = num_tokens - start
        if rest:
            axes.barh(
                r, rest, left=start, color="white", edgecolor="#999999", hatch="////",
                height=0.8, linewidth=0.5,
            )  # fmt: skip
    total = sum(sum(lengths) for lengths in rows)
    padding = 1 - total / max(len(rows) * num_tokens, 1)
    images = sum(len(lengths) for lengths in rows)
    axes.set_title(
        f"{len(rows)} rows of {num_tokens} tokens, {images} images, "
        f"{padding:.1%} padding (hatched)",
        fontsize=10,
    )
    axes.set_xlim(0, num_tokens)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_xlabel("token", fontsize=9)
    axes.set_ylabel("row", fontsize=9)
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    return drawing


def draw_batch(
    batch: PackedBatch, patch: int, num_rows: int = 3, max_images: int = 12
) -> Any:
    """A matplotlib figure: the images of the first rows, and the tokens they take.

    Dropped patches are left white; the grid size stands under each image.

    Args:
      batch: On the host.
      patch: Side of a patch in pixels.
    """
    from matplotlib.patches import Rectangle

    num_rows = min(num_rows, len(batch.segment_ids))
    drawing = figure(9, 1.75 * num_rows)
    parts = drawing.subfigures(num_rows, 1, squeeze=False)[:, 0]
    for r, part in enumerate(parts):
        segments = batch.segment_ids[r]
        slots = np.flatnonzero(batch.image_mask[r])[:max_images]
        grids = [(int(g[0]), int(g[1])) for g in batch.grids[r, slots]]
        # Wide images get wide panels, so that all are drawn at one scale.
        shape = {"height_ratios": [4, 1], "hspace": 0.02}
        widths = [max(columns, 1) for _, columns in grids] or [1]
        top, bottom = part.subfigures(2, 1, **shape)
        panels = top.subplots(1, len(widths), width_ratios=widths, squeeze=False)[0]
        tallest = max([rows for rows, _ in grids], default=1)
        for panel, slot, grid in zip(panels, slots, grids, strict=False):
            mine = segments == slot + 1
            image = unpatchify(
                batch.patches[r, mine], batch.coords[r, mine], grid, patch
            )
            panel.imshow(image)
            panel.set_ylim(tallest * patch, 0)
            colour = COLOURS[slot % len(COLOURS)]
            panel.set_title(f"{grid[0]}x{grid[1]}", fontsize=7, color=colour, pad=2)
            for side in panel.spines.values():
                side.set_visible(False)
            frame = {"fill": False, "edgecolor": colour, "linewidth": 1.2}
            height, width = image.shape[:2]
            panel.add_patch(Rectangle((-0.5, -0.5), width, height, **frame))
        for panel in panels:
            panel.set_xticks([])
            panel.set_yticks([])
        _token_bar(bottom.subplots(), segments)
    return drawing


def _token_bar(axes: Any, segments: np.ndarray) -> None:
    start = 0
    for segment, length in zip(*np.unique(segments, return_counts=True), strict=True):
        if segment:
            colour = COLOURS[(segment - 1) % len(COLOURS)]
            axes.barh(0, length, left=start, color=colour, edgecolor="white")
            start += length
    if start < len(segments):
        axes.barh(
            0, len(segments) - start, left=start, color="white", edgecolor="#999999",
            hatch="////", linewidth=0.5,
        )  # fmt: skip
    axes.set_xlim(0, len(segments))
    axes.set_yticks([])
    axes.tick_params(labelsize=7)
    axes.spines[["top", "right", "left"]].set_visible(False)
