"""What waits for a GPU, in one table each: `bash benchmarks/gpu.sh`.

Equality of the attention implementations in float32 and bfloat16, values and gradients,
against `dense` in float32; the bfloat16 training step of B/16 and L/16 in useful MFU,
with attention's share (of the time beside attention that passes the values on) and the
memory, counted by the compiler and at its peak by the device; forward + backward times
of attention on images of 64 to 512 tokens in rows of 4096. What the backend can not
have is skipped, with the reason; anything else that raises, or is not equal, is listed
at the end, and the exit code is 1. `--tiny` runs all of it on any backend.
"""

import functools
import importlib
import itertools
import sys
from collections.abc import Callable, Sequence
from typing import Any

import fixed_list
import jax
import jax.numpy as jnp
import numpy as np
import steps
import timing
from absl import app, flags

from navit_jax import peak_flops, sharding
from navit_jax.models import attention, attention_kernels

WIDTH = 64  # of a head
NAMES = ("dense", "blocks", "mha", "cudnn packed")
MODULES = {
    "mha": "jax.experimental.pallas.ops.gpu.attention",
    "cudnn packed": "jax._src.cudnn.fused_attention_stablehlo",
}
# Of the largest: sums in another order, and a few roundings to 8 bits.
LIMITS = {"float32": 1e-5, "bfloat16": 2e-2}


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
    """cuDNN's packed layout; anything at padding."""
    cudnn: Any = importlib.import_module(MODULES["cudnn packed"])
    own = ids[:, None, :] == jnp.arange(1, slots + 1)[:, None]
    lengths = own.sum(-1, dtype=jnp.int32)
    starts = jnp.where(lengths > 0, own.argmax(-1), -1).astype(jnp.int32)
    lengths = jnp.where(lengths > 0, lengths, -1)
    offsets = jnp.pad(starts, ((0, 0), (0, 1)), constant_values=-1)
    return cudnn.dot_product_attention(
        q, k, v, q_seqlen=lengths, kv_seqlen=lengths, q_offsets=offsets,
        kv_offsets=offsets, scale=WIDTH**-0.5, mask_type=cudnn.MaskType.PADDING,
    )  # fmt: skip


def register(slots: int, tiny: bool) -> None:
    """Gives the model cuDNN's layout and, in the tiny form, `mha` on any backend."""
    attention.IMPLEMENTATIONS["cudnn packed"] = functools.partial(
        cudnn_packed, slots=slots
    )
    if tiny:
        attention.KERNELS.pop("mha", None)
        attention.IMPLEMENTATIONS["mha"] = functools.partial(
            attention_kernels.mha, interpret=True
        )


def lacking(name: str, dtype: Any) -> str:
    """Why this backend can not have an implementation; nothing if it can."""
    device = jax.devices()[0]
    if name in MODULES:
        try:
            importlib.import_module(MODULES[name])
        except ImportError as error:
            return f"jax {jax.__version__} has none ({error})"
    if name == "cudnn packed":
        if not device.device_kind.startswith("NVIDIA"):
            return f"cuDNN is not for {device.device_kind}"
        if float(device.compute_capability) < 9:
            return f"cuDNN needs Hopper, this is {device.compute_capability}"
        if dtype == jnp.float32:
            return "cuDNN has no float32"
    return ""


def attempt(
    what: str, name: str, dtype: Any, run: Callable[[], list[str]], failed: list[str]
) -> list[str]:
    """The cells that `run` returns, or one that says why there are none."""
    if reason := lacking(name, dtype):
        return [f"skipped: {reason}"]
    try:
        return run()
    except Exception as error:
        line = str(error).partition("\n")[0][:200]
        failed.append(f"{what} of {name}: {type(error).__name__}: {line}")
        return [f"FAILED: {type(error).__name__}"]


