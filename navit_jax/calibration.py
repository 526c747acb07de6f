"""How far confidence is from accuracy. M images."""

import numpy as np
from jaxtyping import Int, Real

BINS = 30  # as in table 4 of the paper


def calibration_error(
    confidence: Real[np.ndarray, " M"],
    right: Real[np.ndarray, " M"],
    num_bins: int = BINS,
) -> float:
    """Expected calibration error: |confidence - accuracy| of each bin, by its images.

    Bins of confidence are equally wide in [0, 1] (Naeini et al. 2015; L1, top-1).

    Args:
      confidence: Probability of the class that was chosen.
      right: 1 where it was one of the labels, else 0.
    """
    bins = _bins(confidence, num_bins)
    return float(np.abs(np.bincount(bins, confidence - right)).sum() / len(right))


def calibrated_error(
    confidence: Real[np.ndarray, " M"], num_bins: int = BINS, num_samples: int = 200
) -> float:
    """What `calibration_error` shows on average if every confidence is true.

    It is not 0: with few images a bin, the share of right ones scatters. The mean over
    outcomes drawn with a fixed seed; the order of the images does not matter.
    """
    confidence = np.sort(confidence)
    rng, bins = np.random.default_rng(0), _bins(confidence, num_bins)
    errors = []
    for _ in range(num_samples):
        right = rng.random(len(confidence)) < confidence
        errors.append(np.abs(np.bincount(bins, confidence - right)).sum())
    return float(np.mean(errors) / len(confidence))


def _bins(confidence: Real[np.ndarray, " M"], num: int) -> Int[np.ndarray, " M"]:
    return np.minimum((confidence * num).astype(np.int64), num - 1)
