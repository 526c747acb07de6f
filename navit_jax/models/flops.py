"""Counts the matrix-product FLOPs of an encoder: useful ones, and with padding.

Two FLOPs a multiply-add. Norms, softmax, GELU, positions, tables of words, heads and
losses are not counted.

Shapes: P values a patch, D width.
"""

from navit_jax.models.sizes import Spec

# Times the forward pass: the backward pass is two products for each of its one.
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
      images: Vectors pooled, of images or texts.
      patch_values: P; 0 of texts, which are looked up.
      pooling: "map", "mean", "last" or "none".
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
