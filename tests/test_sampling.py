"""Lookups between cells, boxes and their points, against plain code in float64.

Of a picture: h, w cells of its map, C channels.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from navit_jax.errors import ConfigError
from navit_jax.models import rois, sampling
from navit_jax.models.feature_maps import Maps
from navit_jax.models.sparseformer_sizes import SHAPES

IMPLEMENTATIONS = ["gather", "neighbours", "matmul"]
PADDINGS = ["zeros", "border"]
# Two images of one row, the first of 3 x 2 tiles of 2 x 2 cells, and a tile of none.
SIZES = np.array([[[5, 3], [1, 4]]])
T = 2
RNG = np.random.default_rng(0)
PICTURES = [RNG.standard_normal((h, w, 3)) for h, w in SIZES[0]]
SLOTS = jnp.array([[0, 1, 0, 1, 1, 0, 0, 1, 0, 1, 0]])  # more than a chunk
POINTS = RNG.uniform(-0.3, 1.3, (1, 11, 4, 2))


def cut(pictures):
    """Maps of pictures in tiles; where a picture ends in a tile there is noise."""
    tiles, slots, starts, columns = [], [], [], []
    for slot, picture in enumerate(pictures):
        h, w, C = picture.shape
        rows, across = -(-h // T), -(-w // T)
        wide = RNG.standard_normal((rows * T, across * T, C))
        wide[:h, :w] = picture
        starts.append(len(tiles))
        columns.append(across)
        for i in range(rows):
            for j in range(across):
                tiles.append(wide[i * T :, j * T :][:T, :T])
                slots.append(slot)
    tiles.append(RNG.standard_normal(tiles[0].shape))
    return Maps(
        cells=jnp.asarray(np.stack(tiles)[None], jnp.float32),
        slots=jnp.array([[*slots, -1]]),
        starts=jnp.array([starts]),
        columns=jnp.array([columns]),
        sizes=jnp.array([[picture.shape[:2] for picture in pictures]]),
    )


def read(picture, x, y, padding):
    """The value at a point by a loop over all cells, in float64."""
    h, w, C = picture.shape
    u, v = x * w - 0.5, y * h - 0.5
    if padding == "border":
        u, v = np.clip(u, 0, w - 1), np.clip(v, 0, h - 1)
    total = np.zeros(C)
    for i in range(h):
        for j in range(w):
            total += max(0, 1 - abs(v - i)) * max(0, 1 - abs(u - j)) * picture[i, j]
    return total


def read_all(pictures, points, padding):
    return np.array([
        [[read(pictures[slot], x, y, padding) for x, y in each]
         for slot, each in zip(SLOTS[0], points[0], strict=True)]
    ])  # fmt: skip


def lookup(maps, points, padding, implementation, slots=SLOTS):
    maps = sampling.prepare(maps, implementation)
    return sampling.lookup(maps, slots, points, padding, implementation)


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_values_and_gradients_are_those_of_a_loop_in_float64(implementation, padding):
    maps, points = cut(PICTURES), jnp.asarray(POINTS, jnp.float32)
    upstream = RNG.standard_normal((*POINTS.shape[:3], 3))

    def total(cells, points):
        found = lookup(maps._replace(cells=cells), points, padding, implementation)
        return (found * upstream).sum(), found

    (_, found), (by_cell, by_point) = jax.value_and_grad(
        total, (0, 1), has_aux=True
    )(maps.cells, points)  # fmt: skip
    np.testing.assert_allclose(
        found, read_all(PICTURES, POINTS, padding), rtol=1e-4, atol=1e-5
    )

    def slope(change):
        ends = []
        for e in (-1, 1):
            pictures, points = change(e)
            ends.append((read_all(pictures, points, padding) * upstream).sum())
        return (ends[1] - ends[0]) / 2e-6

    for place in np.ndindex(1, 11, 4, 2):
        step = np.zeros(POINTS.shape)
        step[place] = 1e-6
        if place[1] < 3:  # a loop is slow
            changed = lambda e, step=step: (PICTURES, POINTS + e * step)  # noqa: E731
            expected = slope(changed)
            np.testing.assert_allclose(by_point[place], expected, rtol=2e-3, atol=1e-3)
    for i, j in ((0, 0), (2, 1), (4, 2)):
        step = np.zeros(PICTURES[0].shape)
        step[i, j, 1] = 1e-6
        changed = lambda e, step=step: ([PICTURES[0] + e * step, PICTURES[1]], POINTS)  # noqa: E731
        tile = i // T * 2 + j // T
        own = by_cell[0, tile, i % T, j % T, 1]
        np.testing.assert_allclose(own, slope(changed), rtol=1e-3, atol=1e-4)
    assert not by_cell[0, -1].any(), "a tile of no image"


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    "point, zeros, border",
    [
        ((0.5, 0.5), 2.5, 2.5),
        ((0, 0), 0.25, 1),
        ((1, 1), 1, 4),
        ((0.25, 0.75), 3, 3),
        ((1.5, 0.5), 0, 3),
    ],
)
def test_published_values_of_a_map_of_four_cells(implementation, point, zeros, border):
    maps = cut([np.array([[1.0, 2], [3, 4]])[..., None]])
    points, slots = jnp.array([[[point]]], jnp.float32), jnp.array([[0]])
    for padding, expected in (("zeros", zeros), ("border", border)):
        found = lookup(maps, points, padding, implementation, slots)
        np.testing.assert_allclose(found.ravel(), [expected], rtol=1e-6)


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_points_that_are_lost_leave_all_finite(implementation, padding):
    lost = [np.nan, np.inf, -np.inf, 3e38, -1e20, 1e4]
    points = jnp.broadcast_to(jnp.array(lost)[:, None], (1, 11, 6, 2))
    maps = cut(PICTURES)

    def total(cells, points):
        found = lookup(maps._replace(cells=cells), points, padding, implementation)
        return jnp.square(found).sum(), found

    slope = jax.jit(jax.grad(total, (0, 1), has_aux=True))
    gradients, found = slope(maps.cells, points)
    assert jnp.isfinite(found).all()
    assert all(jnp.isfinite(each).all() for each in gradients)
    if padding == "zeros":
        assert not found.any()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_cells_of_bfloat16_are_weighed_and_their_gradients_summed_in_float32(
    implementation,
):
    # Many points in one cell: a sum of few bits would stop to grow.
    points = jnp.full((1, 11, 60, 2), 0.51)
    rounded = cut(PICTURES)
    rounded = rounded._replace(cells=rounded.cells.astype(jnp.bfloat16))

    def total(cells, dtype):
        maps = rounded._replace(cells=cells.astype(dtype))
        found = lookup(maps, points, "zeros", implementation)
        return found.sum(), found

    slope = jax.grad(total, has_aux=True)
    cells = rounded.cells.astype(jnp.float32)
    expected, exact = slope(cells, jnp.float32)
    by_cell, found = slope(cells, jnp.bfloat16)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, exact, rtol=1e-6)
    # At the end they are rounded.
    np.testing.assert_allclose(by_cell, expected, rtol=1e-2)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_gradients_have_the_dtypes_of_what_they_are_of(implementation):
    maps, points = cut(PICTURES), jnp.asarray(POINTS, jnp.float32)

    def read(cells, points):
        return lookup(maps._replace(cells=cells), points, "zeros", implementation)

    given = maps.cells.astype(jnp.bfloat16), points
    found, pull = jax.vjp(read, *given)
    assert found.dtype == jnp.float32
    assert [g.dtype for g in pull(found)] == [g.dtype for g in given]


def test_auto_is_chosen_by_the_devices_of_the_mesh_and_not_by_the_host():
    maps, points = cut(PICTURES), jnp.asarray(POINTS, jnp.float32)

    def lower(implementation, platform):
        def read(cells, points):
            given = maps._replace(cells=cells)
            return lookup(given, points, "zeros", implementation)

        device = jax.sharding.AbstractDevice("", None, platform)
        mesh = jax.sharding.AbstractMesh((), (), abstract_device=device)
        with jax.sharding.use_abstract_mesh(mesh):
            lowered = jax.jit(read).trace(maps.cells, points)
        return lowered.lower(lowering_platforms=(platform,)).as_text()

    for platform, expected in (
        ("tpu", "neighbours"), ("cuda", "gather"), ("cpu", "gather")
    ):  # fmt: skip
        assert lower("auto", platform) == lower(expected, platform), platform
    assert lower("gather", "tpu") != lower("neighbours", "tpu")


def test_unknown_choices_are_named():
    maps, points = cut(PICTURES), jnp.asarray(POINTS, jnp.float32)
    with pytest.raises(ConfigError, match=r"config.model.lookup='gahter': .*'gather'"):
        lookup(maps, points, "zeros", "gahter")
    with pytest.raises(ConfigError, match="padding='zero'"):
        lookup(maps, points, "zero", "gather")


def test_boxes_start_on_a_grid_of_half_sides():
    grid = rois.half_grid(49)
    for index, box in {
        0: (0, 0, 0.5, 0.5),
        1: (0, 1 / 12, 0.5, 7 / 12),
        7: (1 / 12, 0, 7 / 12, 0.5),
        48: (0.5, 0.5, 1, 1),
    }.items():
        np.testing.assert_allclose(grid[index], box, rtol=1e-6, atol=1e-7)
    np.testing.assert_array_equal(rois.half_grid(1), [[0.25, 0.25, 0.75, 0.75]])


@pytest.mark.parametrize("count", [1, 2, 3, 7, 9, 16, 25, 36, 48, 49, 63, 64, 81, 256])
def test_no_two_tokens_start_with_one_box(count):
    assert len(np.unique(rois.half_grid(count), axis=0)) == count


def test_every_named_model_has_a_box_of_its_own_for_each_token():
    for shape in SHAPES.values():
        assert len(np.unique(rois.half_grid(shape.latents), axis=0)) == shape.latents


@pytest.mark.parametrize("count", [1, 9, 25, 48, 64, 256])
def test_a_resized_grid_of_boxes_is_the_grid_of_that_number(count):
    for own in (49, 48, 16):
        found = rois.resize_table(jnp.asarray(rois.half_grid(own)), count)
        np.testing.assert_allclose(found, rois.half_grid(count), atol=1e-6)


def test_a_resized_table_is_linear_between_its_entries_and_itself_at_its_own_number():
    table = jax.random.normal(jax.random.key(0), (6, 5))  # 3 columns, 2 rows
    assert rois.resize_table(table, 6) is table
    wide = rois.resize_table(table, 15).reshape(5, 3, 5)
    grid = table.reshape(3, 2, 5)
    np.testing.assert_allclose(wide[::2, ::2], grid, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(wide[1, 1], grid[:2].mean((0, 1)), rtol=1e-5, atol=1e-6)


def test_a_box_moves_by_its_sides_and_scales_by_exponentials():
    logits = jnp.array([0.5, -0.25, np.log(2), -np.log(2)])
    found = rois.adjust(jnp.array([0.2, 0.3, 0.6, 0.9]), logits)
    np.testing.assert_allclose(found, [0.2, 0.3, 1.0, 0.6], rtol=1e-5)


def test_points_start_on_a_grid_in_the_box():
    boxes = jnp.array([[[0, 0, 0.5, 0.5], [0, 0, 1, 2]]], jnp.float32)
    offsets = jnp.broadcast_to(jnp.asarray(rois.point_grid(16)), (1, 2, 16, 2))
    points = rois.place_points(boxes, offsets)
    np.testing.assert_allclose(points[0, 0, 0], [0.0335, 0.0335], atol=1e-5)
    np.testing.assert_allclose(points[0, 1, 1], [0.5 - 0.14433, 1 - 0.866], atol=1e-4)


def test_corners_are_encoded_by_sines_and_cosines_and_pass_no_gradient():
    box = jnp.array([[[0.25, 0.75, 0.25, 0.75]]])
    found = rois.encode(box, 16).reshape(4, 4)
    # Sines of frequencies 1 and 25.398, cosines of 5.040 and 128, of angles pi x.
    np.testing.assert_allclose(found[0], [0.70711, 0.89044, -0.68473, 1], atol=2e-5)
    np.testing.assert_allclose(found[1], [0.70711, -0.15275, 0.77004, 1], atol=2e-5)
    assert not jax.grad(lambda box: rois.encode(box, 16).sum())(box).any()


LOST = np.array([
    (0.3, 0.3, 0.3, 0.3), (0.8, 0.9, 0.2, 0.1), (5, 5, 6, 6), (-1e30, 0, 1e30, 1),
    (np.nan, 0, 1, 1), (0, -np.inf, 1, 1),
], np.float32)  # fmt: skip


@pytest.mark.parametrize("clamp", [False, True])
def test_boxes_that_are_none_stay_finite_and_so_do_their_gradients(clamp):
    offsets = jax.random.normal(jax.random.key(0), (1, len(LOST), 9, 2))
    logits = jnp.full((1, len(LOST), 4), 100.0)

    def total(boxes, offsets, logits):
        for _ in range(3):
            boxes = rois.settle(rois.adjust(rois.settle(boxes, clamp), logits), clamp)
        points = rois.place_points(boxes, offsets)
        encoded = rois.encode(boxes, 16)
        return jnp.sin(points).sum() + encoded.sum(), (boxes, points, encoded)

    slope = jax.jit(jax.grad(total, (0, 1, 2), has_aux=True))
    gradients, found = slope(jnp.asarray(LOST)[None], offsets, logits)
    assert all(jnp.isfinite(each).all() for each in (*found, *gradients))
    if clamp:
        assert ((found[0] >= 0) & (found[0] <= 1)).all()


def test_equal_offsets_have_a_finite_gradient():
    boxes = jnp.array([[[0, 0, 1, 1]]], jnp.float32)
    gradient = jax.grad(lambda o: jnp.square(rois.place_points(boxes, o)).sum())
    assert jnp.isfinite(gradient(jnp.full((1, 1, 9, 2), 0.5))).all()


def test_a_clamp_keeps_the_points_and_cuts_entries_of_their_gradient_alone():
    points, limits = jnp.ones((2, 2)), jnp.array([0.5, 2.0])
    upstream = jnp.array([[0.2, -3.0], [-0.7, 1.0]])

    def total(points):
        return (rois.clamp_gradient(points, limits) * upstream).sum()

    np.testing.assert_array_equal(rois.clamp_gradient(points, limits), points)
    np.testing.assert_allclose(jax.grad(total)(points), [[0.2, -2.0], [-0.5, 1.0]])
