"""JAX's own Pallas kernels as packed attention: `splash` for TPU, `mha` for GPU.

Shapes: B rows, L tokens a row, H heads, K head width.

Both mask by segment and never hold L x L scores, but visit every block of a row. They
treat padding as one more image: whoever calls them hides it before and after. Pallas is
imported by the kernel that needs it: it takes as long as the rest of a model's modules.
"""

from typing import cast

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

# Lengths of both kernels are whole numbers of blocks: the lanes of a TPU register.
STEP = 128


def _lengthen(x: Array) -> Array:
    """Pads tokens with zeros to a whole number of blocks."""
    return jnp.pad(x, [(0, 0), (0, -x.shape[1] % STEP)] + [(0, 0)] * (x.ndim - 2))


def splash(
    q: Float[Array, "B L H K"],
    k: Float[Array, "B L H K"],
    v: Float[Array, "B L H K"],
    segment_ids: Int[Array, "B L"],
    interpret: bool = False,
) -> Float[Array, "B L H K"]:
    """Splash attention, a TPU kernel.

    Args:
      interpret: Runs the kernel in Pallas' interpreter, slowly, on any backend.
    """
    from jax.experimental.pallas.ops.tpu import splash_attention as tpu

    L, H, K = q.shape[1:]
    ids = _lengthen(segment_ids)
    padded = ids.shape[1]
    block = next(size for size in (512, 256, STEP) if padded % size == 0)
    sizes = tpu.BlockSizes(
        block_q=block,
        block_kv=block,
        block_q_dkv=block,
        block_kv_dkv=block,
        block_q_dq=block,
        block_kv_dq=block,
    )
    every_key = tpu.MultiHeadMask([tpu.FullMask((padded, padded))] * H)
    kernel = tpu.make_splash_mha(
        every_key,
        block_sizes=sizes,
        head_shards=1,
        q_seq_shards=1,
        interpret=interpret,
    )
    # The kernel does not scale. In float32, so that bfloat16 is rounded once.
    q = (q.astype(jnp.float32) * K**-0.5).astype(q.dtype)
    rows = [_lengthen(x).swapaxes(1, 2) for x in (q, k, v)]
    out = cast(Array, jax.vmap(kernel)(*rows, tpu.SegmentIds(ids, ids)))
    return out.swapaxes(1, 2)[:, :L]


def mha(
    q: Float[Array, "B L H K"],
    k: Float[Array, "B L H K"],
    v: Float[Array, "B L H K"],
    segment_ids: Int[Array, "B L"],
    interpret: bool = False,
) -> Float[Array, "B L H K"]:
    """Fused attention in Triton, a GPU kernel.

    Args:
      interpret: Runs the kernel in Pallas' interpreter, slowly, on any backend.
    """
    from jax.experimental.pallas.ops.gpu import attention as gpu

    L, K = q.shape[1], q.shape[-1]
    rows = [_lengthen(x) for x in (q, k, v, segment_ids)]
    out = cast(Array, gpu.mha(*rows, sm_scale=K**-0.5, interpret=interpret))
    return out[:, :L]
