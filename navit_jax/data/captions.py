"""How many tokens each caption of a source has, and which one an image brings.

Rows of image and text are planned from it. Letters: M images, K captions of one at
most, P pairs.
"""

import numpy as np
from jaxtyping import Float64, Int64, Integer, UInt16

from navit_jax.data import tables
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

    # Sources that read captions by name tell it; of others the fingerprint tells all.
    feature = getattr(source, "caption", "")
    lacking = "pictures have no caption of use"
    keys = (feature, tokenizer.fingerprint)
    kind = tables.Kind("captions", measure, lacking, VERSION, 1, keys)
    found = None if feature is None else tables.table(source, kind, threads)
    if found is None or not found.any():
        raise ConfigError(
            f"source {source.name} has no caption of use: name the feature that holds "
            "them (caption=...)"
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


def list_pairs(lengths: Integer[np.ndarray, "M K"]) -> Int64[np.ndarray, "P 2"]:
    """All pairs (image, caption) of use, as evaluation takes them, by image."""
    return np.argwhere(lengths > 0)
