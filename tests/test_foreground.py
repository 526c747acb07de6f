"""Whether what is looked at is the objects: each measure against a plain loop."""

import math

import numpy as np
import pytest

from navit_jax import foreground
from navit_jax.foreground import Look

RNG = np.random.default_rng(0)
MASK = RNG.random((7, 11)) < 0.3
# Some are out of the picture, one of them just beyond its last pixel.
POINTS = np.concatenate([RNG.normal(0.5, 0.4, (2, 3, 40, 2)), np.ones((2, 3, 1, 2))], 2)
# Each beyond the picture, and one turned inside out.
ROIS = np.array([[-0.2, 0.1, 0.5, 1.3], [0.3, -0.1, 1.2, 0.8], [0.7, 0.2, 0.4, 0.6]])
ROIS = ROIS + RNG.random((2, 3, 4)) / 10


def count_inside(points, mask):
    inside = out = 0
    for x, y in points.reshape(-1, 2).tolist():
        if not (0 <= x < 1 and 0 <= y < 1):
            out += 1
        elif mask[math.floor(y * mask.shape[0])][math.floor(x * mask.shape[1])]:
            inside += 1
    num = points.size // 2
    return inside / num, out / num


def cover(box):
    """The share of the picture in a box, by its pieces along both axes."""
    x0, y0, x1, y1 = box.tolist()
    wide = min(x1, 1) - max(x0, 0) if x1 > x0 else 0
    tall = min(y1, 1) - max(y0, 0) if y1 > y0 else 0
    return max(wide, 0) * max(tall, 0)


def test_a_picture_is_measured_as_a_plain_loop_measures_it():
    first = Look(ROIS[:1] + 0.25, POINTS[:1] / 2)
    found = foreground.measure(Look(ROIS, POINTS), first, MASK)
    for stage in range(2):
        inside, out = count_inside(POINTS[stage], MASK)
        assert 0 < inside < 1
        assert 0 < out < 1
        np.testing.assert_allclose(found["inside"][stage], inside)
        np.testing.assert_allclose(found["outside"][stage], out)
        area = np.mean([cover(box) for box in ROIS[stage]])
        np.testing.assert_allclose(found["area"][stage], area)
        moved = [
            math.dist(
                ((a[0] + a[2]) / 2, (a[1] + a[3]) / 2),
                ((b[0] + b[2]) / 2, (b[1] + b[3]) / 2),
            )
            for a, b in zip(ROIS[stage], ROIS[0] + 0.25, strict=True)
        ]
        np.testing.assert_allclose(found["drift"][stage], np.mean(moved))
    np.testing.assert_allclose(found["start"], count_inside(first.points, MASK)[0])
    area = np.mean([cover(box) for box in first.rois[0]])
    np.testing.assert_allclose(found["start_area"], area)


def below(place):
    """The share below a place of a Gaussian: deviation a quarter of the side."""
    return (1 + math.erf((place - 0.5) / 0.25 / 2**0.5)) / 2


def test_an_even_grid_and_a_gaussian_are_what_they_are_called():
    mask = np.zeros((64, 64), bool)
    mask[8:40, 16:24] = True
    points = np.zeros((1, 1, 1, 2))
    look = Look(np.zeros((1, 1, 4)), points)
    found = foreground.measure(look, look, mask)
    assert found["even"] == mask.mean()
    # Along each axis it has 64 points, each at the middle of 1/64 of a Gaussian.
    tall, wide = (
        round(64 * below(stop)) - round(64 * below(start))
        for start, stop in ((1 / 8, 5 / 8), (1 / 4, 3 / 8))
    )
    assert found["centre"] == tall * wide / 64**2
    for places in foreground.centre_points().T:
        shares = [below(place) for place in np.unique(places)]
        np.testing.assert_allclose(shares, (np.arange(64) + 0.5) / 64, atol=1e-9)


def test_a_lift_is_a_ratio_of_sums_with_the_interval_of_pictures_drawn_anew():
    values, others = RNG.random(60), RNG.random(60) / 100
    found = foreground.compare(values, others)
    np.testing.assert_allclose(found.value, values.sum() / others.sum())
    ratios = []
    for _ in range(4000):
        drawn = RNG.integers(0, 60, 60)
        ratios.append(values[drawn].sum() / others[drawn].sum())
    # Ends of an interval by draws are known to some percent of its width.
    low, high = np.quantile(ratios, (0.025, 0.975))
    np.testing.assert_allclose(found[1:], (low, high), atol=0.1 * (high - low))
    assert low < found.value < high
    assert foreground.compare(values).value == pytest.approx(values.mean())
    assert math.isnan(foreground.compare(values, 0 * values).value)


def test_density_counts_points_near_a_cell_over_an_even_spread():
    cells, radius = (5, 8), 1.5
    points = RNG.normal(0.4, 0.4, (3, 50, 2))
    found = foreground.density(points, cells, radius)
    for row, column in ((0, 0), (2, 3), (4, 7), (1, 6)):
        near = [
            (r, c)
            for r in range(5)
            for c in range(8)
            if math.hypot(r - row, c - column) <= radius
        ]
        mask = np.zeros(cells, bool)
        mask[tuple(zip(*near, strict=True))] = True
        expected = count_inside(points, mask)[0] / (len(near) / 40)
        np.testing.assert_allclose(found[row, column], expected)
    even = [((c + 0.5) / 8, (r + 0.5) / 5) for r in range(5) for c in range(8)]
    np.testing.assert_allclose(foreground.density(np.array(even), cells, radius), 1)
