"""The contrastive losses against other forms: `python benchmarks/contrastive.py`.

Prints, of loss and all gradients over 8 CPU devices: time and memory by global batch,
bytes sent, and what half precision on the ring costs. Takes about 40 minutes on two
cores; `--tiny` is for a test.
"""

import functools
import os

os.environ["XLA_FLAGS"] = (
    f"--xla_force_host_platform_device_count=8 {os.environ.get('XLA_FLAGS', '')}"
)
os.environ["JAX_PLATFORMS"] = "cpu"

import collectives
import contrastive_forms as forms
import jax
import jax.numpy as jnp
import numpy as np
import steps
import timing
from absl import app, flags
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from navit_jax.losses import contrastive

TINY = flags.DEFINE_bool("tiny", False, "Small batches, one repeat")
REPEATS = flags.DEFINE_integer("repeats", 5, "Timed rounds up to 16k, fewer above")
DEVICES, WIDTH, CHUNK = 8, 512, 512
# A form that needs more is compiled, not run: the machine may not have it.
MOST_MB = 6000
# MB beyond the embeddings: open_clip's ClipLoss, one device, D=512, torch 2.13.
PUBLIC = {8192: 1297, 16384: 4219}
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

    def megabytes(self) -> float:
        """Temporaries and gradients of all devices."""
        memory = self.program.memory_analysis()
        return DEVICES * (memory.temp_size_in_bytes + memory.output_size_in_bytes) / 1e6

    def sent(self, chunks: int = 1) -> int:
        """Bytes a device sends, where so many chunks of a device are filled."""
        found = collectives.read(self.program.as_text(), chunks)
        return sum(c.size * c.times for c in found)


def build(inputs) -> dict[str, Form]:
    """All forms for a batch."""
    chunk = min(CHUNK, len(inputs[0]) // DEVICES)
    return {
        "ring": Form(contrastive.softmax_loss, inputs, chunk=chunk),
        "ring, sigmoid": Form(contrastive.sigmoid_loss, inputs, chunk=chunk),
        "gather, chunks": Form(forms.gather_chunks, inputs, chunk=chunk),
        "ring of blocks, sigmoid": Form(forms.sigmoid_blocks, inputs),
        "dense": Form(forms.dense, inputs),
        "gather both": Form(forms.gather_both, inputs),
    }


def compare(batches: list[int], width: int, share: float, repeats: int) -> None:
    """The table of time and memory."""
    title = f"Loss and gradients, D={width}, {share:.0%} of the slots hold a pair"
    header = "slots | form | s | time / dense | MB beyond embeddings | of the public"
    steps.table(title, header, [])
    for batch in batches:
        cases = build(draw(batch, width, share))
        fit = {name: form for name, form in cases.items() if form.megabytes() < MOST_MB}
        seconds = timing.interleave(fit, repeats if batch <= 16384 else 1)
        for name, form in cases.items():
            line = [f"{batch}", name, "-", "-", f"{form.megabytes():.0f}", "-"]
            if name in fit:
                line[2] = f"{np.median(seconds[name]):.2f}"
            if name in fit and "dense" in fit:
                line[3] = timing.ratio(seconds[name], seconds["dense"])
            if batch in PUBLIC:
                line[5] = f"1/{PUBLIC[batch] / form.megabytes():.1f}"
            print(f"| {' | '.join(line)} |", flush=True)


def count_bytes(slots: int, width: int) -> None:
    """The table of bytes."""
    inputs = draw(DEVICES * slots, width)
    # Both modalities from 7 others, and their gradients back to them.
    both, lines = 4 * (DEVICES - 1) * slots * width * 4, []
    for kind in ("softmax", "sigmoid"):
        for dtype, grad_dtype in DTYPES:
            loss = getattr(contrastive, f"{kind}_loss")
            form = Form(loss, inputs, chunk=slots, dtype=dtype, grad_dtype=grad_dtype)
            sent = form.sent()
            lines.append(
                [kind, dtype, grad_dtype, f"{sent / 1e6:.1f}", f"{sent / both:.3f}"]
            )
    steps.table(
        f"Bytes a device sends, {DEVICES} devices, {slots} pairs each, D={width}",
        "loss | embeddings | gradients | MB | of gathering both in float32",
        lines,
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
    compare(batches, width, 1, repeats)
    compare(batches[:3], width, 0.5, repeats)


if __name__ == "__main__":
    app.run(main)
