import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

from navit_jax import config
from navit_jax.errors import ConfigError
from navit_jax.models.coordinates import locate
from navit_jax.models.navit import NaViT
from navit_jax.models.positions import POSITIONS
from navit_jax.models.resample import resample
from navit_jax.models.rope import rotate


def scheme(**section):
    return section


SCHEMES = [
    scheme(name="learned_1d", side=5, filter="bilinear"),
    scheme(name="learned_1d", side=5, filter="antialias"),
    scheme(name="learned_1d", side=5, filter="bicubic"),
    scheme(name="learned_2d", length=8),
    scheme(name="factorized", length=8, combine="sum"),
    scheme(name="factorized", length=8, combine="stack"),
    scheme(name="factorized", length=8, combine="product"),
    scheme(name="factorized", length=8, coordinates="fractional"),
    scheme(name="factorized", length=8, coordinates="fractional", fraction="start"),
    scheme(name="factorized", length=8, coordinates="fractional", fraction="corners"),
    scheme(name="factorized", length=8, coordinates="aspect_preserving"),
    scheme(name="sinusoidal", length=8),
    scheme(name="sinusoidal", length=8, coordinates="fractional"),
    scheme(name="fourier", length=8),
    scheme(name="fourier", length=8, coordinates="fractional"),
    scheme(name="rope", length=8),
    scheme(name="rope", length=8, coordinates="aspect_preserving"),
]
ABSOLUTE = [
    scheme(name="learned_2d", length=8),
    scheme(name="factorized", length=8),
    scheme(name="sinusoidal", length=8),
    scheme(name="fourier", length=8),
    scheme(name="rope", length=8),
]
WIDTH = 8
GRIDS = [(3, 4), (8, 2), (1, 1), (2, 7)]


def label(section):
    return "-".join(str(value) for value in section.values())


@functools.cache
def built(items):
    section = dict(items)
    module = config.build(section, POSITIONS, "model.positions", width=WIDTH)
    coords, grids = (jnp.zeros((1, 2, 2), int) for _ in range(2))
    shapes = jax.eval_shape(module.init, jax.random.key(0), coords, grids)
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda s: rng.standard_normal(s.shape, np.float32), shapes)
    return module, params, jax.jit(module.apply)


def whole_grid(grid):
    return np.stack(np.indices(grid), -1).reshape(-1, 2)


def embed(section, coords, grid):
    """Positions [n D] of coords [n 2], padded to one shape."""
    _, params, apply = built(tuple(section.items()))
    padded = np.zeros((1, 20, 2), np.int32)
    padded[0, : len(coords)] = coords
    grids = np.broadcast_to(np.array(grid, np.int32), padded.shape)
    return np.asarray(apply(params, padded, grids))[0, : len(coords)]


@pytest.mark.parametrize("section", SCHEMES, ids=label)
def test_positions_equal_their_formula_in_float64(section):
    _, params, _ = built(tuple(section.items()))
    params = jax.tree.map(np.float64, params.get("params", {}))
    for grid in GRIDS:
        coords = whole_grid(grid)
        if section["name"] == "rope":
            expected = oracle.rope_angles(coords, grid, 2 * WIDTH, section)
        else:
            expected = oracle.place(params, section, coords, grid)(WIDTH)
        actual = embed(section, coords, grid)
        assert actual.dtype == np.float32
        np.testing.assert_allclose(actual, expected, atol=1e-5 * abs(expected).max())


@pytest.mark.parametrize("section", SCHEMES, ids=label)
def test_only_absolute_positions_agree_under_different_grids(section):
    coords = whole_grid((2, 3))
    one, other = embed(section, coords, (3, 4)), embed(section, coords, (8, 5))
    absolute = section["name"] != "learned_1d" and "coordinates" not in section
    assert np.array_equal(one, other) == absolute


@pytest.mark.parametrize("section", SCHEMES, ids=label)
def test_sides_beyond_the_table_and_empty_grids_are_finite(section):
    coords = np.array([[0, 0], [63, 2], [500, 1000]])
    for grid in [(501, 1001), (0, 0)]:
        assert np.isfinite(embed(section, coords, grid)).all()


@pytest.mark.parametrize("section", ABSOLUTE, ids=label)
def test_absolute_sides_beyond_the_table_read_its_last_entry(section):
    inside = embed(section, [[7, 2], [0, 7]], (8, 8))
    beyond = embed(section, [[63, 2], [0, 8]], (64, 9))
    np.testing.assert_array_equal(inside, beyond)


