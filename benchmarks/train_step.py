"""The training step: packed against plain: `python benchmarks/train_step.py`.

Times whole steps (forward, backward, AdamW) of the trainer's own jitted step on the
fixed list of sizes, alternatives in turn, and prints ratios of one run: images/s of
packed rows over the same model on squares of 224 and over one padded image a row; time
per token of long rows over short; of S over Ti; where the time goes; and what other
choices than the default (what a block keeps for the backward pass, tokens of a part,
unrolled blocks) cost and save. `--remat` makes a choice for the other tables, and
`--micro`, `--attention` (`values` is none) and `--devices` make one for the first;
`--clock=core` counts core-seconds, which other work on the machine changes little.
`--tiny` is for a test.
"""

import time
from collections.abc import Callable
from typing import Any

import fixed_list
import jax
import numpy as np
import steps
import timing
from absl import app, flags

from navit_jax import sharding
from navit_jax.batch import PackedBatch
from navit_jax.models import flops, sizes

TINY = flags.DEFINE_bool("tiny", False, "Small shapes, one repeat")
REPEATS = flags.DEFINE_integer("repeats", 9, "Timed rounds")
PARTS = flags.DEFINE_list("parts", ["plain", "rows", "sizes", "where", "choices"], "")
REMAT = flags.DEFINE_string("remat", "light", "What blocks keep, but in choices")
# Parts of about 2,000 tokens are the best of packed, padded and plain rows: larger ones
# leave the caches, smaller ones pay more often for summing gradients.
MICRO = flags.DEFINE_integer("micro", 2, "Packed rows of 1024 in a part, against plain")
ATTENTION = flags.DEFINE_string("attention", "", "Of all, against plain; or each's own")
CLOCK = flags.DEFINE_enum("clock", "wall", ["wall", "core"], "core: of all threads")
DEVICES = flags.DEFINE_integer("devices", 1, "That share the cores of a CPU, and rows")


def config(size: str, batch: PackedBatch, micro: int, **model: Any) -> dict[str, Any]:
    """As `steps.config`, as the flags say."""
    tiny = {"depth": 1, "width": 64, "num_heads": 2, "mlp": 64} if TINY.value else {}
    return steps.config(size, batch, micro, **{"remat": REMAT.value} | tiny | model)


def interleave(
    calls: dict[Any, steps.Step], repeats: int, settle: bool = False
) -> dict[Any, np.ndarray]:
    """As `timing.interleave`, by the clock that was chosen."""
    clock = time.process_time if CLOCK.value == "core" else time.perf_counter
    return timing.interleave(calls, repeats, settle, clock)


