"""Few-shot accuracy of pooled vectors: linear probes on a few labelled images.

M images, D width.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float32

from navit_jax import linear_probe
from navit_jax.data.bad_image import BadImage
from navit_jax.data.records import Selection, Source, StoredSource
from navit_jax.data.resolution import Law
from navit_jax.errors import DataError
from navit_jax.predictor import Predictor


def few_shot(
    model: Predictor,
    train: StoredSource,
    judged: Source,
    shots: Sequence[int],
    law: Law,
    upscale: bool = True,
    repeats: int = 5,
) -> Mapping[str, float]:
    """Accuracy of least squares on `n` images a class, on a set of labelled images.

    The images of a class are drawn among those with its label alone, `repeats` times;
    an image that is judged counts as right if the guess is any of its labels.

    Args:
      train: Where the images to learn from are drawn; none is changed or dropped.
      law: The resolution of all images.

    Returns:
      `<n>_shot_accuracy`, the mean over repeats, and `<n>_shot_std` between them.

    Raises:
      ConfigError: a class has fewer images.
      DataError: no image that is judged, or none that was drawn, can be used.
    """
    num_classes = len(model.class_names)

    def label_of(index: int) -> int:
        labels = train[index].labels
        return labels[0] if len(labels) == 1 else -1

    features, used = _features(model, judged, law, upscale)
    labels = [judged[int(i)].labels for i in used]
    found = {}
    for num in shots:
        accuracies = []
        for seed in range(repeats):
            chosen = linear_probe.choose_shots(
                label_of, len(train), num, num_classes, seed
            )
            selection = Selection(train, chosen)
            own, places = _features(model, selection, law, upscale)
            classes = np.array([label_of(int(chosen[place])) for place in places])
            targets = 2.0 * np.eye(num_classes)[classes] - 1
            guesses = linear_probe.predict(features, *linear_probe.fit(own, targets))
            right = [g in own for g, own in zip(guesses, labels, strict=True) if own]
            accuracies.append(np.mean(right))
        found[f"{num}_shot_accuracy"] = float(np.mean(accuracies))
        found[f"{num}_shot_std"] = float(np.std(accuracies))
    return found


def _features(
    model: Predictor, source: Source, law: Law, upscale: bool
) -> tuple[Float32[np.ndarray, "M D"], np.ndarray]:
    """The pooled vectors of a source's usable images, and their indices, ascending."""
    found = {
        result.place: result.value
        for result in model.results("pooled", source, law, upscale)
        if not isinstance(result.value, BadImage)
    }
    if not found:
        raise DataError(
            f"--shots: none of the images asked of {source.name} can be used"
        )
    places = np.array(sorted(found))
    return np.stack([found[place] for place in places]), places
