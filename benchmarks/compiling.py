"""Compile times of the training step: `python benchmarks/compiling.py`.

Scanned against unrolled blocks, 12 and 24 of them, in turn; and the first step of a
process without and with the compilation cache. `--tiny` is for a test.
"""

import os
import subprocess
import sys
import tempfile
import time

import fixed_list
import jax
import jax.numpy as jnp
import numpy as np
import steps
from absl import app, flags

from navit_jax import sharding

TINY = flags.DEFINE_bool("tiny", False, "Small shapes, one repeat")
REPEATS = flags.DEFINE_integer("repeats", 3, "Timed rounds")
START = flags.DEFINE_bool("start", False, "Only compile and run one step, and time it")


def compare_compiling(tiny: bool, repeats: int) -> None:
    """Seconds to trace and compile a step, of scanned and of unrolled blocks."""
    batch = fixed_list.packed(1, 512 if tiny else 1024, 24)
    seconds: dict[tuple[int, bool], list[float]] = {}
    for _ in range(1 if tiny else min(repeats, 3)):
        for depth in (1, 2) if tiny else (12, 24):
            for scan in (True, False):
                settings = steps.config("Ti/16", batch, 1, depth=depth, scan=scan)
                built = steps.program(settings, batch)
                ids = jax.ShapeDtypeStruct((len(batch.patches), 4), jnp.int32)
                start = time.perf_counter()
                built.step().lower(built.abstract, batch, ids).compile()
                taken = time.perf_counter() - start
                seconds.setdefault((depth, scan), []).append(taken)
                jax.clear_caches()
    median = {case: float(np.median(values)) for case, values in seconds.items()}
    shallow, deep = sorted({depth for depth, _ in median})
    steps.table(
        "Compiling",
        "depth | scanned s | unrolled s | scanned / unrolled",
        [
            [
                str(depth),
                f"{median[depth, True]:.1f}",
                f"{median[depth, False]:.1f}",
                f"{median[depth, True] / median[depth, False]:.2f}",
            ]
            for depth in (shallow, deep)
        ],
    )
    growth = median[deep, True] / median[shallow, True] - 1
    print(f"\nScanned, from {shallow} to {deep} blocks: {growth:+.0%}")


def compare_starts(tiny: bool) -> None:
    """Seconds to the end of the first step of a process, without and with the cache."""
    with tempfile.TemporaryDirectory() as folder:
        cache = {**os.environ, "JAX_COMPILATION_CACHE_DIR": folder}
        command = [sys.executable, __file__, "--start", *(["--tiny"] if tiny else [])]
        both = [
            float(
                subprocess.run(
                    command, env=cache, check=True, capture_output=True, text=True
                ).stdout.split()[-1]
            )
            for _ in range(2)
        ]
    print(f"First step of a process {both[0]:.1f} s, with a full cache {both[1]:.1f} s")


def start(tiny: bool) -> None:
    """Prints the seconds from here to the end of the first step."""
    begun = time.perf_counter()
    batch = fixed_list.packed(1, 512 if tiny else 1024, 24)
    steps.step(
        steps.config("Ti/16", batch, 1, **({"depth": 1} if tiny else {})), batch
    )()
    print(time.perf_counter() - begun)


def main(_: list[str]) -> None:
    """Prints the table and the times of starts."""
    with jax.set_mesh(sharding.make_mesh(devices=jax.devices()[:1])):
        if START.value:
            start(TINY.value)
            return
        compare_compiling(TINY.value, 1 if TINY.value else REPEATS.value)
        compare_starts(TINY.value)


if __name__ == "__main__":
    app.run(main)
