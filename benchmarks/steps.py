"""The trainer's own jitted step on given rows, for whoever times it."""

import sys
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from navit_jax import compile, experiment, sharding
from navit_jax.batch import PackedBatch
from navit_jax.models import attention, flops, sizes

Step = Callable[[], object]
# Attention that passes the values on costs next to nothing, and keeps every shape.
attention.IMPLEMENTATIONS["values"] = lambda q, k, v, ids: v + 0 * (q + k)


def config(size: str, batch: PackedBatch, micro: int, **model: Any) -> dict[str, Any]:
    """A run's config for a batch, in parts of `micro` rows."""
    rows, length = batch.segment_ids.shape
    assert rows % micro == 0, f"{rows} rows in parts of {micro}"
    return {
        "seed": 0,
        "steps": 1000,
        "data": {"rows": rows, "tokens": length, "slots": batch.grids.shape[1]},
        "model": {
            "name": "navit",
            "size": size,
            "positions": {"name": "factorized", "length": 64},
            **model,
        },
        "task": {"name": "classification"},
        "optim": {"name": "adamw", "lr": 1e-3, "schedule": {"name": "constant"}},
        "train": {"accumulate": rows // micro},
    }


def program(settings: dict[str, Any], batch: PackedBatch) -> compile.Program:
    """What the trainer compiles for a config."""
    task = experiment.build_task(settings, 1000)
    return compile.Program(settings, task, batch, jax.sharding.get_mesh())


def compiled(settings: dict[str, Any], batch: PackedBatch) -> jax.stages.Compiled:
    """The trainer's step, compiled for the batch."""
    built = program(settings, batch)
    run: Any = built.step()
    return run.lower(built.abstract, *_place(batch)).compile()


def step(
    settings: dict[str, Any], batch: PackedBatch, run: Callable[..., Any] | None = None
) -> Step:
    """Runs the trainer's step, or `run`, on the batch; waits for it each time."""
    return step_of(program(settings, batch), batch, run)


def step_of(
    built: compile.Program, batch: PackedBatch, run: Callable[..., Any] | None = None
) -> Step:
    """As `step`, of what is compiled for any config."""
    run, held, rows = run or built.step(), [built.first_state()], _place(batch)

    def call() -> None:
        held[0], metrics = run(held[0], *rows)
        jax.block_until_ready((held[0], metrics))

    return call


def _place(batch: PackedBatch) -> tuple[PackedBatch, jax.Array]:
    """The batch and the host's numbers beside it, on the devices."""
    signals = np.zeros((len(batch.patches), 4), np.int32)
    return sharding.place((batch, signals), jax.sharding.get_mesh())


def count(batch: PackedBatch) -> tuple[int, int]:
    """Images and tokens of a batch."""
    return int(batch.image_mask.sum()), int((batch.segment_ids > 0).sum())


def spec(settings: dict[str, Any]) -> sizes.Spec:
    """The shape of the encoder of a config."""
    model = settings["model"]
    changes = {name: model[name] for name in sizes.Spec._fields if name in model}
    return sizes.spec(model["size"])._replace(**changes)


def count_pairs(segment_ids: np.ndarray) -> int:
    """Pairs of tokens of one image, the sum of n^2, in rows [B L]."""
    return sum(int((np.bincount(row)[1:] ** 2).sum()) for row in segment_ids)


def useful_flops(settings: dict[str, Any], batch: PackedBatch) -> float:
    """Of one training step: blocks and patch embedding, of valid tokens only.

    What a model's pooling takes beside them, 1.2 % in Ti/16, is not counted.
    """
    images, tokens = count(batch)
    return flops.TRAINING * flops.forward_flops(
        tokens,
        count_pairs(batch.segment_ids),
        images,
        spec(settings),
        batch.patches.shape[-1],
        pooling="none",
    )


def table(title: str, header: str, lines: list[list[str]]) -> None:
    """Prints a Markdown table."""
    columns = header.count("|") + 1
    print(f"\n### {title}\n\n| {header} |\n|{'---|' * columns}")
    for line in lines:
        print(f"| {' | '.join(line)} |")
    sys.stdout.flush()
