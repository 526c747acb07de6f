"""Pools a packed row of tokens into one vector per image, at a cost linear in L.

Shapes: B rows, L tokens a row, N image slots a row, D width, H heads, K head width.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from navit_jax.models.layers import Mlp, layer_norm, merge_heads, project_heads


def image_masks(segment_ids: Int[Array, "B L"], num_slots: int) -> Bool[Array, "B N L"]:
    """Tells which tokens belong to which image slot.

    Images count from 1 in the order of packing. Padding is 0 and belongs to no slot;
    a slot beyond the last image of its row owns no token.
    """
    return segment_ids[:, None, :] == jnp.arange(1, num_slots + 1)[None, :, None]


def tokens_of_slots(
    segment_ids: Int[Array, "B L"], num_slots: int
) -> Int[Array, "B N"]:
    """The number of tokens of each slot's image."""
    return image_masks(segment_ids, num_slots).sum(-1)


def mean_pool(
    tokens: Float[Array, "B L D"], masks: Bool[Array, "B N L"]
) -> Float[Array, "B N D"]:
    """Averages the tokens of each image; an empty slot gives zeros."""
    # Summed in float32: a bfloat16 sum over a long row drops small terms.
    total = jnp.einsum("BLD,BNL->BND", tokens, masks, preferred_element_type="float32")
    count = masks.sum(-1, keepdims=True)
    return (total / jnp.maximum(count, 1)).astype(tokens.dtype)


def last_token(
    tokens: Float[Array, "B L D"], masks: Bool[Array, "B N L"]
) -> Float[Array, "B N D"]:
    """The last token of each image, or text; an empty slot gives zeros."""
    last = masks.shape[-1] - 1 - jnp.argmax(masks[..., ::-1], axis=-1)
    found = jnp.take_along_axis(tokens, last[..., None], axis=1)
    return jnp.where(masks.any(-1, keepdims=True), found, 0)


def segment_attend(
    scores: Float[Array, "B L H"],
    values: Float[Array, "B L H K"],
    masks: Bool[Array, "B N L"],
) -> Float[Array, "B N H K"]:
    """Averages each image's values by the softmax of its own scores.

    A token belongs to one image at most, so it has one score a head and is weighted
    once: nothing of the size N x L is wider than the heads. An empty slot gives zeros.

    Args:
      scores: float32.
    """
    peaks = jnp.where(masks[..., None], scores[:, None], -jnp.inf).max(2)
    slots = jnp.argmax(masks, axis=1)
    # Softmax does not change when its peak is shifted, so neither does the gradient.
    peaks = jax.lax.stop_gradient(jnp.take_along_axis(peaks, slots[..., None], axis=1))
    owned = masks.any(1)[..., None]
    below = scores - peaks
    # XLA may compute a score once for its peak and again here; a huge one then rounds
    # above its own peak, and the exponential overflows.
    below -= jax.lax.stop_gradient(jnp.maximum(below, 0))
    weights = jnp.exp(jnp.where(owned, below, -jnp.inf))
    totals = jnp.einsum("BNL,BLH->BNH", masks, weights, precision="highest")
    sums = jnp.einsum(
        "BNL,BLHK->BNHK",
        masks,
        weights[..., None].astype(values.dtype) * values,
        preferred_element_type="float32",
    )
    averages = sums / jnp.where(totals > 0, totals, 1)[..., None]
    return averages.astype(values.dtype)


class AttentionPool(nn.Module):
    """MAP: a learned probe attends to the tokens of one image, then an MLP.

    z = MHA(probe, X), then z + MLP(LN(z)) (Zhai et al. 2022), for each image of a row;
    queries and keys are not normalised here. An empty slot is exactly 0 and passes no
    gradient.

    Attributes:
      num_heads: Divides the width.
      hidden: Width of the MLP between its layers.
    """

    num_heads: int
    hidden: int
    bias_qkv: bool
    bias_ln: bool
    bias_mlp: bool
    dtype: Any
    activation: str = "gelu_tanh"
    eps: float = 1e-6

    @nn.compact
    def __call__(
        self, tokens: Float[Array, "B L D"], masks: Bool[Array, "B N L"]
    ) -> Float[Array, "B N D"]:
        """One vector for each slot."""
        D = tokens.shape[-1]
        K = D // self.num_heads

        def heads(vectors: jax.Array, name: str) -> jax.Array:
            layer = project_heads(self.num_heads, K, self.bias_qkv, self.dtype, name)
            return layer(vectors)

        probe = self.param("probe", nn.initializers.xavier_uniform(), (1, D))
        query = heads(probe, "query")[0]
        key, value = heads(tokens, "key"), heads(tokens, "value")
        scores = jnp.einsum(
            "HK,BLHK->BLH", query, key, preferred_element_type="float32"
        )
        attended = segment_attend(scores / K**0.5, value, masks)
        pooled = merge_heads(D, self.bias_mlp, self.dtype, "out")(attended)
        normed = layer_norm(pooled, self.bias_ln, self.dtype, "norm", self.eps)
        mlp = Mlp(self.hidden, self.bias_mlp, self.dtype, self.activation, name="mlp")
        pooled += mlp(normed)
        return jnp.where(masks.any(-1, keepdims=True), pooled, 0)
