"""What latent tokens say of the places of a picture."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from navit_jax.models import readout, sampling
from navit_jax.models.feature_maps import Maps

GRID = (4, 3)
COORDS = np.indices(GRID).reshape(2, -1).T[None]
PLACES, SIZES = COORDS[..., ::-1], np.broadcast_to((3, 4), (1, 12, 2))
CENTRES = (PLACES + 0.5) / SIZES


@pytest.mark.parametrize("padding", ["border", "zeros"])
def test_splatting_is_the_transpose_of_the_lookup(padding):
    points = jax.random.uniform(jax.random.key(0), (1, 5, 7, 2), minval=-0.5, maxval=2)
    # A map in whose cells stands which one it is.
    cells = np.zeros((1, 1, 4, 4, 12), np.float32)
    for number, (row, column) in enumerate(COORDS[0]):
        cells[0, 0, row, column, number] = 1
    maps = Maps(
        cells=jnp.asarray(cells),
        slots=jnp.zeros((1, 1), int),
        starts=jnp.zeros((1, 1), int),
        columns=jnp.ones((1, 1), int),
        sizes=jnp.array([[GRID]]),
    )
    read = sampling.lookup(maps, jnp.zeros((1, 5), int), points, padding)
    same, border = jnp.ones((1, 12, 5), bool), jnp.array(padding == "border")
    found = readout.splat_points(
        points, jnp.asarray(PLACES), jnp.asarray(SIZES), same, border
    )
    np.testing.assert_allclose(found[0], read[0].sum(1).T, atol=1e-5)
    assert read.any()


def test_a_patch_hears_its_boxes_and_one_outside_of_all_the_nearest():
    rois = jnp.array([[[0, 0, 0.3, 1.0], [0.7, 0, 0.7, 1.0], [0, 0, 1, 1]]])
    same = jnp.ones((1, 12, 3), bool).at[..., 2].set(False)
    weights, offsets = readout.weigh_boxes(
        rois, jnp.asarray(CENTRES, jnp.float32), jnp.asarray(SIZES), same
    )
    np.testing.assert_allclose(weights.sum(-1), 1, rtol=1e-5)
    assert not weights[..., 2].any()
    left, middle, right = weights[0].reshape(*GRID, 3)[1]
    assert left[0] > 0.95
    assert right[1] > 0.9
    # Between a box that ends at .3 and one that is a line at .7, a patch wide.
    assert min(middle[:2]) > 0.01
    np.testing.assert_allclose(
        offsets[0, :, 0, 1], (CENTRES[0, :, 1] - 0.5) * 2, atol=1e-6
    )
    assert np.abs(offsets).max() <= 1


@pytest.mark.parametrize("by", ["boxes", "points"])
def test_a_token_says_a_plane_over_its_last_box(by):
    # A token, and one of no image; where they looked before says nothing.
    token = jax.random.normal(jax.random.key(1), (1, 2, 4))
    rois = [[[0, 0, 0.2, 0.1], [0, 0, 1, 1]], [[0, 0, 1, 1], [0, 0, 1, 1]]]
    out = {
        "tokens": token,
        "latent_ids": jnp.array([[1, 0]]),
        "rois": jnp.array([rois], jnp.float32),
        "points": jax.random.uniform(jax.random.key(2), (1, 2, 2, 3, 2)),
    }
    ids = np.ones((1, 14), int)
    ids[0, 12:] = 0
    coords = np.concatenate([COORDS, np.zeros((1, 2, 2), int)], 1)
    module = readout.Readout(by, "zeros")
    row = jnp.asarray(coords), jnp.asarray(ids), jnp.array([[GRID]])
    params: Any = module.init(jax.random.key(0), out, *row)
    found = np.asarray(module.apply(params, out, *row))
    planes = token[0, 0] @ params["params"]["planes"]["kernel"]
    value, *slopes = np.split(np.asarray(planes), 3)
    x, y = (2 * CENTRES[0, :, axis, None] - 1 for axis in (0, 1))
    expected = value + x * slopes[0] + y * slopes[1]
    np.testing.assert_allclose(found[0, :12], expected, atol=1e-5)
    assert not found[0, 12:].any()


@pytest.mark.parametrize("padding", ["border", "zeros"])
def test_patches_hear_the_last_points_as_the_encoder_reads_them(padding):
    first, last = (0.5, 0.5), (1.4, 0.5)  # the second is right of the picture
    boxes = np.tile([0, 0, 1, 1], (1, 2, 2, 1))
    points = [[[first], [first]], [[last], [first]]]
    out = {
        "tokens": jnp.array([[[1.0], [0.0]]]),
        "latent_ids": jnp.ones((1, 2), int),
        "rois": jnp.asarray(boxes, jnp.float32),
        "points": jnp.array([points]),
    }
    row = jnp.asarray(COORDS), jnp.ones((1, 12), int), jnp.array([[GRID]])
    params = {"planes": {"kernel": jnp.array([[1.0, 0, 0]]), "bias": jnp.zeros(3)}}
    module: Any = readout.Readout("points", padding)
    found = module.apply({"params": params}, out, *row).reshape(GRID)
    # Rows 1 and 2 of the last column have the point if it counts as at the border,
    # else both boxes alike.
    expected = 0.99 if padding == "border" else 0.5
    np.testing.assert_allclose(found[1:3, 2], expected, atol=0.02)
    np.testing.assert_allclose(found[1:3, 1], 0, atol=0.02)