def gradient(name: str) -> Callable[..., tuple[jax.Array, ...]]:
    """Value and gradients of q, k and v, jitted."""

    def loss(q, k, v, ids, upstream):
        out = attention.packed_attention(q, k, v, ids, name)
        return (out * upstream).sum().astype(jnp.float32), out

    return jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))


def inputs(ids: np.ndarray, heads: int, dtype: Any) -> tuple[jax.Array, ...]:
    """Normal q, k, v, the ids, and a gradient from above."""
    keys = jax.random.split(jax.random.key(0), 4)
    shape = (*ids.shape, heads, WIDTH)
    q, k, v, upstream = (jax.random.normal(key, shape).astype(dtype) for key in keys)
    return q, k, v, jnp.asarray(ids), upstream


def compare(tiny: bool, failed: list[str]) -> None:
    """Largest differences from float32 `dense` at the highest precision."""
    ids = segments(2, 128, 8, 40) if tiny else segments(2, 1024, 16, 256)
    register(int(ids.max()), tiny)
    lines = []

    def results(name: str, arrays: Sequence[jax.Array]) -> list[np.ndarray]:
        with jax.default_matmul_precision("highest"):
            (_, out), grads = gradient(name)(*arrays)
        return [np.asarray(x.astype(jnp.float32)) for x in (out, *grads)]

    for dtype in (jnp.float32, jnp.bfloat16):
        kind, arrays = jnp.dtype(dtype).name, inputs(ids, 2, dtype)
        exact = [x.astype(jnp.float32) if x.dtype == dtype else x for x in arrays]
        wanted = functools.cache(functools.partial(results, "dense", exact))
        for name in NAMES:

            def cells(name=name, kind=kind, arrays=arrays, wanted=wanted) -> list[str]:
                pairs = zip(results(name, arrays), wanted(), strict=True)
                errors = [np.abs(x - y).max() / np.abs(y).max() for x, y in pairs]
                if not max(errors) <= LIMITS[kind]:
                    failed.append(f"{name} in {kind} is off by {max(errors):.1e}")
                return [f"{error:.1e}" for error in errors]

            lines.append([name, kind, *attempt(kind, name, dtype, cells, failed)])
    header = "attention | dtype | values | to q | to k | to v"
    steps.table(
        "Largest difference from dense in float32, of the largest", header, lines
    )


def time_attention(tiny: bool, repeats: int, failed: list[str]) -> None:
    """Forward + backward of images of 64 to 512 tokens packed to 4096."""
    rows, heads = (2, 2) if tiny else (8, 12)
    ids = segments(rows, 128, 8, 40) if tiny else segments(rows, 4096, 64, 512)
    dtype = jnp.float32 if tiny else jnp.bfloat16
    arrays = inputs(ids, heads, dtype)
    register(int(ids.max()), tiny)
    cases, lines = {}, {}
    for name in NAMES:

        def prepare(name=name) -> list[str]:
            call = gradient(name)
            jax.block_until_ready(call(*arrays))
            cases[name] = lambda: jax.block_until_ready(call(*arrays))
            return []

        lines[name] = attempt("the time", name, dtype, prepare, failed)
    seconds = timing.interleave(cases, repeats)
    useful = 3 * 4 * steps.count_pairs(ids) * WIDTH * heads
    for name, taken in seconds.items():
        lines[name] = [
            f"{1e3 * np.median(taken):.3g}",
            f"{useful / np.median(taken) / 1e12:.3g}",
            timing.ratio(seconds.get("dense", np.full(repeats, np.nan)), taken),
        ]
    title = f"Forward + backward, {rows} rows of {ids.shape[1]}, {heads} heads"
    header = "attention | ms | useful TFLOP/s | dense / it"
    steps.table(title, header, [[name, *cells] for name, cells in lines.items()])


