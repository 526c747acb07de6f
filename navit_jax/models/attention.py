"""Attention within each image of packed rows: one function, several implementations.

Shapes: B rows, L tokens a row, H heads, K head width.
"""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from navit_jax.errors import ConfigError
from navit_jax.models import attention_kernels
from navit_jax.models.attention_blocks import blocks
from navit_jax.models.choices import pick
from navit_jax.models.device_rows import find_platform, free_axes, row_axes

HEAD_AXIS = "tensor"


def packed_attention(
    q: Float[Array, "B L H K"],
    k: Float[Array, "B L H K"],
    v: Float[Array, "B L H K"],
    segment_ids: Int[Array, "B L"],
    implementation: str = "auto",
    *,
    causal: bool = False,
    interpret: bool = False,
) -> Float[Array, "B L H K"]:
    """Softmax attention of each token to the tokens of its own image (NaViT, 2.1).

    Logits are scaled by 1 / sqrt(K); the softmax is in float32. Padding gives exactly
    0, gets a gradient of exactly 0 and, whatever it holds, even NaN, changes no bit of
    an image. Nor does what other images hold, as long as it is finite.

    Under `jax.set_mesh`, with a mesh of axes (replica, fsdp, tensor), every
    implementation but `dense` computes on each device the rows and heads it holds, by
    `jax.shard_map`; rows or heads that the axes do not divide are computed by all.

    Args:
      segment_ids: 1.. for images, 0 for padding. The tokens of an image are contiguous,
        except for `dense`, `splash` and `mha`, which take any order.
      implementation: `dense` holds all L x L scores and is the reference. `blocks`
        visits only pairs of blocks that share an image, on any backend. `splash` is a
        TPU kernel, `mha` a GPU kernel. `auto` is `blocks` on CPU, `splash` on TPU and
        `dense` elsewhere, where nothing else has been timed yet.
      causal: Whether a token attends to itself and those before it alone; `dense`
        does it, and is what `auto` then is.
      interpret: Runs `splash` and `mha` in Pallas' interpreter, slowly, on any backend.

    Raises:
      ConfigError: an unknown implementation, one that is not causal, or a kernel of
        another backend.
    """
    platform = find_platform()
    if causal:
        if implementation not in ("auto", "dense"):
            raise ConfigError(
                f"attention={implementation!r} is not causal: use 'auto' or 'dense'"
            )
        implementation = "dense"
    if implementation == "auto":
        implementation = AUTO.get(platform, "dense")
    attend = pick("model.attention", implementation, IMPLEMENTATIONS)
    needed = KERNELS.get(implementation)
    if needed and not interpret and needed != platform:
        raise ConfigError(
            f"config.model.attention={implementation!r} is a kernel for {needed}, and "
            f"this computes on {platform}; use 'auto', 'blocks' or 'dense'"
        )
    if needed:
        attend = functools.partial(attend, interpret=interpret)
    if causal:
        attend = functools.partial(attend, causal=True)
    if implementation != "blocks":
        attend = _hiding_padding(attend)
    if implementation != "dense":
        attend = _on_mesh(attend, num_rows=q.shape[0], num_heads=q.shape[2])
    return attend(q, k, v, segment_ids)


def dense(
    q: Float[Array, "B L H K"],
    k: Float[Array, "B L H K"],
    v: Float[Array, "B L H K"],
    segment_ids: Int[Array, "B L"],
    causal: bool = False,
) -> Float[Array, "B L H K"]:
    """The reference: all L x L scores, masked; padding is one more image."""
    same = segment_ids[:, :, None] == segment_ids[:, None, :]
    mask = jnp.tril(same) if causal else same
    out = jax.nn.dot_product_attention(q, k, v, mask=mask[:, None])
    return checkpoint_name(out, "attended")


Attend = Callable[[Array, Array, Array, Array], Array]

IMPLEMENTATIONS: dict[str, Callable[..., Array]] = {
    "dense": dense,
    "blocks": blocks,
    "splash": attention_kernels.splash,
    "mha": attention_kernels.mha,
}
KERNELS = {"splash": "tpu", "mha": "gpu"}
AUTO = {"cpu": "blocks", "tpu": "splash"}


def _hiding_padding(attend: Attend) -> Attend:
    def attend_images(q: Array, k: Array, v: Array, segment_ids: Array) -> Array:
        real = (segment_ids > 0)[:, :, None, None]
        # A product with the mask would keep NaN, and pass it to gradients.
        q, k, v = (jnp.where(real, x, 0) for x in (q, k, v))
        return jnp.where(real, attend(q, k, v, segment_ids), 0)

    return attend_images


def _on_mesh(attend: Attend, num_rows: int, num_heads: int) -> Attend:
    ours = free_axes()
    if math.prod(ours.values()) == 1:
        return attend
    rows = row_axes(num_rows)
    heads = HEAD_AXIS if num_heads % ours.get(HEAD_AXIS, num_heads + 1) == 0 else None
    each = PartitionSpec(rows, None, heads, None)
    return jax.shard_map(
        attend,
        in_specs=(each, each, each, PartitionSpec(rows, None)),
        out_specs=each,
        axis_names=set(ours),
        # Loops start from zeros and kernels from empty memory, which are marked as
        # equal on all devices until told otherwise.
        check_vma=False,
    )
