import numpy as np
import pytest

from navit_jax.calibration import calibrated_error, calibration_error


def plain(confidence, right, num_bins):
    total = 0.0
    for b in range(num_bins):
        last = b == num_bins - 1
        here = [
            (c, r)
            for c, r in zip(confidence, right, strict=True)
            if b / num_bins <= c and (c < (b + 1) / num_bins or last)
        ]
        if here:
            gap = np.mean([c for c, _ in here]) - np.mean([r for _, r in here])
            total += len(here) / len(right) * abs(gap)
    return total


@pytest.mark.parametrize("num_bins", [1, 7, 30])
def test_the_error_is_the_gap_of_each_bin_by_its_share_of_the_images(num_bins):
    rng = np.random.default_rng(0)
    confidence, right = rng.random(500), rng.integers(0, 2, 500)
    confidence[:2] = 0.0, 1.0
    found = calibration_error(confidence, right, num_bins)
    assert found == pytest.approx(plain(confidence, right, num_bins), rel=1e-12)


def test_a_bin_without_a_gap_and_one_that_is_always_wrong():
    assert calibration_error(np.full(4, 0.75), np.array([1, 1, 1, 0])) == 0
    assert calibration_error(np.full(4, 1.0), np.zeros(4)) == 1


@pytest.mark.parametrize(
    "confidence, expected",
    [
        ((0.502, 0.532), 0.017),  # in the bin from 15/30 to 16/30: |0.517 - 0.5|
        ((0.532, 0.535), (0.468 + 0.535) / 2),  # on both sides of 16/30
        ((0.498, 0.502), (0.502 + 0.502) / 2),  # on both sides of 15/30
    ],
)
def test_bins_are_those_of_the_paper_thirtieths(confidence, expected):
    found = calibration_error(np.array(confidence), np.array([1, 0]))
    assert found == pytest.approx(expected)


def test_a_calibrated_model_of_few_images_shows_an_error_and_of_many_next_to_none():
    # One bin of n images at p: E|Binomial(n, p) / n - p|, by its own distribution.
    n, p = 20, 0.7
    draws = np.random.default_rng(1).binomial(n, p, 100_000)
    expected = np.abs(draws / n - p).mean()
    found = calibrated_error(np.full(n, p), num_samples=4000)
    assert found == pytest.approx(expected, rel=0.05)
    many = np.random.default_rng(2).random(200_000)
    assert calibrated_error(many, num_samples=5) < 0.01
