"""The contrastive losses against other forms: `python benchmarks/contrastive.py`.

Prints, of loss and all gradients over 8 CPU devices: time and memory by global batch,
bytes sent, and what half precision on the ring costs. Takes 23 minutes on two
cores of Linux; `--tiny` is for a test.
"""

import concurrent.futures
import functools
import multiprocessing
import os
import pathlib
import time

os.environ["XLA_FLAGS"] = (
    f"--xla_force_host_platform_device_count=8 {os.environ.get('XLA_FLAGS', '')}"
)
os.environ["JAX_PLATFORMS"] = "cpu"


import contrastive_forms as forms
import jax
import jax.numpy as jnp
import numpy as np
import steps
import timing
from absl import app, flags
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from navit_jax import hlo
from navit_jax.losses import contrastive

TINY = flags.DEFINE_bool("tiny", False, "Small batches, one repeat")
REPEATS = flags.DEFINE_integer("repeats", 5, "Timed rounds up to 16k, fewer above")
DEVICES, WIDTH = 8, 512
# The task's own.
CHUNK = 256
# A form that needs more is compiled, not run: the machine may not have it.
MOST = 6000
# MiB that a call adds, resident: open_clip's ClipLoss and SigLipLoss, one device,
# D=512, torch 2.13.
PUBLIC = {
    "softmax": {8192: 1297, 16384: 4219},
    "sigmoid": {8192: 1362, 16384: 5211},
}
# The loss, and whether it takes a chunk.
FORMS = {
    "softmax": {
        "ring": (contrastive.softmax_loss, True),
        "gather, chunks": (forms.gather_chunks, True),
        "gather both": (forms.gather_both, False),
        "dense": (forms.dense, False),
    },
    "sigmoid": {
        "ring": (contrastive.sigmoid_loss, True),
        "ring of blocks": (forms.sigmoid_blocks, False),
        "dense": (forms.dense_sigmoid, False),
    },
}
DTYPES = ("float32", "float32"), ("bfloat16", "float32"), ("bfloat16", "bfloat16")


def mesh() -> jax.sharding.Mesh:
    """All devices on one axis."""
    return jax.make_mesh((DEVICES,), ("x",), (AxisType.Auto,))


def draw(batch: int, width: int, share: float = 1) -> tuple[jax.Array, ...]:
    """Unit embeddings and a mask of valid slots, placed; scale and bias."""
    keys = jax.random.split(jax.random.key(0), 3)
    image, noise = (jax.random.normal(key, (batch, width)) for key in keys[:2])
    arrays = image, image + 2 * noise, jax.random.uniform(keys[2], (batch,)) < share
    arrays = (
        *(x / jnp.linalg.norm(x, axis=1, keepdims=True) for x in arrays[:2]),
        arrays[2],
    )
    place = functools.partial(jax.device_put, device=NamedSharding(mesh(), P("x")))
    return *map(place, arrays), jnp.float32(20), jnp.float32(-10)


class Form:
    """Loss and gradients of a form, compiled for a batch."""

    def __init__(self, loss, inputs, **options):
        self.inputs = inputs if "sigmoid" in loss.__name__ else inputs[:-1]
        numbers = range(3, len(self.inputs))
        whole = jax.shard_map(
            functools.partial(loss, axis_name="x", **options),
            mesh=mesh(),
            in_specs=(P("x"),) * 3 + (P(),) * len(numbers),
            out_specs=P(),
        )
        run = jax.jit(jax.value_and_grad(whole, (0, 1, *numbers)))
        self.program = run.lower(*self.inputs).compile()

    def __call__(self):
        """Runs it and waits."""
        return jax.block_until_ready(self.program(*self.inputs))

    def compiled(self) -> float:
        """MiB of temporaries and gradients of all devices, as the compiler says."""
        memory = self.program.memory_analysis()
        number = memory.temp_size_in_bytes + memory.output_size_in_bytes
        return DEVICES * number / 2**20

    def sent(self, chunks: int = 1) -> int:
        """Bytes a device sends, where so many chunks of a device are filled."""
        found = hlo.read(self.program.as_text(), chunks)
        return sum(c.size * c.times for c in found)


def build(kind: str, name: str, inputs: tuple[jax.Array, ...]) -> Form:
    """One of FORMS for a batch."""
    loss, chunked = FORMS[kind][name]
    chunk = min(CHUNK, len(inputs[0]) // DEVICES)
    return Form(loss, inputs, **({"chunk": chunk} if chunked else {}))


def read_status(field: str) -> float:
    """MiB of this process."""
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return next(int(x.split()[1]) for x in lines if x.startswith(field)) / 1024


def call_once(kind: str, name: str, batch: int, width: int, share: float) -> float:
    """MiB that the first call adds, resident, at its peak."""
    inputs = jax.block_until_ready(draw(batch, width, share))
    form = build(kind, name, inputs)
    # Compiling took more: the peak begins anew.
    pathlib.Path("/proc/self/clear_refs").write_text("5")
    before = read_status("VmRSS")
    form()
    return read_status("VmHWM") - before


def measure_resident(*arguments) -> float:
    """`call_once` in a process of its own: what others leave would hide some of it."""
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, spawn) as pool:
        return pool.submit(call_once, *arguments).result()


