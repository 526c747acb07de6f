"""The fixed list of image sizes that speeds are measured on, equal on every machine.

Aspect log-uniform in [1/3, 3], side of the square of equal area uniform in [64, 256]
pixels, both sides rounded to whole patches: 115.7 tokens an image on average.
"""

import math
import random

import numpy as np

import navit_jax
from navit_jax.batch import PackedBatch


def grids(num: int = 256, low: int = 64, high: int = 256) -> np.ndarray:
    """(rows, columns) of patches of 16 of the first `num` images."""
    rng = random.Random(20240601)
    found = []
    for _ in range(num):
        aspect = math.exp(rng.uniform(-math.log(3.0), math.log(3.0)))
        side = rng.uniform(low, high)
        sides = side * math.sqrt(aspect), side / math.sqrt(aspect)
        found.append([max(1, round(pixels / 16)) for pixels in sides])
    return np.array(found)


def packed(num_rows: int, num_tokens: int, num_slots: int) -> PackedBatch:
    """Rows of images of the list (continued by its law), by the packer `auto`."""
    several = 4 * num_rows * num_tokens // 116
    shapes = grids(max(several, 256))
    lengths = shapes.prod(1)
    rows = navit_jax.assign_rows(lengths[:, None], [num_tokens], num_slots, "auto")
    # As a shuffled plan: rows that are typical of all, not the first to be opened.
    chosen = np.random.default_rng(0).permutation(rows.max() + 1)[:num_rows]
    assert len(chosen) == num_rows
    return fill([shapes[rows == row] for row in chosen], num_tokens, num_slots)


def alone(shapes: np.ndarray, num_tokens: int) -> PackedBatch:
    """One image a row, padded."""
    return fill([shape[None] for shape in shapes], num_tokens, 1)


def fill(rows: list[np.ndarray], num_tokens: int, num_slots: int) -> PackedBatch:
    """Random pixels and labels for rows of grids."""
    rng, B = np.random.default_rng(0), len(rows)
    batch = PackedBatch(
        patches=rng.integers(0, 256, (B, num_tokens, 768), np.uint8),
        coords=np.zeros((B, num_tokens, 2), np.int32),
        segment_ids=np.zeros((B, num_tokens), np.int32),
        grids=np.zeros((B, num_slots, 2), np.int32),
        image_mask=np.zeros((B, num_slots), bool),
        image_ids=np.zeros((B, num_slots, 2), np.uint32),
        targets={"labels": rng.integers(0, 1000, (B, num_slots, 1), np.int32)},
    )
    for row, images in enumerate(rows):
        start = 0
        for slot, (height, width) in enumerate(images):
            stop = start + height * width
            batch.segment_ids[row, start:stop] = slot + 1
            batch.coords[row, start:stop] = np.argwhere(np.ones((height, width)))
            batch.grids[row, slot] = height, width
            batch.image_mask[row, slot] = True
            start = stop
    return batch
