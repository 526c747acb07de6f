import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from navit_jax import config
from navit_jax.data import resolution
from navit_jax.errors import ConfigError

U = (np.arange(20_000) + 0.5) / 20_000
SQUARE = np.full((20_000, 2), 100)


def law(**section):
    return config.build(section, resolution.LAWS, "data.resolution")


@pytest.mark.parametrize(
    "section, expected",
    [
        ({"name": "uniform", "low": 64, "high": 256}, stats.uniform(64, 192)),
        (
            {
                "name": "truncated_normal",
                "low": 64,
                "high": 384,
                "mean": -0.5,
                "sigma": 1.0,
            },
            stats.truncnorm(-0.5, 1.5, loc=64 + 320 * 0.25, scale=160),
        ),
        (
            {
                "name": "truncated_normal",
                "low": 10,
                "high": 20,
                "mean": 0.5,
                "sigma": 0.25,
            },
            stats.truncnorm(-6, 2, loc=17.5, scale=1.25),
        ),
        (
            {
                "name": "truncated_normal",
                "low": 10,
                "high": 20,
                "mean": -2,
                "sigma": 0.1,
            },
            stats.truncnorm(10, 30, loc=5, scale=0.5),
        ),
        (
            {
                "name": "truncated_normal",
                "low": 10,
                "high": 20,
                "mean": 3,
                "sigma": 0.05,
            },
            stats.truncnorm(-80, -40, loc=30, scale=0.25),
        ),
    ],
)
def test_sides_follow_the_law(section, expected):
    sides = law(**section)(U, SQUARE)
    np.testing.assert_allclose(sides, expected.ppf(U), rtol=1e-9)


def test_a_law_of_the_area_is_linear_in_pixels():
    sides = law(name="uniform", low=64, high=384, of="area")(U, SQUARE)
    np.testing.assert_allclose(sides**2, stats.uniform(64**2, 384**2 - 64**2).ppf(U))
    normal = law(name="truncated_normal", low=64, high=384, mean=0, sigma=1, of="area")
    expected = stats.truncnorm(-1, 1).ppf(U)
    middle, half = (64**2 + 384**2) / 2, (384**2 - 64**2) / 2
    np.testing.assert_allclose(normal(U, SQUARE) ** 2, middle + half * expected)


def test_native_is_the_side_of_the_square_of_equal_area_under_its_cap():
    sizes = np.array([[64, 256], [100, 100], [0, 0], [65535, 65535]])
    u = np.zeros(4)
    np.testing.assert_allclose(law(name="native")(u, sizes), [128, 100, 0, 65535])
    capped = law(name="native", max_side=110)(u, sizes)
    np.testing.assert_allclose(capped, [110, 100, 0, 110])


@given(
    height=st.integers(1, 3000),
    width=st.integers(1, 3000),
    tokens=st.integers(1, 300),
    patch=st.sampled_from([14, 16]),
)
@settings(max_examples=200, deadline=None)
def test_a_budget_gives_the_largest_grid_of_the_aspect(height, width, tokens, patch):
    sizes = np.array([[height, width]])
    side = law(name="budget", tokens=tokens, patch=patch)(np.zeros(1), sizes)
    grid = resolution.grids(sizes, side, patch)[0]
    # Every grid of the aspect, as the scale at which either side gains a patch.
    steps = [n / size for size in (height, width) for n in range(1, tokens + 2)]
    shapes = [
        tuple(max(int(size * step * (1 + 1e-9)), 1) for size in (height, width))
        for step in [0, *steps]
    ]
    assert grid.prod() == max(a * b for a, b in shapes if a * b <= tokens)


@pytest.mark.parametrize(
    "section, message",
    [
        ({"name": "fixed", "side": 0}, "resolution.side=0"),
        ({"name": "native", "max_side": -1}, "resolution.max_side=-1"),
        (
            {"name": "uniform", "low": 9, "high": 8},
            "low=9, high=8: needs 0 < low <= high",
        ),
        (
            {"name": "uniform", "low": 1, "high": 8, "of": "sides"},
            "did you mean 'side'",
        ),
        ({"name": "truncated_normal", "low": 1, "high": 8, "sigma": 0}, "sigma=0"),
        ({"name": "budget", "tokens": 0, "patch": 16}, "resolution.tokens=0"),
        ({"name": "unifrom", "low": 1, "high": 8}, "did you mean 'uniform'"),
    ],
)
def test_a_wrong_law_names_the_field(section, message):
    with pytest.raises(ConfigError, match=message):
        law(**section)


