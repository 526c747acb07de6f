"""What waits for a GPU, in one table each: `bash benchmarks/gpu.sh`.

Equality of the attention implementations in float32 and bfloat16, values and gradients,
against `dense` in float32; their forward + backward times on images of 64 to 512 tokens
in rows of 4096; the bfloat16 training step of B/16 and L/16 in useful MFU, with
attention's share (of the time beside attention that passes the values on) and the
memory by the compiler's count. `--tiny` runs all of it on any backend.
"""

import functools
import sys
from collections.abc import Callable
from typing import Any

import fixed_list
import jax
import jax.numpy as jnp
import numpy as np
import steps
import timing
from absl import app, flags

from navit_jax import peak_flops, sharding
from navit_jax.models import attention, flops, sizes

TINY = flags.DEFINE_bool("tiny", False, "Small shapes, any backend")
WIDTH = 64  # of a head
Attend = Callable[..., jax.Array]


def segments(num_rows: int, num_tokens: int, low: int, high: int) -> np.ndarray:
    """Segment ids [B L] of images of `low` to `high` tokens, and padding at the end."""
    rng, ids = np.random.default_rng(0), np.zeros((num_rows, num_tokens), np.int32)
    for row in ids:
        start, number = 0, 1
        while (length := int(rng.integers(low, high + 1))) <= num_tokens - start:
            row[start : start + length] = number
            start, number = start + length, number + 1
    return ids


def cudnn_packed(q: Any, k: Any, v: Any, ids: Any, slots: int) -> jax.Array:
    """cuDNN's packed layout, as far as this jax exposes it; not for float32."""
    from jax._src.cudnn import fused_attention_stablehlo as cudnn

    numbers = jnp.arange(1, slots + 1)
    own = ids[:, None, :] == numbers[None, :, None]
    lengths = own.sum(-1, dtype=jnp.int32)
    starts = jnp.where(lengths > 0, own.argmax(-1), -1).astype(jnp.int32)
    lengths = jnp.where(lengths > 0, lengths, -1)
    offsets = jnp.pad(starts, ((0, 0), (0, 1)), constant_values=-1)
    out = cudnn.dot_product_attention(
        q, k, v, q_seqlen=lengths, kv_seqlen=lengths, q_offsets=offsets,
        kv_offsets=offsets, scale=WIDTH**-0.5, mask_type=cudnn.MaskType.PADDING,
    )  # fmt: skip
    return jnp.where((ids > 0)[..., None, None], out, 0)


def implementations(slots: int, tiny: bool) -> dict[str, Attend]:
    """What is compared; kernels run in Pallas' interpreter in the tiny form."""

    def ours(name: str) -> Attend:
        interpret = tiny and name == "mha"
        return lambda q, k, v, ids: attention.packed_attention(
            q, k, v, ids, name, interpret=interpret
        )

    found = {name: ours(name) for name in ("dense", "blocks", "mha")}
    if not tiny:
        found["cudnn packed"] = functools.partial(cudnn_packed, slots=slots)
    return found


def gradient(attend: Attend) -> Callable[..., tuple[jax.Array, ...]]:
    """Value and gradients of q, k and v, jitted."""

    def loss(q, k, v, ids, upstream):
        out = attend(q, k, v, ids)
        return (out * upstream).sum().astype(jnp.float32), out

    return jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))


def inputs(ids: np.ndarray, heads: int, dtype: Any) -> tuple[jax.Array, ...]:
    """Normal q, k, v, the ids, and a gradient from above."""
    keys = jax.random.split(jax.random.key(0), 4)
    shape = (*ids.shape, heads, WIDTH)
    q, k, v, upstream = (jax.random.normal(key, shape).astype(dtype) for key in keys)
    return q, k, v, jnp.asarray(ids), upstream


def compare(tiny: bool) -> None:
    """Largest differences from float32 `dense` at the highest precision."""
    ids = segments(2, 128, 8, 40) if tiny else segments(2, 1024, 16, 256)
    lines = []
    for dtype in (jnp.float32, jnp.bfloat16):
        q, k, v, segment_ids, upstream = inputs(ids, 2, dtype)
        exact = [x.astype(jnp.float32) for x in (q, k, v)]
        with jax.default_matmul_precision("highest"):
            reference = gradient(attention.dense)(
                *exact, segment_ids, upstream.astype(jnp.float32)
            )
        real = (ids > 0)[..., None, None]
        for name, attend in implementations(int(ids.max()), tiny).items():
            try:
                with jax.default_matmul_precision("highest"):
                    (_, out), grads = gradient(attend)(q, k, v, segment_ids, upstream)
                cells = [
                    f"{_error(found, wanted, real):.1e}"
                    for found, wanted in zip(
                        (out, *grads), (reference[0][1], *reference[1]), strict=True
                    )
                ]
            except Exception as error:
                cells = [f"{type(error).__name__}: {str(error).splitlines()[0][:90]}"]
                cells += [""] * 3
            lines.append([name, jnp.dtype(dtype).name, *cells])
    header = "attention | dtype | values | to q | to k | to v"
    steps.table(
        "Largest difference from dense in float32, of the largest", header, lines
    )


