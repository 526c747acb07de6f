"""Whether what a model chooses to look at is the objects of a picture.

Of pictures whose objects are known at each pixel. Plain numpy; what is looked at is
given, and so is what it is compared with: points spread evenly, points about the
centre, and the boxes with which training begins.

Shapes: M pictures, R stages, Q latent tokens, S points a token, h, w pixels; points are
(x, y), boxes (x0, y0, x1, y1), in fractions of the picture's sides.
"""

import statistics
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Float64

from navit_jax.metrics import interval_by_group

# Points a side of what is compared with.
SIDE = 64
# Standard deviation of the Gaussian at the centre, in sides of the picture.
SIGMA = 0.25


class Look(NamedTuple):
    """What the tokens of one picture look at.

    Attributes:
      rois: The boxes of each stage.
      points: Those that were sampled in them.
    """

    rois: Float[np.ndarray, "R Q 4"]
    points: Float[np.ndarray, "R Q S 2"]


class Ratio(NamedTuple):
    """A ratio of sums over pictures, and its 95 % interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3g} ({self.low:.3g} .. {self.high:.3g})"


def share_inside(
    points: Float[np.ndarray, "*S 2"], mask: Bool[np.ndarray, "h w"]
) -> float:
    """The share of points in the mask; those out of the picture are in none."""
    height, width = mask.shape
    points = points.reshape(-1, 2)
    inside = points[is_within(points)]
    column, row = (inside * (width, height)).astype(int).T
    return float(mask[row, column].sum() / len(points))


def is_within(points: Float[np.ndarray, "*S 2"]) -> Bool[np.ndarray, "*S"]:
    """Whether a point is in the picture."""
    return np.all((points >= 0) & (points < 1), axis=-1)


def spread_points() -> Float64[np.ndarray, "P 2"]:
    """A regular grid of points over the picture."""
    return _cross((np.arange(SIDE) + 0.5) / SIDE)


def centre_points() -> Float64[np.ndarray, "P 2"]:
    """Points of a Gaussian at the centre, at its quantiles, so that nothing is drawn.

    Few (4.6 %) are out of the picture.
    """
    normal = statistics.NormalDist(0.5, SIGMA)
    return _cross(np.array([normal.inv_cdf((i + 0.5) / SIDE) for i in range(SIDE)]))


def _cross(places: np.ndarray) -> np.ndarray:
    return np.stack(np.meshgrid(places, places), -1).reshape(-1, 2)


def areas(rois: Float[np.ndarray, "*S 4"]) -> Float[np.ndarray, "*S"]:
    """The share of the picture that each box covers."""
    sides = np.diff(np.clip(rois, 0, 1).reshape(*rois.shape[:-1], 2, 2), axis=-2)
    return np.maximum(sides, 0).prod(-1)[..., 0]


def drifts(
    rois: Float[np.ndarray, "R Q 4"], start: Float[np.ndarray, "1 Q 4"]
) -> Float[np.ndarray, "R Q"]:
    """How far the centre of each box is from where it started, in sides."""
    moved = (rois - start).reshape(*rois.shape[:-1], 2, 2).mean(-2)
    return np.linalg.norm(moved, axis=-1)


def measure(
    look: Look, start: Look, mask: Bool[np.ndarray, "h w"]
) -> dict[str, Float64[np.ndarray, "..."]]:
    """What is said of one picture.

    Args:
      start: At initialisation; R = 1.
      mask: Its objects.

    Returns:
      By stage [R]: `inside`, the share of points in the objects; `outside`, that out of
      the picture; `area`, the mean share of the picture that a box covers; `drift`, the
      mean movement of a box's centre since initialisation, in sides. As numbers:
      `inside` of an even grid (`even`), of the Gaussian (`centre`) and at
      initialisation (`start`), and the area there (`start_area`).
    """
    return {
        "inside": np.array([share_inside(points, mask) for points in look.points]),
        "outside": np.array([1 - is_within(points).mean() for points in look.points]),
        "area": areas(look.rois).mean(-1).astype(float),
        "drift": drifts(look.rois, start.rois).mean(-1).astype(float),
        "even": np.array(share_inside(spread_points(), mask)),
        "centre": np.array(share_inside(centre_points(), mask)),
        "start": np.array(share_inside(start.points, mask)),
        "start_area": np.array(areas(start.rois).mean(), float),
    }


def join(measures: Sequence[Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """The measures of M pictures, one array each."""
    return {key: np.stack([each[key] for each in measures]) for key in measures[0]}


def compare(
    values: Float64[np.ndarray, " M"], others: Float64[np.ndarray, " M"] | None = None
) -> Ratio:
    """The sum over all pictures in sums of the others; of none it is the mean.

    Pictures, each with both of its values, are drawn anew for the interval.
    """
    weights = np.ones(len(values)) if others is None else others
    if not (mean := weights.mean()):
        return Ratio(float("nan"), float("nan"), float("nan"))
    values, weights = values / mean, weights / mean
    interval = interval_by_group(values, weights, np.arange(len(values)))
    return Ratio(float(values.mean()), *interval)


def density(
    points: Float[np.ndarray, "*S 2"], cells: tuple[int, int], radius: float | int
) -> Float64[np.ndarray, "rows columns"]:
    """How many times as many points are near each cell as of an even spread.

    The kernel is a top-hat: the share of points in cells whose centres are within the
    radius, over those cells' share of the picture. So an even spread is 1 everywhere,
    at the edges too. Points out of the picture are near none.

    Args:
      cells: Rows and columns into which the picture is cut.
      radius: In cells.
    """
    rows, columns = cells
    points = points.reshape(-1, 2)
    x, y = (points[is_within(points)] * (columns, rows)).astype(int).T
    counts = np.bincount(y * columns + x, minlength=rows * columns)
    places = np.indices(cells).reshape(2, -1).T
    apart = np.square(places[:, None] - places[None]).sum(-1)
    near = (apart <= radius**2).astype(float)
    share = near @ counts / max(len(points), 1)
    return (share * rows * columns / near.sum(1)).reshape(cells)
