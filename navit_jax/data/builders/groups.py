"""Groups near-duplicates, and splits a set by group.

A card deck in train and test at once would let a model that remembers look like one
that recognises. Letters: M images.
"""

import hashlib

import numpy as np
from scipy.sparse import coo_array, csgraph

SPLITS = ("train", "validation", "test")
NUM_FOLDS = 5
MAX_DISTANCE = 2
# Of 300 salts, those whose parts are nearest to the whole in size and class shares:
# the few large groups (card decks) make an unlucky draw lopsided.
SPLIT_SALT, FOLD_SALT = "split50", "fold49"


def group_by_hash(hashes: list[int]) -> np.ndarray:
    """Puts images whose hashes differ in at most MAX_DISTANCE bits in one group.

    Transitive: a chain of near-duplicates is one group.

    Returns:
      int32 [M], the number of the first image of each one's group.
    """
    values = np.asarray(hashes, np.uint64)
    pairs = [
        (row, column)
        for row, value in enumerate(values)
        for column in np.flatnonzero(
            np.bitwise_count(values[row + 1 :] ^ value) <= MAX_DISTANCE
        )
        + row
        + 1
    ]
    rows, columns = np.asarray(pairs, np.int64).reshape(-1, 2).T
    graph = coo_array((np.ones(len(rows)), (rows, columns)), (len(values),) * 2)
    _, component = csgraph.connected_components(graph, directed=False)
    _, first, inverse = np.unique(component, return_index=True, return_inverse=True)
    return first[inverse].astype(np.int32)


def _draw(salt: str, group: str) -> float:
    """A number in [0, 1) that depends on the name of the group alone."""
    digest = hashlib.sha256(f"{salt}:{group}".encode()).digest()
    return int.from_bytes(digest[:6], "big") / 2**48


def split_of(group: str) -> str:
    """The split, 80/10/10, of the group whose first image is named `group`."""
    draw = _draw(SPLIT_SALT, group)
    return SPLITS[0] if draw < 0.8 else SPLITS[1] if draw < 0.9 else SPLITS[2]


def fold_of(group: str) -> int:
    """The fold, 0.. NUM_FOLDS - 1, whose test part holds the group."""
    return int(_draw(FOLD_SALT, group) * NUM_FOLDS)
