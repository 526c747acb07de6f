"""What towers of images and of texts have in common: blocks, a last norm, pooling.

A tower is a module with the attributes that `encode` reads, and each has them as its
config names them; the parameters become its own.

Shapes: B rows, L tokens a row, N slots a row, A axes, D width, W pairs of a head; M
tokens a row with special ones.
"""

from collections.abc import Callable, Mapping
from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key, Shaped

from navit_jax.errors import ConfigError
from navit_jax.models import pooling, special_tokens
from navit_jax.models.choices import pick
from navit_jax.models.device_rows import keep_rows
from navit_jax.models.dropout import draw
from navit_jax.models.layers import XAVIER, Block, layer_norm

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
    special: Mapping[str, Float[Array, "_ D"]] | None = None,
    pre_norm: bool = False,
    causal: bool = False,
) -> dict[str, Array]:
    """Runs blocks, norm and pooling as modules of a tower; call it where it is compact.

    Args:
      where: Its section of the config, for messages.
      tokens: Embedded; anything finite at padding.
      keys: Of each slot, for drop path and dropout; None drops nothing.
      angles: Of rotary positions.
      special: Tokens that go before those of each image by name, in order, that of
        "class" first. They are not rotated, and neither in `tokens` nor in a pool.
      pre_norm: Whether tokens are normalised before the first block too.
      causal: Whether a token attends to itself and those before it alone.

    Returns:
      `tokens` [B L D], 0 at padding; `pooled` [B N D], 0 in slots without a token,
      absent with pooling="none"; with a class token also `class` [B N D].

    Raises:
      ConfigError: an attribute of the tower has no such choice.
    """
    dtype = pick(f"{where}.dtype", tower.dtype, DTYPES)
    ids, places, out, added = segment_ids, coords, {}, [*(special or {}).values()]
    if added:
        rows = jnp.concatenate(added).astype(dtype)
        tokens, ids, index = special_tokens.insert(tokens, ids, rows, num_slots)
        index = index[..., None]
        places = jnp.where(index < 0, index, _follow(coords, index))
        if angles is not None:
            angles = jnp.where(index < 0, 0, _follow(angles, index))
    draws = {}
    if keys is not None:
        slots = jnp.maximum(ids - 1, 0)
        draws = draw(
            keys, slots, places, tower.spec.depth, tower.drop_path, tower.dropout
        )
    tokens = keep_rows(tokens)
    if pre_norm:
        tokens = layer_norm(tokens, tower.bias_ln, dtype, "pre_norm", tower.eps)
    blocks = build_blocks(tower, where, dtype, causal=causal)
    tokens, _ = blocks(tokens, draws, ids, angles)
    tokens = layer_norm(tokens, tower.bias_ln, dtype, "norm", tower.eps)
    tokens = keep_rows(jnp.where((ids > 0)[..., None], tokens, 0))
    if special and "class" in special:
        out["class"] = keep_rows(special_tokens.first(tokens, ids, num_slots))
    if added:
        num_special = sum(map(len, added))
        tokens = special_tokens.remove(tokens, segment_ids, num_special, num_slots)
    out["tokens"] = keep_rows(tokens)
    pool = pick(f"{where}.pooling", tower.pooling, POOLING)
    if tower.pooling == "class":
        if "class" not in out:
            raise ConfigError(f"config.{where}.pooling='class': it has no class token")
        out["pooled"] = out["class"]
    if pool is None:
        return out
    masks = pooling.image_masks(segment_ids, num_slots)
    return {**out, "pooled": keep_rows(pool(tower, dtype)(tokens, masks))}


def _follow(
    values: Shaped[Array, "B L A"], index: Int[Array, "B M 1"]
) -> Shaped[Array, "B M A"]:
    """Values of tokens, where `special_tokens.insert` has put these."""
    return jnp.take_along_axis(values, jnp.maximum(index, 0), axis=1)


def build_blocks(
    tower: Any, where: str, dtype: Any, init: Any = XAVIER, causal: bool = False
) -> nn.Module:
    """The tower's blocks as one module, called as `layers.Block`."""
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
        activation=tower.activation,
        eps=tower.eps,
        layer_scale=tower.layer_scale,
        init=init,
        causal=causal,
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
        activation=tower.activation,
        eps=tower.eps,
        name="pool",
    )


POOLING: dict[str, Callable[..., Any] | None] = {
    "map": _map_pool,
    "mean": lambda *_: pooling.mean_pool,
    "last": lambda *_: pooling.last_token,
    # Nothing is pooled.
    "class": None,
    "none": None,
}
