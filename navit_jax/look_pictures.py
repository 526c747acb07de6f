"""Pictures of what latent tokens look at: boxes and points, and the points' density.

S points a token.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8

from navit_jax import foreground, pictures
from navit_jax.foreground import Look

# Each of its own height and width.
Images = Sequence[UInt8[np.ndarray, "_ _ 3"]]
# Tokens of which boxes are drawn, each in its own colour at all stages.
TOKENS = 5
# Beside a picture, in sides: what is looked at beyond is not shown.
MARGIN = 0.12
# Cells of the long side of a density, and the radius of the top-hat in cells.
CELLS, RADIUS = 36, 3
WIDTH = 9.0  # inches


def draw_looks(images: Images, looks: Sequence[Look]) -> Any:
    """A matplotlib figure: a row for each picture, a column for each stage.

    All points are small and dark; of a few tokens, spread over all, the box and its
    points have a colour.
    """
    drawing, panels = _grid([image.shape[:2] for image in images], len(looks[0].rois))
    for row, image, look in zip(panels, images, looks, strict=True):
        height, width = image.shape[:2]
        tokens = np.unique(np.linspace(0, look.rois.shape[1] - 1, TOKENS).round())
        for axes, rois, points in zip(row, look.rois, look.points, strict=True):
            # A third as strong, so that what is drawn over it can be seen.
            axes.imshow(170 + image // 3, extent=(0, width, height, 0))
            every = points.reshape(-1, 2) * (width, height)
            axes.plot(*every.T, ".", ms=2.2, mew=0, color="#222222", alpha=0.8)
            for number, token in enumerate(tokens.astype(int)):
                colour = pictures.COLOURS[number % len(pictures.COLOURS)]
                _draw_token(axes, rois[token], points[token], (width, height), colour)
            axes.set_xlim(-MARGIN * width, (1 + MARGIN) * width)
            axes.set_ylim((1 + MARGIN) * height, -MARGIN * height)
    return drawing


def _draw_token(
    axes: Any,
    box: Float[np.ndarray, "4"],
    points: Float[np.ndarray, "S 2"],
    size: tuple[int, int],
    colour: str,
) -> None:
    from matplotlib.patches import Rectangle

    x0, y0, x1, y1 = box * (*size, *size)
    frame = {"fill": False, "edgecolor": colour, "linewidth": 1.3}
    axes.add_patch(Rectangle((x0, y0), x1 - x0, y1 - y0, **frame))
    axes.plot(*(points * size).T, ".", ms=4.5, mew=0, color=colour)


def draw_density(
    images: Images,
    looks: Sequence[Look],
    others: Sequence[Look],
) -> Any:
    """A matplotlib figure of `foreground.density`: rows and columns as of `draw_looks`.

    The last row is of many pictures together, each stretched to a square.
    """
    from matplotlib.colors import Normalize

    sizes = [image.shape[:2] for image in images]
    cells = [_cut(size) for size in sizes]
    maps = [
        [foreground.density(points, cut, RADIUS) for points in look.points]
        for look, cut in zip(looks, cells, strict=True)
    ]
    stages = zip(*(look.points for look in others), strict=True)
    pooled = [np.concatenate([p.reshape(-1, 2) for p in points]) for points in stages]
    square = (CELLS, CELLS)
    together = [foreground.density(points, square, RADIUS) for points in pooled]
    drawing, panels = _grid([*sizes, square], len(together), 0.92)
    # One scale for all; a few cells of one picture may be beyond it.
    scale = Normalize(0, float(np.quantile(np.concatenate(maps, None), 0.995)))
    style = {"cmap": "inferno", "norm": scale, "interpolation": "bilinear"}
    shown: Any = None
    for row, image, own in zip(panels, images, maps, strict=False):
        height, width = image.shape[:2]
        grey = image.mean(-1)
        for axes, values in zip(row, own, strict=True):
            where = {"extent": (0, width, height, 0)}
            # Of little contrast: what is bright is to be the density.
            axes.imshow(grey, cmap="gray", vmin=-255, vmax=510, **where)
            axes.imshow(values, **style, alpha=0.7, **where)
    for axes, values in zip(panels[-1], together, strict=True):
        shown = axes.imshow(values, **style)
    panels[-1, 0].set_ylabel(f"{len(others)} pictures", fontsize=8)
    bar = drawing.colorbar(shown, ax=panels, shrink=0.4, pad=0.01, extend="max")
    bar.set_label("times an even spread", fontsize=8)
    bar.ax.tick_params(labelsize=7)
    return drawing


def _cut(size: tuple[int, int]) -> tuple[int, int]:
    """Rows and columns of a picture of that (h, w), in nearly square cells."""
    rows, columns = (max(1, round(CELLS * side / max(size))) for side in size)
    return rows, columns


def _grid(
    sizes: Sequence[tuple[int, int]], num_stages: int, share: float | int = 1
) -> tuple[Any, np.ndarray]:
    """A figure, and its panels [row, stage] for pictures of some (h, w).

    Args:
      share: Of the width that panels have.
    """
    heights = [min(height / width, 1.6) for height, width in sizes]
    tall = 0.3 + sum(heights) * share * WIDTH / num_stages
    drawing = pictures.figure(WIDTH, tall)
    panels = drawing.subplots(
        len(sizes), num_stages, squeeze=False, height_ratios=heights
    )
    for stage, axes in enumerate(panels[0], 1):
        axes.set_title(f"stage {stage}", fontsize=9)
    for axes in panels.ravel():
        axes.set_xticks([])
        axes.set_yticks([])
        for side in axes.spines.values():
            side.set_visible(False)
    return drawing, panels
