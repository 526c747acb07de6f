"""Few-shot linear probe: least squares on frozen features (Dosovitskiy et al. 2021).

M images of the training set, C classes, D width, S images that are judged.
"""

from collections.abc import Callable

import numpy as np
from jaxtyping import Float, Int, Real

from navit_jax.errors import ConfigError

# The weights tried; the one of the least leave-one-out error is taken, so that nothing
# is chosen on what is judged.
L2 = tuple(10.0**k for k in range(-3, 6))


def choose_shots(
    label_of: Callable[[int], int],
    num_images: int,
    num_shots: int,
    num_classes: int,
    seed: int,
) -> Int[np.ndarray, " K"]:
    """Draws `num_shots` images of each class, without replacement, as indices.

    Args:
      label_of: The class of an image by index, asked of no more images than needed, in
        random order; -1 is never drawn.

    Raises:
      ConfigError: a class has fewer images.
    """
    chosen: list[list[int]] = [[] for _ in range(num_classes)]
    missing = num_shots * num_classes
    for index in np.random.default_rng(seed).permutation(num_images).tolist():
        label = label_of(index)
        if label >= 0 and len(chosen[label]) < num_shots:
            chosen[label].append(index)
            missing -= 1
            if not missing:
                return np.concatenate([np.array(own) for own in chosen])
    fewest = int(np.argmin([len(own) for own in chosen]))
    raise ConfigError(
        f"--shots={num_shots}: class {fewest} has {len(chosen[fewest])} training "
        "images with this label alone; ask for fewer"
    )


def fit(
    features: Real[np.ndarray, "M D"], targets: Real[np.ndarray, "M C"]
) -> tuple[Float[np.ndarray, "D C"], Float[np.ndarray, " C"]]:
    """Ridge regression with an intercept; returns weights and biases.

    Features are standardised first, and the strength of the penalty is chosen by the
    exact leave-one-out squared error (Allen 1974), in closed form from one SVD.

    Args:
      targets: 1 for the class of the image, -1 for the others.
    """
    x, y = features.astype(np.float64), targets.astype(np.float64)
    centre, scale = x.mean(0), x.std(0) + 1e-8
    u, s, v = np.linalg.svd((x - centre) / scale, full_matrices=False)
    middle = y.mean(0)
    coordinates = u.T @ (y - middle)
    best, weights = np.inf, np.zeros((x.shape[1], y.shape[1]))
    for l2 in L2:
        shrink = s**2 / (s**2 + l2)
        fitted = middle + u @ (shrink[:, None] * coordinates)
        leverage = 1 / len(x) + (u**2) @ shrink
        error = (((y - fitted) / (1 - leverage)[:, None]) ** 2).mean()
        if error < best:
            best = error
            weights = v.T @ ((shrink / np.maximum(s, 1e-12))[:, None] * coordinates)
    weights = weights / scale[:, None]
    return weights, middle - centre @ weights


def predict(
    features: Real[np.ndarray, "S D"],
    weights: Float[np.ndarray, "D C"],
    bias: Float[np.ndarray, " C"],
) -> Int[np.ndarray, " S"]:
    """The class of each image."""
    return (features @ weights + bias).argmax(1)
