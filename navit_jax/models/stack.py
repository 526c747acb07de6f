"""What towers of images and of texts have in common: blocks, a last norm, pooling.

A tower is a module with the attributes that `encode` reads, and each has them as its
config names them; the parameters become its own.

Shapes: B rows, L tokens a row, N slots a row, A axes, D width, W pairs of a head.
"""

from collections.abc import Callable
from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from navit_jax.models import pooling
from navit_jax.models.choices import pick
from navit_jax.models.device_rows import keep_rows
from navit_jax.models.dropout import draw
from navit_jax.models.layers import Block, layer_norm

POLICIES = jax.checkpoint_policies
# What the backward pass of a block keeps from the forward pass.
REMAT: dict[str, Callable[..., Any] | None] = {
    "none": None,
    "light": POLICIES.save_from_both_policies(
        POLICIES.save_only_these_names("projected", "attended", "between", "hidden"),
        # A kernel's results have no names.
        lambda primitive, *_, **__: primitive.name == "pallas_call",
    ),
    "full": POLICIES.nothing_saveable,
    "dots": POLICIES.dots_saveable,
    "dots_no_batch": POLICIES.dots_with_no_batch_dims_saveable,
}
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


def encode(
    tower: Any,
    where: str,
    tokens: Float[Array, "B L D"],
    coords: Int[Array, "B L A"],
    segment_ids: Int[Array, "B L"],
    num_slots: int,
    keys: Key[Array, "B N"] | None,
    angles: Float[Array, "B L W"] | None = None,
) -> dict[str, Array]:
    """Runs blocks, norm and pooling as modules of a tower; call it where it is compact.

    Args:
      where: Its section of the config, for messages.
      tokens: Embedded; anything finite at padding.
      keys: Of each slot, for drop path and dropout; None drops nothing.
      angles: Of rotary positions.

    Returns:
      `tokens` [B L D], 0 at padding; `pooled` [B N D], 0 in slots without a token,
      absent with pooling="none".
    """
    dtype = pick(f"{where}.dtype", tower.dtype, DTYPES)
    draws = {}
    if keys is not None:
        slots = jnp.maximum(segment_ids - 1, 0)
        draws = draw(
            keys, slots, coords, tower.spec.depth, tower.drop_path, tower.dropout
        )
    tokens = keep_rows(tokens)
    tokens, _ = _blocks(tower, where, dtype)(tokens, draws, segment_ids, angles)
    tokens = layer_norm(tokens, tower.bias_ln, dtype, "norm")
    tokens = keep_rows(jnp.where((segment_ids > 0)[..., None], tokens, 0))
    pool = pick(f"{where}.pooling", tower.pooling, POOLING)
    if pool is None:
        return {"tokens": tokens}
    masks = pooling.image_masks(segment_ids, num_slots)
    return {"tokens": tokens, "pooled": keep_rows(pool(tower, dtype)(tokens, masks))}


def _blocks(tower: Any, where: str, dtype: Any) -> nn.Module:
    block, policy = Block, pick(f"{where}.remat", tower.remat, REMAT)
    if policy is not None:
        # A loop's iterations are not merged; blocks compiled in a line could be.
        block = nn.remat(block, policy=policy, prevent_cse=not tower.scan)
    spec = tower.spec
    stack = nn.scan(
        block,
        variable_axes={"params": 0},
        split_rngs={"params": True},
        in_axes=cast(Any, (0, nn.broadcast, nn.broadcast)),
        length=spec.depth,
        unroll=1 if tower.scan else spec.depth,
    )
    return stack(
        num_heads=spec.num_heads,
        hidden=spec.mlp,
        bias_qkv=tower.bias_qkv,
        bias_ln=tower.bias_ln,
        bias_mlp=tower.bias_mlp,
        qk_norm=tower.qk_norm,
        implementation=tower.attention,
        dropout=tower.dropout,
        dtype=dtype,
        name="blocks",
    )


def _map_pool(tower: Any, dtype: Any) -> pooling.AttentionPool:
    return pooling.AttentionPool(
        num_heads=tower.spec.num_heads,
        hidden=tower.spec.mlp,
        bias_qkv=tower.bias_qkv,
        bias_ln=tower.bias_ln,
        bias_mlp=tower.bias_mlp,
        dtype=dtype,
        name="pool",
    )


POOLING: dict[str, Callable[..., Any] | None] = {
    "map": _map_pool,
    "mean": lambda *_: pooling.mean_pool,
    "none": None,
}
