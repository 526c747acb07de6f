"""Texts without pictures, packed several to a row, as evaluation and prediction do.

B rows, T text tokens a row, M texts.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int, Int32

from navit_jax.data.packers import assign_rows
from navit_jax.data.tokenizer import Tokenizer


class TextRows(NamedTuple):
    """Packed texts, in the arrays that a batch has beside its images.

    Attributes:
      tokens: Ids of the vocabulary; 0 at padding, and it may be one of them.
      coords: Of each token, its place in its own text.
      segment_ids: 1 + the slot of the text; 0 is padding. The texts of a row are in the
        order they were given.
      places: (row, slot) of each text; -1 where the tokenizer leaves it out.
    """

    tokens: Int32[np.ndarray, "B T"]
    coords: Int32[np.ndarray, "B T 1"]
    segment_ids: Int32[np.ndarray, "B T"]
    places: Int[np.ndarray, "M 2"]

    @property
    def known(self) -> Bool[np.ndarray, " M"]:
        """Whether the text is in a row."""
        return self.places[:, 0] >= 0


def pack_alone(
    texts: Sequence[str], tokenizer: Tokenizer, num_tokens: int, num_slots: int
) -> TextRows:
    """Packs texts without pictures, each whole in one row; of none there is no row.

    Args:
      num_tokens: T, at least the tokenizer's `length`.
      num_slots: Texts of a row at most.

    Raises:
      DataError: a row is shorter than a text.
    """
    encoded = [tokenizer.encode(text) for text in texts]
    lengths = np.array([len(ids) for ids in encoded], np.int64)
    known = np.flatnonzero(lengths)
    rows = assign_rows(lengths[known, None], [num_tokens], num_slots)
    shape = (int(rows.max(initial=-1)) + 1, num_tokens)
    tokens, segment_ids = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
    coords = np.zeros((*shape, 1), np.int32)
    places = np.full((len(texts), 2), -1)
    used, filled = np.zeros(shape[0], np.int64), np.zeros(shape[0], np.int64)
    for i, row in zip(known, rows, strict=True):
        start, slot, n = filled[row], used[row], lengths[i]
        tokens[row, start : start + n] = encoded[i]
        coords[row, start : start + n, 0] = np.arange(n)
        segment_ids[row, start : start + n] = slot + 1
        places[i] = row, slot
        filled[row] += n
        used[row] += 1
    return TextRows(tokens, coords, segment_ids, places)
