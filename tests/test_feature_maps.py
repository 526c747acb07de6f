from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.lib.stride_tricks import sliding_window_view

from navit_jax.models import feature_maps
from navit_jax.models.navit import normalise

RNG = np.random.default_rng(0)
MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)
KERNEL = 0.1 * RNG.standard_normal((7, 7, 3, 8))
BIAS = RNG.standard_normal(8)


def patchify(picture, patch):
    rows, columns = picture.shape[0] // patch, picture.shape[1] // patch
    cut = picture.reshape(rows, patch, columns, patch, 3).swapaxes(1, 2)
    coords = np.indices((rows, columns)).reshape(2, -1).T
    return cut.reshape(rows * columns, -1), coords


def pack(pictures, patch, room=3):
    """One row; padding and the room of an empty slot are noise."""
    parts = [patchify(picture, patch) for picture in pictures]
    patches = np.concatenate([
        *(p for p, _ in parts), RNG.integers(0, 256, (room, patch**2 * 3))
    ]).astype(np.uint8)  # fmt: skip
    coords = np.concatenate([*(c for _, c in parts), RNG.integers(0, 3, (room, 2))])
    ids = [i + 1 for i, (p, _) in enumerate(parts) for _ in p] + [0] * room
    grids = [np.array(picture.shape[:2]) // patch for picture in pictures]
    row = patches, coords, np.array(ids), np.stack([*grids, (9, 9)])
    return tuple(jnp.asarray(each[None]) for each in row)


def alone(picture):
    """The stem of one picture between zeros, in torch's paddings, in float64."""
    x = (picture / 255 - np.array(MEAN)) / np.array(STD)
    x = np.pad(x, ((3, 3), (3, 3), (0, 0)))
    x = sliding_window_view(x, (7, 7), (0, 1))[::2, ::2]
    x = np.maximum(np.einsum("hwcij,ijcd->hwd", x, KERNEL) + BIAS, 0)
    x = np.pad(x, ((1, 1), (1, 1), (0, 0)))
    x = sliding_window_view(x, (3, 3), (0, 1))[::2, ::2].max((-1, -2))
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)


def paste(maps, slot):
    """The map of a slot's image, from its tiles by a loop."""
    t, origins = maps.cells.shape[2], feature_maps.find_origins(maps)
    h, w = np.asarray(maps.sizes)[0, slot]
    pasted = np.zeros((200, 200, maps.cells.shape[-1]))
    for tile in np.flatnonzero(maps.slots[0] == slot):
        y, x = np.asarray(origins[0, tile])
        pasted[y : y + t, x : x + t] = maps.cells[0, tile]
    return pasted[:h, :w]


def run(row, patch, cut, max_side=5):
    """Maps of a row."""
    stem: Any = feature_maps.Stem(8, MEAN, STD, jnp.float32)

    @jax.jit
    def compute(*row):
        pixels, maps = feature_maps.CUTS[cut](*row, patch, max_side)
        params = {"conv": {"kernel": KERNEL, "bias": BIAS}}
        cells = stem.apply({"params": params}, pixels, maps, patch * row[3])
        return maps._replace(cells=cells)

    return compute(*row)


@pytest.mark.parametrize(
    "patch, cut",
    [(16, "tiles"), (14, "tiles"), (5, "tiles"), (3, "tiles"), (14, "canvas"),
     (3, "canvas")],
)  # fmt: skip
def test_each_image_has_the_map_it_has_alone(patch, cut):
    sides = ((2, 3), (4, 1), (1, 1))
    pictures = [RNG.integers(0, 256, (h * patch, w * patch, 3)) for h, w in sides]
    maps = run(pack(pictures, patch), patch, cut)
    for slot, picture in enumerate(pictures):
        found = paste(maps, slot)
        np.testing.assert_allclose(found, alone(picture), atol=2e-4)
    assert (np.asarray(maps.sizes)[0, 3] == 0).all()


def test_an_image_with_missing_patches_has_no_map_of_tiles_and_holes_on_a_canvas():
    pictures = [RNG.integers(0, 256, (8, 12, 3)) for _ in range(2)]
    row = list(pack(pictures, 4))
    row = [*(jnp.delete(each, 2, axis=1) for each in row[:3]), row[3]]
    tiles = run(row, 4, "tiles")
    assert tiles.sizes[0].tolist() == [[0, 0], [2, 3], [0, 0]]
    canvas = run(row, 4, "canvas")
    assert canvas.sizes[0].tolist() == [[2, 3], [2, 3], [0, 0]]
    holed = pictures[0].copy()
    holed[:4, 8:] = 0
    np.testing.assert_allclose(paste(canvas, 0), alone(holed), atol=2e-4)
    np.testing.assert_allclose(paste(tiles, 1), alone(pictures[1]), atol=2e-4)


def test_floats_are_taken_as_they_are():
    row = pack([RNG.integers(0, 256, (8, 8, 3))], 4)
    floats = normalise(row[0], MEAN, STD)
    packed = run(row, 4, "tiles")
    given = run((floats, *row[1:]), 4, "tiles")
    np.testing.assert_allclose(packed.cells, given.cells, atol=1e-5)


def test_an_image_whose_patches_are_shuffled_or_lack_the_last_has_no_map_of_tiles():
    row = pack([RNG.integers(0, 256, (8, 12, 3)) for _ in range(2)], 4)
    order = np.array([1, 0, *range(2, 11), 12, 13, 14])
    mixed = [*(each[:, order] for each in row[:3]), row[3]]
    _, maps = feature_maps.cut_tiles(*mixed, 4, 5)
    assert maps.sizes[0].tolist() == [[0, 0], [0, 0], [0, 0]]
    _, maps = feature_maps.cut_tiles(*row, 4, 5)
    assert maps.sizes[0].tolist() == [[2, 3], [2, 3], [0, 0]]


def test_a_convolution_is_unfolded_on_a_cpu_alone_and_is_the_same():
    pixels = jnp.asarray(RNG.standard_normal((3, 15, 15, 3)), jnp.float32)
    kernel = jnp.asarray(KERNEL, jnp.float32)
    others = {"dimension_numbers": ("NHWC", "HWIO", "NHWC")}

    def convolve(pixels, kernel):
        return feature_maps.convolve(pixels, kernel, (2, 2), "VALID", **others)

    expected = jax.lax.conv_general_dilated(pixels, kernel, (2, 2), "VALID", **others)
    np.testing.assert_allclose(convolve(pixels, kernel), expected, atol=1e-4)
    # Whatever the host: what counts is for which devices it is compiled.
    traced = jax.jit(convolve).trace(pixels, kernel)
    for platform in ("cpu", "cuda", "tpu"):
        text = traced.lower(lowering_platforms=(platform,)).as_text()
        assert ("stablehlo.convolution" in text) == (platform != "cpu"), platform
