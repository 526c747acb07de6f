"""Random draws of the encoder's blocks: drop path and dropout, keyed by image.

An image draws the same wherever it is packed: drop path from its key alone, dropout
from its key and the place of the patch in its grid; never from a row or a slot.

Shapes: B rows, L tokens a row, N image slots a row, A axes of a grid, D width.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

# What a block does to its residual branches: {} when nothing is random.
Draws = dict[str, Any]


def draw(
    image_keys: Key[Array, "B N"],
    slots: Int[Array, "B L"],
    coords: Int[Array, "B L A"],
    depth: int,
    drop_path: float,
    dropout: float,
    branches: int = 2,
) -> Draws:
    """Draws for all blocks, stacked on axis 0.

    Args:
      slots: The image slot of each token.
      drop_path: Rate at which the last block drops a branch of an image; it grows
        linearly from 0 in the first (Huang et al. 2016).
      dropout: Only whether it is above 0 matters here.
      branches: Of a block.

    Returns:
      `scales` [depth B L branches], 0 for a dropped branch and 1 / (1 - rate) for a
      kept one; `keys` [depth B L], for dropout. Each only when its rate is above 0.
    """
    draws: Draws = {}
    fold = jax.random.fold_in
    each = jax.vmap(jax.vmap(fold, (0, None)), (0, None))
    to_tokens = jax.vmap(lambda values, slot: values[slot])
    if drop_path:
        rates = drop_path * jnp.arange(depth) / max(depth - 1, 1)
        rates, shape = rates[:, None], (depth, branches)
        uniform = jax.vmap(jax.vmap(lambda key: jax.random.uniform(key, shape)))
        kept = uniform(each(image_keys, 0)) >= rates
        scales = to_tokens(kept / (1 - rates), slots)
        draws["scales"] = jnp.moveaxis(scales, 2, 0)
    if dropout:
        keys = to_tokens(each(image_keys, 1), slots)
        for index in jnp.moveaxis(coords, -1, 0):
            keys = jax.vmap(jax.vmap(fold))(keys, index)
        draws["keys"] = jax.vmap(each, (None, 0))(keys, jnp.arange(depth))
    return draws


def residual(
    branch: Float[Array, "B L D"], which: int, draws: Draws, dropout: float
) -> Float[Array, "B L D"]:
    """The part of a branch that is added: `which` is 0 for attention, 1 for the MLP.

    Of a block of more branches the others follow.
    """
    if "keys" in draws:
        D = branch.shape[-1]

        def kept(key: Key[Array, ""]):
            key = jax.random.fold_in(key, which)
            return jax.random.bernoulli(key, 1 - dropout, (D,))

        mask = jax.vmap(jax.vmap(kept))(draws["keys"])
        branch = jnp.where(mask, branch / (1 - dropout), 0)
    if "scales" in draws:
        branch = branch * draws["scales"][..., which, None].astype(branch.dtype)
    return branch
