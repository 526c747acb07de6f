import numpy as np
import pytest

from navit_jax import linear_probe
from navit_jax.errors import ConfigError

RNG = np.random.default_rng(0)
X = RNG.standard_normal((30, 6)) * [1, 2, 3, 4, 5, 0.1] + 3
Y = np.where(np.eye(4)[RNG.integers(0, 4, 30)] > 0, 1.0, -1.0)


def ridge(x, y, l2):
    """Standardised ridge with an intercept that is not penalised, by its equations."""
    centre, scale = x.mean(0), x.std(0) + 1e-8
    z = (x - centre) / scale
    w = np.linalg.solve(z.T @ z + l2 * np.eye(x.shape[1]), z.T @ (y - y.mean(0)))
    return w / scale[:, None], y.mean(0) - (centre / scale) @ w


def leave_one_out(l2):
    """The error of each image under a fit of the others, by fitting them."""
    # Standardised once with all of them, as a fit of one penalty is.
    z = (X - X.mean(0)) / (X.std(0) + 1e-8)
    errors = []
    for i in range(len(X)):
        rest = np.delete(np.arange(len(X)), i)
        zr, yr = z[rest], Y[rest]
        centred = zr - zr.mean(0)
        w = np.linalg.solve(
            centred.T @ centred + l2 * np.eye(6), centred.T @ (yr - yr.mean(0))
        )
        errors.append((Y[i] - yr.mean(0) - (z[i] - zr.mean(0)) @ w) ** 2)
    return np.mean(errors)


def test_the_fit_is_ridge_regression_with_the_best_penalty_left_one_out():
    best = min(linear_probe.L2, key=leave_one_out)
    assert best not in (linear_probe.L2[0], linear_probe.L2[-1])
    expected = ridge(X, Y, best)
    for found, wanted in zip(linear_probe.fit(X, Y), expected, strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-8)


def test_more_features_than_images_and_constant_ones_are_no_trouble():
    x = np.concatenate([RNG.standard_normal((8, 40)), np.ones((8, 1))], 1)
    y = np.where(np.eye(2)[np.arange(8) % 2] > 0, 1.0, -1.0)
    weights, bias = linear_probe.fit(x, y)
    assert np.isfinite(weights).all()
    assert (linear_probe.predict(x, weights, bias) == np.arange(8) % 2).all()


def test_shots_are_of_each_class_once_and_differ_by_seed():
    labels = np.array([0, 1, -1, 2] * 10)
    asked = []

    def label_of(index):
        asked.append(index)
        return int(labels[index])

    def choose(num_shots, seed):
        return linear_probe.choose_shots(label_of, len(labels), num_shots, 3, seed)

    chosen = [choose(1, seed) for seed in range(20)]
    assert len(asked) < 20 * len(labels) / 2  # it stops when it has them
    chosen += [choose(3, seed) for seed in range(20)]
    for shots in chosen:
        assert len(set(shots.tolist())) == len(shots)
        assert set(np.bincount(labels[shots]).tolist()) == {len(shots) // 3}
    assert len({tuple(shots) for shots in chosen}) == 40
    with pytest.raises(ConfigError, match=r"shots=11: class 0 has 10 training"):
        choose(11, 0)
