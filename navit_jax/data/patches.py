"""Cuts an image into patches, puts them together again, and draws which ones are kept.

Shapes: h, w pixels of an image; n patches of it; P values of a patch (side * side * 3,
row-major, channels last).
"""

import functools

import numpy as np
from jaxtyping import Int, UInt8

from navit_jax.data.draws import GOLDEN, mix, mix_one


def patchify(
    image: UInt8[np.ndarray, "h w c"],
    patch: int,
    chosen: Int[np.ndarray, " n"] | None = None,
) -> tuple[UInt8[np.ndarray, "n P"], Int[np.ndarray, "n 2"]]:
    """Patches of an image, row by row, and the (row, column) of each.

    The sides of the image are multiples of `patch`: it was resized to a planned grid.

    Args:
      chosen: Numbers of the patches that are wanted; None: all.
    """
    h, w, channels = image.shape
    assert h % patch == 0 == w % patch, f"{h} x {w} is not a grid of patches of {patch}"
    rows, columns = h // patch, w // patch
    blocks = image.reshape(rows, patch, columns, patch, channels).swapaxes(1, 2)
    coords = _coords(rows, columns)
    if chosen is not None:
        coords = coords[chosen]
        blocks = blocks[coords[:, 0], coords[:, 1]]
    return blocks.reshape(len(coords), -1), coords


@functools.lru_cache(1024)
def _coords(rows: int, columns: int) -> Int[np.ndarray, "n 2"]:
    """The (row, column) of each patch of a grid."""
    coords = np.indices((rows, columns), np.int32).reshape(2, -1).T.copy()
    coords.flags.writeable = False
    return coords


def unpatchify(
    patches: UInt8[np.ndarray, "n P"],
    coords: Int[np.ndarray, "n 2"],
    grid: tuple[int, int],
    patch: int,
    fill: int = 255,
) -> UInt8[np.ndarray, "h w 3"]:
    """The image of some patches of a grid of (rows, columns); the others are `fill`."""
    rows, columns = grid
    blocks = np.full((rows, columns, patch, patch, 3), fill, np.uint8)
    blocks[coords[:, 0], coords[:, 1]] = patches.reshape(-1, patch, patch, 3)
    return blocks.swapaxes(1, 2).reshape(rows * patch, columns * patch, 3)


def keep_patches(num: int, kept: int, key: int) -> Int[np.ndarray, " n"]:
    """Which `kept` of `num` patches survive dropping, ascending.

    Every subset of that size is as likely as any other; it is a function of the 64-bit
    `key` alone. Patches are ordered by a hash of (key, place), splitmix64's finaliser
    (Steele, Lea and Flood 2014), and the first ones are kept.
    """
    assert 1 <= kept <= num, f"{kept} of {num} patches"
    # The key is hashed first: else near keys would give shifted draws.
    order = mix(np.arange(1, num + 1, dtype=np.uint64) * GOLDEN + mix_one(key))
    return np.sort(np.argpartition(order, kept - 1)[:kept])