def _error(found: Any, wanted: Any, real: np.ndarray) -> float:
    found, wanted = (np.asarray(x.astype(jnp.float32)) * real for x in (found, wanted))
    return float(np.abs(found - wanted).max() / np.abs(wanted).max())


def time_attention(tiny: bool, repeats: int) -> None:
    """Forward + backward of images of 64 to 512 tokens packed to 4096."""
    rows, heads = (2, 2) if tiny else (8, 12)
    ids = segments(rows, 128, 8, 40) if tiny else segments(rows, 4096, 64, 512)
    arrays = inputs(ids, heads, jnp.float32 if tiny else jnp.bfloat16)
    cases, failed = {}, []
    for name, attend in implementations(int(ids.max()), tiny).items():
        call = gradient(attend)
        try:
            jax.block_until_ready(call(*arrays))
        except Exception as error:
            failed.append([name, f"{type(error).__name__}", "", ""])
            continue
        cases[name] = functools.partial(
            lambda f: jax.block_until_ready(f(*arrays)), call
        )
    seconds = timing.interleave(cases, repeats)
    pairs = sum(float((np.bincount(row)[1:].astype(float) ** 2).sum()) for row in ids)
    useful = 3 * 4 * pairs * WIDTH * heads
    lines = [
        [
            name,
            f"{1e3 * np.median(taken):.2f}",
            f"{useful / np.median(taken) / 1e12:.1f}",
            timing.ratio(seconds["dense"], taken),
        ]
        for name, taken in seconds.items()
    ]
    title = f"Forward + backward, {rows} rows of {ids.shape[1]}, {heads} heads"
    header = "attention | ms | useful TFLOP/s | dense / it"
    steps.table(title, header, lines + failed)


def time_steps(tiny: bool, repeats: int) -> None:
    """The training step in useful MFU: valid tokens, attention by image."""
    # Attention that passes the values on: what is left is everything else.
    attention.IMPLEMENTATIONS["values"] = lambda q, k, v, ids: v + 0 * (q + k)
    lines = []
    peak = peak_flops.peak_flops(jax.devices()[0])
    cases = (
        [("Ti/16", 2, 1, 256)]
        if tiny
        else [("B/16", 16, 16, 4096), ("L/16", 8, 8, 4096)]
    )
    model = {"depth": 1, "width": 64, "num_heads": 1, "mlp": 64} if tiny else {}
    for size, rows, micro, length in cases:
        batch = fixed_list.packed(rows, max(length, 272), 64)
        images, tokens = steps.count(batch)
        spec = sizes.spec(size)._replace(**model)
        pairs = sum(
            float((np.bincount(row)[1:].astype(float) ** 2).sum())
            for row in batch.segment_ids
        )
        useful = flops.TRAINING * flops.forward_flops(tokens, pairs, images, spec, 768)
        without = float("nan")
        names = ("values", "dense") if tiny else ("values", "dense", "blocks", "mha")
        for name in names:
            settings = steps.config(
                size, batch, micro, attention=name, dtype="bfloat16", **model
            )
            try:
                run = steps.compiled(settings, batch)
                call = steps.step(settings, batch, run)
                taken = float(np.median(timing.interleave({name: call}, repeats)[name]))
            except Exception as error:
                lines.append([size, name, type(error).__name__, *[""] * 5])
                continue
            without = taken if name == "values" else without
            memory = run.memory_analysis()
            held = memory and memory.temp_size_in_bytes + memory.argument_size_in_bytes
            lines.append([
                size, name, f"{1e3 * taken:.1f}", f"{images / taken:,.0f}",
                f"{tokens / taken:,.0f}", f"{useful / taken / peak:.1%}",
                f"{1 - without / taken:.0%}", f"{(held or 0) / 2**30:.2f}",
            ])  # fmt: skip
            del call
            jax.clear_caches()
    header = "size | attention | ms/step | images/s | tokens/s | useful MFU"
    header += " | attention's share | state + temporaries GiB"
    steps.table("Training step, bfloat16", header, lines)


def main(_: list[str]) -> None:
    """Prints every table."""
    tiny, device = TINY.value, jax.devices()[0]
    print(
        f"{device.device_kind}, jax {jax.__version__}, Python {sys.version.split()[0]}"
    )
    compare(tiny)
    time_attention(tiny, 1 if tiny else 20)
    with jax.set_mesh(sharding.make_mesh(devices=[device])):
        time_steps(tiny, 1 if tiny else 10)


if __name__ == "__main__":
    app.run(main)