def time_steps(tiny: bool, repeats: int, peak: float, failed: list[str]) -> None:
    """The training step in useful MFU, a share of `peak` FLOP/s."""
    device = jax.devices()[0]
    shapes = {"B/16": (16, 4096), "L/16": (8, 4096)}
    model = {}
    if tiny:
        shapes, model = {"Ti/16": (2, 272)}, {"depth": 1, "mlp": 64}
        model |= {"width": WIDTH, "num_heads": 1}
    batches = {size: fixed_list.packed(*shape, 64) for size, shape in shapes.items()}
    register(64, tiny)
    runs, taken, lines = {}, {}, {}
    for case in itertools.product(shapes, ("values", *NAMES, "auto")):
        size, name = case

        def build(size=size, name=name) -> list[str]:
            rows = 1 if tiny else len(batches[size].patches)
            settings = steps.config(
                size, batches[size], rows, attention=name, dtype="bfloat16", **model
            )
            runs[size, name] = settings, steps.compiled(settings, batches[size])
            return []

        lines[case] = attempt(size, name, jnp.bfloat16, build, failed)

    def held(case: tuple[str, str]) -> int:
        memory = runs[case][1].memory_analysis()
        return memory.temp_size_in_bytes + memory.argument_size_in_bytes

    # The peak is that of the process until now: who takes least goes first.
    for size, name in sorted(runs, key=held):

        def run(size=size, name=name) -> list[str]:
            settings, step = runs[size, name]
            before, batch = peak_memory(device), batches[size]
            call = steps.step(settings, batch, step)
            each = np.median(timing.interleave({name: call}, repeats)[name])
            taken[size, name] = each
            rates = [count / each for count in steps.count(batch)]
            useful = steps.useful_flops(settings, batch) / each / peak
            return [
                f"{1e3 * each:.1f}", *(f"{rate:,.0f}" for rate in rates),
                f"{useful:.2%}", f"{held((size, name)) / 2**30:.3f}",
                tell_peak(before, peak_memory(device)),
            ]  # fmt: skip

        lines[size, name] = attempt(size, name, jnp.bfloat16, run, failed)
    for size, name in taken:
        without = taken.get((size, "values"), np.nan)
        lines[size, name].append(f"{1 - without / taken[size, name]:.0%}")
        if name == "values":
            lines[size, name][3] = "-"  # of products that it does not compute
    header = "size | attention | ms/step | images/s | tokens/s | useful MFU"
    header += " | GiB by the compiler | GiB at the peak | attention's share"
    steps.table(
        "Training step, bfloat16", header, [[*c, *cells] for c, cells in lines.items()]
    )


def peak_memory(device: Any) -> int:
    """Bytes in use at the peak of the process; 0 where the backend does not tell."""
    return (device.memory_stats() or {}).get("peak_bytes_in_use", 0)


def tell_peak(before: int, after: int) -> str:
    """GiB, or the most it can be where an earlier peak was higher; "-" unknown."""
    return f"{'<= ' * (after == before)}{after / 2**30:.2f}" if after else "-"


def measure(tiny: bool) -> int:
    """Prints every table; 1 if anything failed."""
    device, failed = jax.devices()[0], []
    peak = peak_flops.peak_flops(device)
    print(
        f"{device.device_kind}, peak {peak / 1e12:.4g} TFLOP/s, jax {jax.__version__},"
        f" Python {sys.version.split()[0]}"
    )
    compare(tiny, failed)
    with jax.set_mesh(sharding.make_mesh(devices=[device])):
        time_steps(tiny, 1 if tiny else 10, peak, failed)
    time_attention(tiny, 1 if tiny else 20, failed)
    for line in failed:
        print(f"FAILED: {line}")
    return int(bool(failed))


def main(_: list[str]) -> int:
    """The exit code."""
    return measure(flags.FLAGS.tiny)


if __name__ == "__main__":
    # Not when a test imports this: other benchmarks have a flag of this name.
    flags.DEFINE_bool("tiny", False, "Small shapes, any backend")
    app.run(main)
