"""How many tokens each caption of a source has, and which one an image brings.

Rows of image and text are planned from it. Letters: M images, K captions of one at
most.
"""

from collections.abc import Sequence

import numpy as np
from absl import logging
from jaxtyping import Float64, Int64, Integer, UInt16

from navit_jax.data import tables
from navit_jax.data.folders import Captions, Folder
from navit_jax.data.padded import Padded
from navit_jax.data.records import Record, Selection, StoredSource
from navit_jax.data.tokenizer import Tokenizer
from navit_jax.errors import ConfigError, DataError

# Raise it when a record gives other captions for the same bytes.
VERSION = 1
# The table is as wide as the record that has most.
MOST = 1024


def caption_lengths(
    source: StoredSource, tokenizer: Tokenizer, threads: int = 16
) -> UInt16[np.ndarray, "M K"]:
    """The number of tokens of every caption of every record; see `tables.table`.

    0 where a record has no such caption, where the tokenizer leaves it out, and where
    the bytes cannot be had. A table for each tokenizer is kept.

    Raises:
      ConfigError: no caption of the source can be used.
      DataError: a record has more than MOST captions, or breaks its contract.
    """
    if isinstance(source, Padded):
        return caption_lengths(source.whole, tokenizer, threads)
    if isinstance(source, Selection):
        return caption_lengths(source.whole, tokenizer, threads)[source.indices]

    def measure(record: Record) -> list[int]:
        if len(record.captions) > MOST:
            raise DataError(
                f"{record.key} has {len(record.captions)} captions: {MOST} at most"
            )
        return [len(tokenizer.encode(caption)) for caption in record.captions]

    # Sources that take captions by name, or from a file, tell which.
    feature = getattr(source, "caption", "")
    lacking = "pictures have no caption of use"
    keys = (feature, tokenizer.fingerprint)
    kind = tables.Kind("captions", measure, lacking, VERSION, 1, keys)
    stored = Captions(source) if isinstance(source, Folder) else source
    found = None if feature is None else tables.table(stored, kind, threads)
    if found is None or not found.any():
        raise ConfigError(
            f"source {source.name} has no caption of use: name the feature that holds "
            "them (caption=...), or the file of a folder's (captions=...)"
        )
    return found


def choose(
    u: Float64[np.ndarray, " M"], lengths: Integer[np.ndarray, "M K"]
) -> Int64[np.ndarray, " M"]:
    """Which caption each image brings in an epoch: each of use is equally likely.

    Args:
      u: In [0, 1), by `draws.uniform` of (seed, epoch, index, "caption").
      lengths: Rows of `caption_lengths`.

    Returns:
      Places in `Record.captions`; -1 for an image without a caption of use.
    """
    of_use = lengths > 0
    wanted = (u * of_use.sum(1)).astype(np.int64)
    place = (of_use.cumsum(1) <= wanted[:, None]).sum(1)
    return np.where(of_use.any(1), place, -1)


def draw_captions(
    tables: Sequence[np.ndarray],
    source: Int64[np.ndarray, " M"],
    index: Int64[np.ndarray, " M"],
    u: Float64[np.ndarray, " M"],
) -> tuple[Int64[np.ndarray, " M"], Int64[np.ndarray, " M"]]:
    """Which caption each image of some sources brings, and how many tokens it has.

    Args:
      tables: `caption_lengths` of each source; none: -1 and 0 for every image.
      source, index: Of the images.
      u: As of `choose`; 0 gives the first caption of use.
    """
    caption, text = np.full(len(u), -1), np.zeros(len(u), np.int64)
    for i, table in enumerate(tables):
        of_it = source == i
        lengths = np.asarray(table[index[of_it]])
        caption[of_it] = chosen = choose(u[of_it], lengths)
        # The last is 0 too where none is of use.
        text[of_it] = np.take_along_axis(lengths, chosen[:, None], 1)[:, 0]
    return caption, text


def leave_out(
    source: StoredSource, lengths: UInt16[np.ndarray, "M K"]
) -> tuple[StoredSource, UInt16[np.ndarray, "_ K"]]:
    """The images that have a caption of use, and their table; logs who is left out."""
    of_use = lengths.any(1)
    if of_use.all():
        return source, lengths
    indices = np.flatnonzero(of_use).astype(np.int32)
    logging.warning(
        "%s: %d of %d images have no caption of use and are left out",
        source.name, len(source) - len(indices), len(source),
    )  # fmt: skip
    groups = getattr(source, "groups", None)
    original_sizes = getattr(source, "original_sizes", None)
    selection = Selection(
        source,
        indices,
        None if groups is None else groups[indices],
        None if original_sizes is None else original_sizes[indices],
    )
    return selection, lengths[indices]
