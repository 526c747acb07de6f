"""Retrieval: whether a picture finds its captions, and a caption its pictures.

Captions that are equal but for case and blanks are one text: it stands once among what
a picture is to find, and finds every picture that has it. Ties are no luck: a query
among equal scores counts by the chance that a draw among them is right.

M images, U texts, P pairs (image, text), E embedding width, Q queries, G gallery,
K depths.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Float64, Integer

from navit_jax.data.tokenizer import clean
from navit_jax.metrics import interval_by_group

# R@k: a right one is among the first k.
DEPTHS = (1, 5, 10)
# Rows of the scores that exist at once.
CHUNK = 512
# Cosines nearer than this are equal: what is packed beside an image, and the shape of a
# product, change the last digits.
TIE = 1e-6


class Pairs(NamedTuple):
    """Which images have which texts.

    Attributes:
      texts: Distinct, as they were first spelled.
      pairs: [P 2] (image, text), one for each caption, by image: all captions of an
        image are asked for, as of COCO's five.
    """

    texts: list[str]
    pairs: Integer[np.ndarray, "P 2"]


def list_pairs(captions: Sequence[Sequence[str]]) -> Pairs:
    """Numbers the texts of the images' captions; one that says nothing is none."""
    numbers: dict[str, int] = {}
    texts: list[str] = []
    pairs = []
    for image, own in enumerate(captions):
        for text in filter(None, map(clean, own)):
            number = numbers.setdefault(text.casefold(), len(texts))
            if number == len(texts):
                texts.append(text)
            pairs.append((image, number))
    return Pairs(texts, np.array(pairs, np.int64).reshape(-1, 2))


def restrict(
    pairs: Integer[np.ndarray, "P 2"], images: Integer[np.ndarray, " M"]
) -> tuple[
    Integer[np.ndarray, " m"], Integer[np.ndarray, " U"], Integer[np.ndarray, "p 2"]
]:
    """The pairs of some images alone.

    Returns:
      Places in `images` of those that have a text, the texts they have, and the pairs,
      numbered by these two.
    """
    place = np.full(max(pairs.max(initial=-1), images.max(initial=-1)) + 1, -1)
    place[images] = np.arange(len(images))
    own = pairs[place[pairs[:, 0]] >= 0]
    used, image = np.unique(place[own[:, 0]], return_inverse=True)
    texts, text = np.unique(own[:, 1], return_inverse=True)
    return used, texts, np.stack([image, text], 1)


def hits(
    queries: Float[np.ndarray, "Q E"],
    gallery: Float[np.ndarray, "G E"],
    right: Integer[np.ndarray, "P 2"],
    depths: Sequence[int] = DEPTHS,
) -> Float64[np.ndarray, "Q K"]:
    """The chance that a right one is among the first k by inner product.

    It is 0 or 1 but where ties decide. A score that is no number is ahead of all.

    Args:
      right: (query, place in the gallery); each query has at least one.
    """
    found = np.zeros((len(queries), len(depths)))
    order = np.argsort(right[:, 0], kind="stable")
    ends = np.searchsorted(right[order, 0], np.arange(len(queries) + 1))
    for start in range(0, len(queries), CHUNK):
        scores = queries[start : start + CHUNK] @ gallery.T
        own = right[order[ends[start] : ends[start + len(scores)]]]
        is_right = np.zeros(scores.shape, bool)
        is_right[own[:, 0] - start, own[:, 1]] = True
        best = np.where(is_right, scores, -np.inf).max(1, keepdims=True)
        ahead = (~is_right & ~(scores <= best + TIE)).sum(1)
        tied = np.abs(scores - best) <= TIE
        for k, depth in enumerate(depths):
            found[start : start + len(scores), k] = draw(
                tied.sum(1), (tied & is_right).sum(1), depth - ahead
            )
    return found


def draw(
    total: Integer[np.ndarray, " Q"],
    right: Integer[np.ndarray, " Q"],
    num: Integer[np.ndarray, " Q"] | int,
) -> Float64[np.ndarray, " Q"]:
    """The chance that `num` drawn of `total` without replacement hold a right one."""
    miss = np.ones(len(total))
    for i in range(int(np.max(num, initial=0))):
        wrong = np.maximum(total - right - i, 0) / np.maximum(total - i, 1)
        miss *= np.where(i < num, wrong, 1)
    return np.where(right > 0, 1 - miss, 0)


def recall(
    images: Float[np.ndarray, "M E"],
    texts: Float[np.ndarray, "U E"],
    pairs: Integer[np.ndarray, "P 2"],
    groups: Integer[np.ndarray, " M"] | None = None,
) -> dict[str, float]:
    """`image_to_text_r<k>` by image, and `text_to_image_r<k>` by caption.

    An image is right if any of its captions is among the first k.

    Args:
      pairs: Each image and each text is in one at least.
      groups: Near-duplicates; with them `_low` and `_high`, the 95 % interval.
    """
    by_image = hits(images, texts, pairs)
    by_caption = hits(texts, images, pairs[:, ::-1])[pairs[:, 1]]
    values = _means(by_image, by_caption)
    if groups is not None:
        for name, terms, own in (
            ("image_to_text", by_image, groups),
            ("text_to_image", by_caption, groups[pairs[:, 0]]),
        ):
            for depth, term in zip(DEPTHS, terms.T, strict=True):
                low, high = interval_by_group(term, np.ones(len(term)), own)
                values[f"{name}_r{depth}_low"] = low
                values[f"{name}_r{depth}_high"] = high
    return values


def chance(pairs: Integer[np.ndarray, "P 2"]) -> dict[str, float]:
    """What a random order of the texts, and of the images, gives on average, exactly.

    Equal captions move together, as for any model.
    """
    return oracle(pairs, np.zeros(pairs[:, 0].max() + 1, int))


def oracle(
    pairs: Integer[np.ndarray, "P 2"], categories: Integer[np.ndarray, " M"]
) -> dict[str, float]:
    """What knowing the category of each image alone gives on average, exactly.

    Those of the query's category come first, in random order: the texts that any of its
    images has, and the images. A caption is asked in the category of its own image.
    """
    num_texts = pairs[:, 1].max() + 1
    once = np.unique(pairs, axis=0)
    # A cell is a text of a category, with the images of the category that have it.
    cells, sizes = np.unique(
        categories[once[:, 0]] * num_texts + once[:, 1], return_counts=True
    )
    texts_of, images_of = np.bincount(cells // num_texts), np.bincount(categories)
    own = categories[pairs[:, 0]]
    same = sizes[np.searchsorted(cells, own * num_texts + pairs[:, 1])]
    right = np.bincount(once[:, 0])
    by_image = [draw(texts_of[categories], right, k) for k in DEPTHS]
    by_caption = [draw(images_of[own], same, k) for k in DEPTHS]
    return _means(np.stack(by_image, 1), np.stack(by_caption, 1))


def _means(
    by_image: Float64[np.ndarray, "M K"], by_caption: Float64[np.ndarray, "P K"]
) -> dict[str, float]:
    return {
        f"{name}_r{depth}": float(term.mean())
        for name, terms in (("image_to_text", by_image), ("text_to_image", by_caption))
        for depth, term in zip(DEPTHS, terms.T, strict=True)
    }


def top_categories(keys: Sequence[str]) -> Integer[np.ndarray, " M"]:
    """The first folder of each key, as a number; without folders one for all."""
    names = [key.split("/")[0] if "/" in key else "" for key in keys]
    return np.unique(names, return_inverse=True)[1]