def read_clocks() -> np.ndarray:
    """Seconds, and seconds of all cores."""
    return np.array([time.perf_counter(), time.process_time()])


def compare(batches: list[int], width: int, share: float, repeats: int) -> None:
    """The table of time and memory."""
    title = (
        f"Loss and gradients, D={width}, {share:.0%} of the slots hold a pair; what "
        f"takes over {MOST} MiB, as dense above 16k, is compiled alone"
    )
    header = "slots | loss | form | s | time / dense | core-s / dense | "
    header += "MiB resident | of the public | MiB by the compiler"
    steps.table(title, header, [])
    for batch in batches:
        inputs = draw(batch, width, share)
        cases = {(k, n): build(k, n, inputs) for k, some in FORMS.items() for n in some}
        fit = {case: form for case, form in cases.items() if form.compiled() < MOST}
        rounds = repeats if batch <= 16384 else 1
        clocks = timing.interleave(fit, rounds, clock=read_clocks)
        for (kind, name), form in cases.items():
            line = [f"{batch}", kind, name, *"-----", f"{form.compiled():.0f}"]
            if (kind, name) in fit:
                resident = measure_resident(kind, name, batch, width, share)
                own, dense = clocks[kind, name].T, clocks.get((kind, "dense"))
                line[3], line[6] = f"{np.median(own[0]):.2f}", f"{resident:.0f}"
                if dense is not None:
                    line[4:6] = map(timing.ratio, own, dense.T)
                if batch in PUBLIC[kind]:
                    line[7] = f"1/{PUBLIC[kind][batch] / resident:.1f}"
            print(f"| {' | '.join(line)} |", flush=True)


def count_bytes(slots: int, width: int) -> None:
    """The tables of bytes: of other forms and precisions, and of half-full slots."""
    inputs = draw(DEVICES * slots, width)
    # Both modalities from 7 others, and their gradients back to them.
    both, lines, half = 4 * (DEVICES - 1) * slots * width * 4, [], []
    # Slots of the fullest device decide.
    filled = draw(DEVICES * slots, width, 0.5)[2].reshape(DEVICES, -1).sum(1).max()
    chunks = 16
    for kind in ("softmax", "sigmoid"):
        loss = getattr(contrastive, f"{kind}_loss")
        for dtype, grad_dtype in DTYPES:
            form = Form(loss, inputs, chunk=slots, dtype=dtype, grad_dtype=grad_dtype)
            sent = form.sent()
            lines.append(
                [kind, dtype, grad_dtype, f"{sent / 1e6:.1f}", f"{sent / both:.3f}"]
            )
        form = Form(loss, inputs, chunk=slots // chunks)
        some = -(-int(filled) * chunks // slots)
        full, less = form.sent(chunks), form.sent(some)
        cells = f"{chunks}", f"{some}", f"{full / 1e6:.1f}", f"{less / 1e6:.1f}"
        half.append([kind, *cells, f"{less / full:.3f}"])
    steps.table(
        f"Bytes a device sends, {DEVICES} devices, {slots} pairs each, D={width}",
        "loss | embeddings | gradients | MB | of gathering both in float32",
        lines,
    )
    steps.table(
        "Bytes a device sends in float32, where half of these slots hold a pair",
        "loss | chunks, full | half | MB, full | half | half / full",
        half,
    )


def show_errors(batch: int, width: int) -> None:
    """The table of half precision against float32."""
    inputs, lines = draw(batch, width), []
    chunk = min(CHUNK, batch // DEVICES)
    for kind in ("softmax", "sigmoid"):
        loss = getattr(contrastive, f"{kind}_loss")
        exact = None
        for dtype, grad_dtype in DTYPES:
            form = Form(loss, inputs, chunk=chunk, dtype=dtype, grad_dtype=grad_dtype)
            value, gradients = form()
            found = [np.asarray(x, np.float64) for x in (value, *gradients)]
            exact = found if exact is None else exact
            errors = [
                np.linalg.norm(x - y) / np.linalg.norm(y)
                for x, y in zip(found, exact, strict=True)
            ]
            cells = [f"{error:.1e}" for error in errors] + ["-"]
            lines.append([kind, dtype, grad_dtype, *cells[:5]])
    steps.table(
        f"Error against float32, norm / norm, {batch} pairs, D={width}",
        "loss | embeddings | gradients | value | d image | d text | d scale | d bias",
        lines,
    )


def main(_: list[str]) -> None:
    """Prints the tables."""
    tiny, repeats = TINY.value, 1 if TINY.value else REPEATS.value
    width = 16 if tiny else WIDTH
    count_bytes(32 if tiny else 512, 256 if tiny else width)
    show_errors(64 if tiny else 4096, width)
    batches = [64] if tiny else [4096, 8192, 16384, 32768, 65536]
    if not tiny:
        compare(batches, width, 1, repeats)
    compare(batches[:3], width, 0.5, repeats)


if __name__ == "__main__":
    app.run(main)
