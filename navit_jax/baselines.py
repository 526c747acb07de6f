"""What is had without seeing a pixel: by the commonest class, the aspect, the category.

An image counts as right if the guess is any of its labels, as for the model. M images,
C classes.
"""

import numpy as np
from jaxtyping import Bool, Float, Float64

from navit_jax import retrieval
from navit_jax.data import Stream
from navit_jax.data.records import Source
from navit_jax.errors import ConfigError
from navit_jax.judges import no_captions, read_all

# Bins of equal counts over the aspects of the training set.
BINS = 24


def majority(train: Bool[np.ndarray, "M C"], test: Bool[np.ndarray, "T C"]) -> float:
    """Accuracy of always guessing the commonest class of the training set."""
    return float(test[:, train.sum(0).argmax()].mean())


def aspect_only(
    train: Bool[np.ndarray, "M C"],
    train_aspects: Float[np.ndarray, " M"],
    test: Bool[np.ndarray, "T C"],
    test_aspects: Float[np.ndarray, " T"],
) -> float:
    """Accuracy of guessing the commonest class among training images of like aspect.

    Aspects are sorted into bins of equal counts in the training set.
    """
    edges = np.quantile(train_aspects, np.linspace(0, 1, BINS + 1)[1:-1])
    counts = np.zeros((BINS, train.shape[1]))
    np.add.at(counts, np.searchsorted(edges, train_aspects), train)
    guesses = counts.argmax(1)[np.searchsorted(edges, test_aspects)]
    return float(test[np.arange(len(test)), guesses].mean())


def pixel_free(train: Stream, test: Stream) -> dict[str, float]:
    """Both accuracies on the images of a set that have a label.

    Reads the labels of all records of both, so it is for sets of moderate size.
    """
    labels, aspects = _read(train)
    others, other_aspects = _read(test)
    return {
        "majority": majority(labels, others),
        "aspect_only": aspect_only(labels, aspects, others, other_aspects),
    }


def without_pictures(source: Source) -> dict[str, dict[str, float]]:
    """What retrieval gives by chance, and to who knows the top category of an image.

    That is the first folder of its key. All images with a caption count.

    Raises:
      ConfigError: no image has a caption.
    """
    keys, captions = zip(*((r.key, r.captions) for r in read_all(source)), strict=True)
    pairs = retrieval.list_pairs(captions).pairs
    used, _, pairs = retrieval.restrict(pairs, np.arange(len(keys)))
    if not len(pairs):
        raise ConfigError(no_captions(source))
    categories = retrieval.top_categories([keys[i] for i in used])
    return {
        "chance": retrieval.chance(pairs),
        "top_category": retrieval.oracle(pairs, categories),
    }


def _read(
    stream: Stream,
) -> tuple[Bool[np.ndarray, "M C"], Float64[np.ndarray, " M"]]:
    """Labels, and the logarithm of height over width, of a stream's first source."""
    source, sizes = stream.loader.sources[0], np.asarray(stream.plan.tables[0], float)
    labels = np.zeros((len(source), len(source.class_names)), bool)
    for i in range(len(source)):
        labels[i, list(source[i].labels)] = True
    usable = labels.any(1) & (sizes.min(1) > 0)
    sizes = sizes[usable]
    return labels[usable], np.log(sizes[:, 0] / sizes[:, 1])
