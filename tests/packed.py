"""Small packed batches for tests: images as lists of patches, packed by a loop.

Shapes: B rows, L tokens a row, N image slots a row, P values a patch, n tokens.
"""

import dataclasses

import numpy as np

from navit_jax.batch import PackedBatch

L, N, P = 32, 4, 12


@dataclasses.dataclass(frozen=True)
class Image:
    id: int
    patches: np.ndarray
    coords: np.ndarray
    grid: tuple[int, int]


def image(id, grid, kept=None):
    """A random image [n P] of which `kept` patches are left, in order."""
    rng = np.random.default_rng(id)
    index = np.arange(grid[0] * grid[1])
    index = np.sort(rng.permutation(index)[:kept])
    coords = np.stack(np.divmod(index, grid[1]), -1).astype(np.int32)
    patches = rng.standard_normal((len(index), P)).astype(np.float32)
    return Image(id, patches, coords, grid)


def pack(rows):
    """Packs each list of images into a row, in order; what is padding is noise."""
    rng = np.random.default_rng(99)
    B = len(rows)
    patches = rng.standard_normal((B, L, P)).astype(np.float32)
    coords = rng.integers(0, 4, (B, L, 2)).astype(np.int32)
    segment_ids = np.zeros((B, L), np.int32)
    grids = np.zeros((B, N, 2), np.int32)
    image_ids = np.zeros((B, N, 2), np.uint32)
    for b, images in enumerate(rows):
        start = 0
        for slot, one in enumerate(images):
            end = start + len(one.patches)
            patches[b, start:end] = one.patches
            coords[b, start:end] = one.coords
            segment_ids[b, start:end] = slot + 1
            grids[b, slot] = one.grid
            image_ids[b, slot] = 0, one.id
            start = end
    return PackedBatch(
        patches=patches,
        coords=coords,
        segment_ids=segment_ids,
        grids=grids,
        image_mask=(grids > 0).all(-1),
        image_ids=image_ids,
        targets={},
    )
