"""Names the images of a step whose loss or gradient was not finite."""

import itertools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from absl import logging
from etils import epath

from navit_jax import isolation
from navit_jax.batch import BatchInfo, PackedBatch


def find(
    judge: Callable[[PackedBatch], Any], host: PackedBatch, info: BatchInfo
) -> list[str]:
    """The images of this process whose loss is not finite alone, by name.

    All processes must call it together.

    Args:
      judge: The loss of each image, or token, of a host batch; all processes compute
        it together, each gets that of its own rows.
    """
    calls = itertools.count()

    def counted(batch: PackedBatch) -> Any:
        next(calls)
        return judge(batch)

    found = isolation.find_nonfinite(counted, host)
    # The rows at once, then as many times the images of one slot as there are slots:
    # who has fewer to try runs along with the others.
    most = 1 + host.image_mask.shape[1]
    for _ in range(next(calls), most if jax.process_count() > 1 else 0):
        judge(host)
    same = [(host.image_ids == image).all(-1) & host.image_mask for image in found]
    places = np.argwhere(np.any(same, 0)) if same else ()
    return [info.keys[row][slot] for row, slot in places]


def report(
    workdir: epath.Path,
    step: int,
    culprits: list[str],
    info: BatchInfo,
    metrics: dict[str, Any],
) -> epath.Path:
    """Writes the names of a step's images, the culprits first; returns the file."""
    names = [name for row in info.keys for name in row]
    process = f"_{jax.process_index()}" if jax.process_count() > 1 else ""
    path = workdir / f"nonfinite_step_{step}{process}.txt"
    lines = [f"alone not finite: {name}" for name in culprits] + names
    path.write_text("\n".join(lines) + "\n")
    logging.error(
        "step %d is not finite (loss %s, gradient %s) and changed nothing: %s; "
        "its %d images are named in %s",
        step, metrics["loss"], metrics["gradient_norm"],
        f"by {', '.join(culprits)}" if culprits else "no image alone has that loss",
        len(names), path,
    )  # fmt: skip
    return path
