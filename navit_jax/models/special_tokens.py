"""Puts tokens that are no patches, of class or registers, before those of each image.

On the device: the batch stays as it was packed, the tokens of an image stay in one
piece, and the row is longer by the most special tokens that it can hold.

Shapes: B rows, L tokens a row, N image slots a row, S special tokens an image, D width,
M = L + N S.
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from navit_jax.models.pooling import image_masks


def insert(
    tokens: Float[Array, "B L D"],
    segment_ids: Int[Array, "B L"],
    special: Float[Array, "S D"] | Float[Array, "B N S D"],
    num_slots: int,
) -> tuple[Float[Array, "B M D"], Int[Array, "B M"], Int[Array, "B M"]]:
    """Puts the special tokens before the tokens of every image that has any.

    Args:
      segment_ids: 1.. in the order of packing, 0 = padding; an image is one piece.
      special: The same for all images, or those of each slot.

    Returns:
      The tokens, 0 at padding, which is at the end of the row; their segment ids; and
      where each comes from: the index of an old token, i - S for the i-th special
      token, which is below 0, and 0 at padding.
    """
    (B, L), (S, D), N = segment_ids.shape, special.shape[-2:], num_slots
    masks = image_masks(segment_ids, N)
    ends = _ends(masks, S)
    places = jnp.arange(L + N * S)
    # A place is in the slot after all those that end before it.
    slots = (places[:, None] >= ends[:, None]).sum(-1)
    real = slots < N
    slots = jnp.minimum(slots, N - 1)

    # The number of a token among those of its image; below 0 it is special.
    number = places - jnp.take_along_axis(ends - masks.sum(-1), slots, axis=1)
    starts = jnp.take_along_axis(_starts(masks), slots, axis=1)
    index = jnp.where(real, jnp.where(number < 0, number, starts + number), 0)

    # Each source is read once, so no gradient is summed in an order left open.
    special = jnp.broadcast_to(special.astype(tokens.dtype), (B, N, S, D))
    sources = jnp.concatenate([tokens, special.reshape(B, N * S, D)], axis=1)
    read = jnp.where(index < 0, L + slots * S + index + S, index)
    read = jnp.where(real, read, 0)[..., None]
    inserted = jnp.where(real[..., None], jnp.take_along_axis(sources, read, axis=1), 0)
    return inserted, jnp.where(real, slots + 1, 0), index


def remove(
    tokens: Float[Array, "B M D"],
    segment_ids: Int[Array, "B L"],
    num_special: int,
    num_slots: int,
) -> Float[Array, "B L D"]:
    """Undoes `insert`: the others at their old places, 0 at padding.

    Args:
      segment_ids: Those that `insert` was given.
      num_special: S.
    """
    masks = image_masks(segment_ids, num_slots)
    slots = jnp.maximum(segment_ids - 1, 0)
    shifts = _ends(masks, num_special) - masks.sum(-1) - _starts(masks)
    places = jnp.arange(segment_ids.shape[1])
    places = places + jnp.take_along_axis(shifts, slots, axis=1)
    real = (segment_ids > 0)[..., None]
    places = jnp.where(real, places[..., None], 0)
    return jnp.where(real, jnp.take_along_axis(tokens, places, axis=1), 0)


def first(
    tokens: Float[Array, "B L D"], segment_ids: Int[Array, "B L"], num_slots: int
) -> Float[Array, "B N D"]:
    """The first token of each image; 0 in slots without a token."""
    masks = image_masks(segment_ids, num_slots)
    found = jnp.take_along_axis(tokens, _starts(masks)[..., None], axis=1)
    return jnp.where(masks.any(-1, keepdims=True), found, 0)


def _starts(masks: Bool[Array, "B N L"]) -> Int[Array, "B N"]:
    return jnp.argmax(masks, axis=-1)


def _ends(masks: Bool[Array, "B N L"], S: int) -> Int[Array, "B N"]:
    """Where each image ends once its special tokens are in the row."""
    counts = masks.sum(-1)
    return jnp.cumsum(jnp.where(counts > 0, counts + S, 0), axis=1)