@given(
    height=st.integers(1, 5000),
    width=st.integers(1, 5000),
    side=st.floats(1, 1000),
    patch=st.sampled_from([14, 16, 32]),
    upscale=st.booleans(),
)
@settings(max_examples=200, deadline=None)
def test_grids_are_whole_patches_of_the_scaled_sides(
    height, width, side, patch, upscale
):
    sizes = np.array([[height, width]])
    (grid,) = resolution.grids(sizes, np.array([side]), patch, upscale).tolist()
    scale = side / (height * width) ** 0.5
    if not upscale:
        scale = min(scale, 1.0)
    for num, pixels in zip(grid, (height, width), strict=True):
        exact = scale * pixels / patch
        assert num == max(1, int(exact)) or abs(exact / round(exact) - 1) < 1e-8


def test_an_image_of_exactly_so_many_patches_keeps_them_all():
    sides = np.arange(1, 3000)
    sizes = np.stack([sides, sides], 1)
    grids = resolution.grids(sizes, np.full(len(sides), 224.0), 16)
    np.testing.assert_array_equal(grids, 14)


def test_square_takes_no_notice_of_the_shape_and_unreadable_images_get_one_patch():
    sizes = np.array([[10, 1000], [0, 0]])
    sides = np.full(2, 224.0)
    square = resolution.grids(sizes, sides, 16, upscale=False, square=True)
    np.testing.assert_array_equal(square, 14)
    grids = resolution.grids(sizes, sides, 16)
    assert grids.tolist() == [[1, 140], [1, 1]]


@given(
    height=st.integers(1, 300),
    width=st.integers(1, 300),
    side=st.floats(4, 400),
    rate=st.floats(0, 0.95),
    max_tokens=st.integers(1, 80),
    max_side=st.one_of(st.none(), st.integers(1, 12)),
)
@settings(max_examples=150, deadline=None)
def test_limit_finds_the_largest_grid_of_the_aspect_that_fits(
    height, width, side, rate, max_tokens, max_side
):
    sizes, rates = np.array([[height, width]]), np.array([rate])
    drawn = resolution.grids(sizes, np.array([side]), 4)
    grids, kept, shrunk = resolution.limit(drawn, sizes, rates, max_tokens, max_side)

    def fits(grid):
        tokens = max(1, round((1 - rate) * grid[0] * grid[1]))
        return tokens <= max_tokens and (max_side is None or max(grid) <= max_side)

    # The second way: every scale at which a side gains a patch, from large to small.
    counts = range(1, int(drawn.max()) + 1)
    scales = {n / pixels for pixels in (height, width) for n in counts} | {0.0}
    candidates = [
        tuple(
            min(d, max(1, int(s * p * (1 + 1e-9))))
            for d, p in zip(drawn[0], (height, width), strict=True)
        )
        for s in sorted(scales, reverse=True)
    ]
    expected = next(grid for grid in [tuple(drawn[0]), *candidates] if fits(grid))
    assert tuple(grids[0]) == expected
    assert bool(shrunk[0]) == (tuple(drawn[0]) != expected)
    assert kept[0] == max(1, round((1 - rate) * expected[0] * expected[1]))
    assert kept[0] <= max_tokens


def test_a_panorama_shrinks_in_its_aspect_and_others_stay():
    sizes = np.array([[100, 2500], [500, 500]])
    drawn = resolution.grids(sizes, np.array([400.0, 160.0]), 16)
    assert drawn.tolist() == [[5, 125], [10, 10]]
    grids, kept, shrunk = resolution.limit(drawn, sizes, np.zeros(2), 256, 50)
    assert grids.tolist() == [[2, 50], [10, 10]]
    assert kept.tolist() == [100, 100]
    assert shrunk.tolist() == [True, False]
