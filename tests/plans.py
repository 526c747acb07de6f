"""Small plans over invented size tables, for the tests of planning."""

import numpy as np

from navit_jax.data import resolution, token_drop
from navit_jax.data.plan import Plan


def table(num_images, seed=0):
    rng = np.random.default_rng(seed)
    side, aspect = rng.uniform(50, 500, num_images), rng.normal(0, 0.35, num_images)
    shape = [side * np.exp(aspect / 2), side * np.exp(-aspect / 2)]
    return np.stack(shape, 1).astype(np.uint16)


def make_plan(sizes=(700,), **changes):
    arguments = {
        "tables": [table(size, i) for i, size in enumerate(sizes)],
        "weights": [1.0] * len(sizes),
        "seed": 3,
        "patch": 16,
        "tokens": 64,
        "slots": 8,
        "rows": 12,
        "window": 256,
        "resolution": resolution.Uniform(32, 128),
        "token_drop": token_drop.Constant(0.5),
    }
    return Plan(**(arguments | changes))


def images(rows):
    """(source, index) of all images of some rows."""
    return [
        (int(s), int(i))
        for row in rows
        for s, i in zip(row.source, row.index, strict=True)
    ]


def all_rows(batches, numbers):
    return [row for k in numbers for row in batches.rows(k)]


def same(row, other):
    return all(np.array_equal(a, b) for a, b in zip(row, other, strict=True))