@pytest.mark.parametrize(
    "coordinates, grid, corner",
    [
        ("absolute", (3, 4), (2, 3)),
        ("absolute", (7, 5), (6, 4)),
        ("fractional", (3, 4), (1, 1)),
        ("fractional", (7, 5), (1, 1)),
        ("aspect_preserving", (3, 4), (0.75, 1)),
        ("aspect_preserving", (7, 5), (1, 0.714286)),
    ],
)
def test_corners_are_those_of_figure_17(coordinates, grid, corner):
    # The figure labels the image's corner: the end of the last patch, if fractional.
    index = np.array(grid) - (1 if coordinates == "absolute" else 0)
    length = 10 if coordinates == "absolute" else 2
    at = locate(*jnp.array([[[index]], [[grid]]]), length, coordinates, "start")
    np.testing.assert_allclose(at[0, 0], corner, rtol=1e-5)


def test_frames_are_fractions_of_the_frames_when_aspect_is_preserved():
    coords, grids = jnp.array([[[1, 2, 4]]]), jnp.array([[[2, 4, 8]]])
    at = locate(coords, grids, 2, "aspect_preserving", "start")
    np.testing.assert_allclose(at[0, 0], [1 / 2, 2 / 8, 4 / 8])


@pytest.mark.parametrize("name", ["factorized", "sinusoidal", "fourier", "rope"])
def test_a_video_has_three_axes(name):
    module = config.build(scheme(name=name), POSITIONS, "model.positions", width=24)
    coords, grids = jnp.array([[[1, 2, 4]]]), jnp.array([[[2, 4, 8]]])
    positions, _ = module.init_with_output(jax.random.key(0), coords, grids)
    assert positions.shape == (1, 1, 24)


def test_fractions_do_not_collapse_on_long_sides():
    coords = jnp.array(whole_grid((1, 1000)))[None]
    grids = jnp.broadcast_to(jnp.array([1, 1000]), coords.shape)
    at = locate(coords, grids, 64, "fractional", "centre")
    assert at.dtype == jnp.float32
    assert len(np.unique(at[..., 1])) == 1000


@pytest.mark.parametrize("filter", ["bilinear", "antialias", "bicubic"])
@pytest.mark.parametrize("grid", [(4, 4), (7, 3), (2, 11), (1, 1)])
def test_resampling_equals_resizing_the_whole_table(filter, grid):
    table = np.random.default_rng(0).standard_normal((4, 4, 5))
    coords = jnp.array(whole_grid(grid))[None]
    grids = jnp.broadcast_to(jnp.array(grid), coords.shape)
    actual = resample(jnp.float32(table), coords, grids, filter).reshape(*grid, 5)
    np.testing.assert_allclose(actual, oracle.resize(table, grid, filter), atol=1e-5)
    if filter != "bicubic":  # jax's cubic has a = -0.5
        peer = jax.image.resize(
            table, (*grid, 5), "bilinear", antialias=filter != "bilinear"
        )
        np.testing.assert_allclose(actual, peer, atol=1e-5)


def test_grids_are_data_and_compile_once():
    apply = built(tuple(SCHEMES[1].items()))[-1]
    for grid in GRIDS:
        embed(SCHEMES[1], whole_grid(grid), grid)
    assert apply._cache_size() == 1


def test_rotary_scores_depend_on_the_offset_only():
    rng = np.random.default_rng(0)
    q, k = rng.standard_normal((2, 2 * WIDTH), np.float32)
    scores = []
    for shift in [(0, 0), (3, 0), (2, 4)]:
        angles = embed(scheme(name="rope"), np.array([[1, 2], [4, 0]]) + shift, (9, 9))
        heads = jnp.stack([q, k])[None, :, None]
        turned = np.asarray(rotate(heads, jnp.array(angles)[None]))[0, :, 0]
        np.testing.assert_allclose((turned**2).sum(-1), [q @ q, k @ k], rtol=1e-5)
        scores.append(turned[0] @ turned[1])
    np.testing.assert_allclose(scores, scores[0], rtol=1e-4)
    assert abs(scores[0] - q @ k) > 1e-2


@pytest.mark.parametrize(
    "section, message",
    [
        (scheme(name="factorised"), "name='factorised': did you mean 'factorized'"),
        (scheme(name="rope", sides=3), "positions.sides is unknown"),
        (scheme(name="factorized", combine="add"), "combine='add'"),
        (scheme(name="factorized", coordinates="frac"), "did you mean 'fractional'"),
        (
            scheme(name="sinusoidal", fraction="center", coordinates="fractional"),
            "centre",
        ),
        (scheme(name="learned_1d", filter="lanczos"), "filter='lanczos'"),
    ],
)
def test_unknown_choices_are_named_with_the_nearest(section, message):
    with pytest.raises(ConfigError, match=message):
        embed(section, whole_grid((2, 2)), (2, 2))


def test_a_width_that_does_not_divide_is_named():
    module = POSITIONS["sinusoidal"](width=10)
    coords = jnp.zeros((1, 1, 2), int)
    with pytest.raises(ConfigError, match="width 10 does not divide into 4 parts"):
        module.apply({}, coords, coords)


@pytest.mark.parametrize("section", ABSOLUTE, ids=label)
def test_the_model_tells_the_widest_grid(section):
    assert NaViT(positions=section).max_side == 8
