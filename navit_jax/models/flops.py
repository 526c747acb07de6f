"""Counts the matrix-product FLOPs of an encoder: useful ones, and with padding.

Two FLOPs a multiply-add. Norms, softmax, GELU, positions and heads are not counted.

Shapes: B rows, L tokens a row, N image slots a row, P values a patch, D width.
"""

from collections.abc import Iterable

import numpy as np

from navit_jax.models.sizes import Spec

# A backward pass is two products for each one of the forward pass.
TRAINING = 3


def forward_flops(
    tokens: int | float,
    pairs: int | float,
    images: int | float,
    spec: Spec,
    patch_values: int,
    pooling: str = "map",
) -> float:
    """FLOPs of one forward pass, by what it is over.

    Args:
      tokens: Tokens encoded.
      pairs: Pairs of tokens that attend to each other, sum of n^2 over images.
      images: Vectors pooled.
      patch_values: P.
      pooling: "map", "mean" or "none".
    """
    D, depth, hidden = spec.width, spec.depth, spec.mlp
    embed = 2 * tokens * patch_values * D
    # Query, key, value and output, then the MLP's two layers.
    linear = 2 * tokens * (4 * D * D + 2 * D * hidden)
    attention = 2 * pairs * 2 * D
    if pooling == "map":
        # Keys and values of tokens, scores and averages; output and MLP of images.
        per_token, per_image = 2 * D * D + 2 * D, D * D + 2 * D * hidden
        pool = 2 * (tokens * per_token + images * per_image)
    else:
        pool = 2 * tokens * D if pooling == "mean" else 0
    return float(embed + depth * (linear + attention) + pool)


def train_flops(
    lengths: Iterable[int] | np.ndarray,
    spec: Spec,
    patch_values: int,
    pooling: str = "map",
) -> float:
    """Useful FLOPs of a training step: those of the images' own tokens.

    Args:
      lengths: Kept tokens of each image; zeros do not count.
    """
    n = np.asarray(list(lengths), np.float64).ravel()
    images = float(np.count_nonzero(n))
    forward = forward_flops(n.sum(), (n * n).sum(), images, spec, patch_values, pooling)
    return TRAINING * forward


def padded_train_flops(
    rows: int,
    tokens: int,
    slots: int,
    spec: Spec,
    patch_values: int,
    pooling: str = "map",
) -> float:
    """FLOPs of a training step as computed with dense attention, padding and all.

    Args:
      rows: B.
      tokens: L.
      slots: N.
    """
    forward = forward_flops(
        rows * tokens, rows * tokens**2, rows * slots, spec, patch_values, pooling
    )
    return TRAINING * forward