def compare_plain(repeats: int) -> None:
    """Packed rows against squares of 224, and against one padded image a row."""
    lines = []
    num = 32 if TINY.value else 96
    for size in ("Ti/16", "S/16"):
        squares = np.full((num, 2), 14)
        packed = fixed_list.packed(num_rows=num // 8, num_tokens=1024, num_slots=24)
        single = fixed_list.alone(fixed_list.grids(num), num_tokens=272)
        plain = fixed_list.alone(squares, num_tokens=196)
        cases = {
            # A square a row has nothing to skip: dense is the plain model's best.
            "plain ViT, 224": (plain, 8, "dense"),
            "one padded image a row": (single, 8, "auto"),
            "packed, rows of 1024": (packed, MICRO.value, "auto"),
        }
        calls = {
            name: steps.step(
                config(
                    size,
                    batch,
                    micro * DEVICES.value,
                    attention=ATTENTION.value or own,
                ),
                batch,
            )
            for name, (batch, micro, own) in cases.items()
        }
        seconds = interleave(calls, repeats)
        images, tokens = (
            {
                name: steps.count(batch)[i] / seconds[name]
                for name, (batch, *_) in cases.items()
            }
            for i in (0, 1)
        )
        for name in cases:
            best = images["packed, rows of 1024"], tokens["packed, rows of 1024"]
            lines.append(
                [
                    size,
                    name,
                    f"{np.median(images[name]):.1f}",
                    f"{np.median(tokens[name]):,.0f}",
                    timing.ratio(best[0], images[name]),
                    timing.ratio(best[1], tokens[name]),
                ]
            )
    steps.table(
        "Packed against plain",
        "size | rows | images/s | tokens/s | packed / it by images | by tokens",
        lines,
    )


def compare_rows(repeats: int) -> None:
    """Time per token of rows of 4096 over rows of 1024, equal tokens."""
    lines = []
    for size in ("Ti/16", "S/16"):
        calls, tokens = {}, {}
        for length, rows, micro in ((1024, 8, 4), (4096, 2, 1)):
            batch = fixed_list.packed(rows, length, length // 64)
            calls[length] = steps.step(config(size, batch, micro), batch)
            tokens[length] = steps.count(batch)[1]
        seconds = interleave(calls, repeats, settle=True)
        times = {n: seconds[n] / tokens[n] for n in calls}
        cells = [f"{1e6 * np.median(times[n]):.1f}" for n in calls]
        lines.append([size, *cells, timing.ratio(times[4096], times[1024])])
    steps.table("Long rows", "size | L=1024 us/token | L=4096 us/token | ratio", lines)


def compare_sizes(repeats: int) -> None:
    """Time per token of S/16 over Ti/16, and the rate of each."""
    batch = fixed_list.packed(4, 1024, 24)
    cases = {size: config(size, batch, 2) for size in ("Ti/16", "S/16")}
    calls = {size: steps.step(settings, batch) for size, settings in cases.items()}
    seconds = interleave(calls, repeats)
    lines = []
    for size in cases:
        rate = steps.useful_flops(cases[size], batch) / seconds[size]
        lines.append(
            [
                size,
                f"{1e6 * np.median(seconds[size]) / steps.count(batch)[1]:.1f}",
                f"{np.median(rate) / 1e9:.0f}",
                timing.ratio(seconds[size], seconds["Ti/16"]),
            ]
        )
    steps.table("Sizes", "size | us/token | useful GFLOP/s | time over Ti/16", lines)


def break_down(repeats: int) -> None:
    """Time of the step, of it without attention, and of its matrix products alone."""
    lines = []
    batch = fixed_list.packed(4, 1024, 24)
    for size in ("Ti/16", "S/16"):
        settings = config(size, batch, 2)
        spec = steps.spec(settings)
        without = config(size, batch, 2, attention="values")
        cases = {
            "whole": steps.step(settings, batch),
            "without": steps.step(without, batch),
            "products": products(spec, 2048),
        }
        seconds = interleave(cases, repeats)
        parts = {name: float(np.median(values)) for name, values in seconds.items()}
        parts["products"] *= 2  # two micro-batches
        work = flops.TRAINING * flops.forward_flops(4096, 0, 0, spec, 768, "none")
        lines.append(
            [
                size,
                f"{parts['whole']:.2f}",
                *(
                    f"{share / parts['whole']:.0%}"
                    for share in (
                        parts["products"],
                        parts["whole"] - parts["without"],
                        parts["without"] - parts["products"],
                    )
                ),
                f"{work / parts['products'] / 1e9:.0f}",
            ]
        )
    steps.table(
        "Where the time goes",
        "size | s/step | products | attention | the rest | GFLOP/s of products",
        lines,
    )


def compare_choices(repeats: int) -> None:
    """Time and memory of the step by what can be chosen, one at a time."""
    lines = []
    batch = fixed_list.packed(4, 1024, 24)
    for size in ("Ti/16",) if TINY.value else ("Ti/16", "S/16"):
        default = "light, scanned, parts of 2,048 tokens"
        cases = {default: config(size, batch, 2, remat="light")}
        for remat in ("none", "full"):
            cases[f"remat {remat}"] = config(size, batch, 2, remat=remat)
        cases["unrolled"] = config(size, batch, 2, remat="light", scan=False)
        for micro in (1, 4):
            cases[f"parts of {1024 * micro:,}"] = config(
                size, batch, micro, remat="light"
            )
        runs = {name: steps.compiled(cases[name], batch) for name in cases}
        calls = {name: steps.step(cases[name], batch, runs[name]) for name in cases}
        seconds = interleave(calls, repeats)
        for name, run in runs.items():
            memory = run.memory_analysis()
            assert memory is not None, "this backend does not tell"
            lines.append(
                [
                    size,
                    name,
                    f"{np.median(seconds[name]):.2f}",
                    timing.ratio(seconds[name], seconds[default]),
                    f"{memory.temp_size_in_bytes / 1e6:.0f}",
                ]
            )
    steps.table(
        "Choices",
        "size | choice | s/step | over the first | temporaries MB",
        lines,
    )


def products(spec: sizes.Spec, tokens: int) -> steps.Step:
    """The matrix products of a step's blocks and patch embedding, and nothing else."""
    D, F = spec.width, spec.mlp
    shapes = [(D, D)] * 4 + [(D, F), (F, D)]
    keys = jax.random.split(jax.random.key(0), 3)
    x = {n: jax.random.normal(keys[0], (tokens, n)) for n in (D, F, 768)}

    def three(n: int, m: int) -> Callable[..., tuple[jax.Array, ...]]:
        def run(x, w, g):
            return x @ w, g @ w.T, x.T @ g

        return jax.jit(run)

    calls = [
        (three(n, m), x[n], jax.random.normal(keys[1], (n, m)), x[m], times)
        for (n, m), times in [*((s, spec.depth) for s in shapes), ((768, D), 1)]
    ]

    def call() -> None:
        for run, left, weight, grad, times in calls:
            for _ in range(times):
                jax.block_until_ready(run(left, weight, grad))

    return call


def main(_: list[str]) -> None:
    """Prints the tables that were asked for."""
    if DEVICES.value > 1:
        jax.config.update("jax_num_cpu_devices", DEVICES.value)
    with jax.set_mesh(sharding.make_mesh(devices=jax.devices()[: DEVICES.value])):
        parts = {
            "plain": compare_plain,
            "rows": compare_rows,
            "sizes": compare_sizes,
            "where": break_down,
            "choices": compare_choices,
        }
        for name in PARTS.value:
            parts[name](1 if TINY.value else REPEATS.value)


if __name__ == "__main__":
    app.run(main)
