"""What every host must know of all others, sent through the step as numbers of rows.

Each host gives numbers beside its rows, the step sums them over all rows, and every
host reads the same totals one step later: so all save, stop or fail at one step.

Shapes: B rows (of this host), S numbers of a row.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Int, Int32

from navit_jax.batch import BatchInfo

# Planned images, unusable ones, requests to stop; then five numbers a plan shard.
OWN, SHARD = 3, 5
# A count of images is sent in two halves: devices add 32-bit integers.
HALF = 1 << 24


class Totals(NamedTuple):
    """Sums over all hosts of one step.

    Attributes:
      planned: Images planned for the batch.
      skipped: Those that could not be used.
      stop: Whether some host was asked to stop.
      position: The place in the stream after the batch: [epoch, window, row] a shard.
      images_seen: Images planned up to and with the batch.
    """

    planned: int
    skipped: int
    stop: bool
    position: list[list[int]]
    images_seen: int


def encode(info: BatchInfo, stop: bool) -> Int32[np.ndarray, "B S"]:
    """The numbers of this host's rows; all in the first one."""
    numbers = np.zeros((len(info.keys), OWN + SHARD * len(info.position)), np.int32)
    own = [sum(map(len, info.keys)), len(info.skipped), int(stop)]
    for position, images in zip(info.position, info.images_seen, strict=True):
        # A shard is told of by the one host that has its first row.
        if position is None or images is None:
            own += [0] * SHARD
        else:
            own += [*position, *divmod(images, HALF)]
    numbers[0] = own
    return numbers


def decode(sums: Int[np.ndarray, " S"]) -> Totals:
    """The totals of the summed numbers."""
    planned, skipped, stop = sums[:OWN].tolist()
    shards = sums[OWN:].reshape(-1, SHARD).tolist()
    return Totals(
        planned=planned,
        skipped=skipped,
        stop=stop > 0,
        position=[shard[:3] for shard in shards],
        images_seen=sum(high * HALF + low for *_, high, low in shards),
    )
