"""Packed texts against padded ones: `python benchmarks/text_padding.py`.

The trainer's own step on a batch of a config (the embedded captions), its texts packed
beside their images, and the same texts each padded to 24 and to 64 tokens; in turn.
`--tiny` is for a test.
"""

import dataclasses

import jax
import numpy as np
import steps
import timing
from absl import app, flags
from ml_collections import config_flags

from navit_jax import compile, experiment, sharding
from navit_jax import config as config_lib
from navit_jax.batch import PackedBatch

CONFIG = config_flags.DEFINE_config_file(
    "config", "configs/contrastive_smoke.py", "Of a contrastive run"
)
TINY = flags.DEFINE_bool("tiny", False, "Small shapes, one repeat")
REPEATS = flags.DEFINE_integer("repeats", 15, "Timed rounds")
LENGTHS = (24, 64)


def pad(batch: PackedBatch, length: int) -> PackedBatch:
    """The same texts, that of slot i at i x length of its row."""
    targets, (B, N) = dict(batch.targets), batch.image_mask.shape
    ids = targets["text_segment_ids"]
    row, at = np.nonzero(ids)
    place = (ids[row, at] - 1) * length + targets["text_coords"][row, at, 0]
    for name in ("text_tokens", "text_coords", "text_segment_ids"):
        old = targets[name]
        new = np.zeros((B, N * length, *old.shape[2:]), old.dtype)
        new[row, place] = old[row, at]
        targets[name] = new
    return dataclasses.replace(batch, targets=targets)


def main(_: list[str]) -> None:
    """Prints the table."""
    config = config_lib.resolve(CONFIG.value)
    if TINY.value:
        config["model"] |= {"width": 32, "depth": 1, "num_heads": 2, "mlp": 32}
        config["task"]["text"] |= {"width": 32, "depth": 1, "num_heads": 2, "mlp": 32}
        config["data"]["rows"] = 2
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    with jax.set_mesh(mesh):
        stream = experiment.build_stream(config)
        rows = np.arange(config["data"]["rows"])
        packed = next(stream.batches(rows))[0]
        task = experiment.build_task(config, stream.num_classes)
        batches = {"packed": packed}
        batches |= {f"padded to {n}": pad(packed, n) for n in LENGTHS}
        calls = {}
        for name, batch in batches.items():
            program = compile.Program(config, task, batch, mesh)
            calls[name] = steps.step_of(program, batch)
        seconds = timing.interleave(calls, 1 if TINY.value else REPEATS.value)
    lines = []
    for name, batch in batches.items():
        ids = batch.targets["text_segment_ids"]
        lines.append(
            [
                name,
                str(ids.shape[1]),
                f"{(ids == 0).mean():.1%}",
                f"{1e3 * np.median(seconds[name]):.0f}",
                timing.ratio(seconds[name], seconds["packed"]),
            ]
        )
    tokens, width = packed.segment_ids.shape[1], packed.image_mask.shape[1]
    steps.table(
        f"Texts, {len(rows)} rows of {tokens} image tokens and {width} slots",
        "texts | text tokens a row | text padding | ms/step | over packed",
        lines,
    )


if __name__ == "__main__":
    app.run(main)
