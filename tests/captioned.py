"""Batches with texts, built by hand: captions as lists of ids, packed by a loop.

Shapes: B rows, N image slots a row, T text tokens a row.
"""

import numpy as np

T, LENGTH, VOCABULARY = 20, 7, 29


def caption(id, num_tokens):
    """Random ids [n], 0 among them."""
    rng = np.random.default_rng(1000 + id)
    return rng.integers(0, VOCABULARY, num_tokens).astype(np.int32)


def pack_texts(rows, width=T):
    """The three leaves of rows of captions, each in its slot; None is a slot without.

    What is padding is noise.
    """
    rng = np.random.default_rng(98)
    tokens = rng.integers(0, VOCABULARY, (len(rows), width)).astype(np.int32)
    coords = rng.integers(0, LENGTH, (len(rows), width, 1)).astype(np.int32)
    segment_ids = np.zeros((len(rows), width), np.int32)
    for b, captions in enumerate(rows):
        start = 0
        for slot, ids in enumerate(captions):
            if ids is None:
                continue
            end = start + len(ids)
            tokens[b, start:end] = ids
            coords[b, start:end, 0] = np.arange(len(ids))
            segment_ids[b, start:end] = slot + 1
            start = end
    return {
        "text_tokens": tokens,
        "text_coords": coords,
        "text_segment_ids": segment_ids,
    }


def with_texts(batch, rows, width=T):
    """The batch of images, and captions for its slots."""
    return batch.replace(targets={**batch.targets, **pack_texts(rows, width)})
