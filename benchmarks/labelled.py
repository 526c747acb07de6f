"""What a frozen encoder's vectors say of the classes of pictures, by two plain readers.

M pictures, S of them with labels.
"""

from typing import Any, NamedTuple

import numpy as np

from navit_jax import data, linear_probe
from navit_jax.judges import read_all

# The nearest training pictures that vote.
NEIGHBOURS = 10
Vectors = np.ndarray


class Judged(NamedTuple):
    """A source, and who is whose near-duplicate in it.

    Attributes:
      section: As in a config.
      groups: [M].
      labels: Of each picture; () of all where the source has none.
      train: Section of the labelled pictures that probes learn from; {} for none.
    """

    section: dict[str, Any]
    groups: np.ndarray
    labels: list[tuple[int, ...]]
    train: dict[str, Any]


def open_clipart(split: str, full: bool, tiny: bool) -> Judged:
    """All pictures of a split; those with a class of eight are labelled."""
    section = {"name": "clipart", "split": split, "full": full}
    whole, labelled = read({**section, "labels": "none"}), read(section)
    of_key = {record.key: record.labels for record in read_all(labelled)}
    labels = [of_key.get(record.key, ()) for record in read_all(whole)]
    train = {**section, "split": "validation" if tiny else "train"}
    return Judged({**section, "labels": "none"}, whole.groups, labels, train)


def open_composites(split: str, count: int, path: str) -> Judged:
    """Scenes with small objects; no two are alike."""
    section = {"name": "composites", "split": split, "count": count, "labels": "none"}
    if path:
        section["path"] = path
    return Judged(section, np.arange(count), count * [()], {})


def leave_out(judged: Judged, there: np.ndarray) -> Judged:
    """It without the labels of pictures that are not there."""
    pairs = zip(judged.labels, there.tolist(), strict=True)
    return judged._replace(labels=[own if seen else () for own, seen in pairs])


def read(section: dict[str, Any]) -> Any:
    """The source of a section."""
    ((source,), _) = data.open_sources({"judged": section})
    return source


class Probe:
    """What is learned of labelled pictures, judged on others by any of their labels.

    A vector of 0 is one of a picture that could not be used: nothing is learned of it.
    """

    def __init__(self, judged: Judged):
        """Reads the labels; pictures with several are not learned from."""
        records = list(read_all(read(judged.train))) if judged.train else []
        self.single = np.array([len(r.labels) == 1 for r in records], bool)
        self.classes = np.array([r.labels[0] for r in records if len(r.labels) == 1])
        self.places = np.flatnonzero([bool(own) for own in judged.labels])
        self.labels = [judged.labels[place] for place in self.places]
        self.groups = judged.groups[self.places]

    def fit(self, train: Vectors, judged: Vectors) -> np.ndarray:
        """[S] whether a linear probe is right, of labelled pictures."""
        train, classes = self._choose(train)
        targets = 2.0 * np.eye(self.classes.max() + 1)[classes] - 1
        weights = linear_probe.fit(train, targets)
        return self._judge(linear_probe.predict(judged[self.places], *weights))

    def find_neighbours(self, train: Vectors, judged: Vectors) -> np.ndarray:
        """[S] whether most of the nearest, by cosine, have a right class."""
        train, classes = self._choose(train)
        near, own = (
            v / np.linalg.norm(v, axis=1, keepdims=True)
            for v in (train, judged[self.places])
        )
        order = np.argsort(-(own @ near.T), 1)[:, :NEIGHBOURS]
        votes = np.eye(self.classes.max() + 1)[classes[order]].sum(1)
        return self._judge(votes.argmax(1))

    def _choose(self, train: Vectors) -> tuple[Vectors, np.ndarray]:
        """The vectors to learn from, and their classes."""
        there = train[self.single].any(1)
        return train[self.single][there], self.classes[there]

    def _judge(self, guesses: np.ndarray) -> np.ndarray:
        pairs = zip(guesses.tolist(), self.labels, strict=True)
        return np.array([guess in own for guess, own in pairs], float)
