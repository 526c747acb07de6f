import math
from collections import Counter
from itertools import combinations

import numpy as np
import pytest
from scipy import stats

from navit_jax.data import patches

RNG = np.random.default_rng(0)
# Keys one apart, or one step of the hash's own counter apart, are the hardest case.
STRIDES = pytest.mark.parametrize(
    "stride", [1, 0x9E3779B97F4A7C15], ids=["near", "golden"]
)


@pytest.mark.parametrize("grid", [(1, 1), (2, 3), (1, 7), (5, 1)])
@pytest.mark.parametrize("patch", [1, 4, 14])
def test_patches_come_row_by_row_with_channels_last(grid, patch):
    rows, columns = grid
    image = RNG.integers(0, 256, (rows * patch, columns * patch, 3), np.uint8)
    content, coords = patches.patchify(image, patch)
    expected = []
    for r in range(rows):
        for c in range(columns):
            values = [
                image[r * patch + y, c * patch + x, channel]
                for y in range(patch)
                for x in range(patch)
                for channel in range(3)
            ]
            expected.append(((r, c), values))
    assert coords.dtype == np.int32
    assert content.dtype == np.uint8
    np.testing.assert_array_equal(coords, [place for place, _ in expected])
    np.testing.assert_array_equal(content, [values for _, values in expected])


def test_chosen_patches_are_those_of_all():
    image = RNG.integers(0, 256, (12, 20, 3), np.uint8)
    content, coords = patches.patchify(image[:, ::-1], 4)
    chosen = np.array([0, 3, 4, 11, 14])
    some, places = patches.patchify(image[:, ::-1], 4, chosen)
    np.testing.assert_array_equal(some, content[chosen])
    np.testing.assert_array_equal(places, coords[chosen])


def test_unpatchify_undoes_patchify_and_fills_what_was_dropped():
    image = RNG.integers(0, 256, (12, 20, 3), np.uint8)
    content, coords = patches.patchify(image, 4)
    whole = patches.unpatchify(content, coords, (3, 5), 4)
    np.testing.assert_array_equal(whole, image)
    some = patches.unpatchify(content[[7]], coords[[7]], (3, 5), 4, fill=9)
    expected = np.full_like(image, 9)
    expected[4:8, 8:12] = image[4:8, 8:12]
    np.testing.assert_array_equal(some, expected)


def test_a_side_that_is_no_multiple_of_the_patch_is_our_own_mistake():
    with pytest.raises(AssertionError, match="10 x 8"):
        patches.patchify(np.zeros((10, 8, 3), np.uint8), 4)


@pytest.mark.parametrize(("num", "kept"), [(1, 1), (7, 7), (7, 1), (260, 100)])
def test_kept_patches_are_distinct_ascending_and_a_function_of_the_key(num, kept):
    chosen = patches.keep_patches(num, kept, key=2**64 - 3)
    assert len(chosen) == kept
    assert 0 <= chosen[0] <= chosen[-1] < num
    assert (np.diff(chosen) > 0).all()
    again = patches.keep_patches(num, kept, key=2**64 - 3)
    np.testing.assert_array_equal(chosen, again)


@STRIDES
def test_every_subset_is_kept_as_often_as_any_other(stride):
    num, kept, draws = 6, 3, 6000
    keys = [(i * stride) % 2**64 for i in range(draws)]
    counts = Counter(tuple(patches.keep_patches(num, kept, key)) for key in keys)
    subsets = list(combinations(range(num), kept))
    assert len(subsets) == math.comb(num, kept)
    observed = [counts[subset] for subset in subsets]
    assert sum(observed) == draws
    # A fair draw fails this once in 10,000 runs; the keys are fixed, so here never.
    assert stats.chisquare(observed).pvalue > 1e-4


@STRIDES
@pytest.mark.parametrize("shift", [0, 1], ids=["place", "next_place"])
def test_draws_of_neighbouring_keys_are_independent(stride, shift):
    chosen = np.zeros((4000, 8))
    for i in range(4000):
        chosen[i, patches.keep_patches(8, 4, (i * stride) % 2**64)] = 1
    agreement = np.corrcoef(
        chosen[:-1, shift:].ravel(), chosen[1:, : 8 - shift].ravel()
    )[0, 1]
    # 28,000 pairs or more: the standard error of a correlation of 0 is 0.006.
    assert abs(agreement) < 0.025
