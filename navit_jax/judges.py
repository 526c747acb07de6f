"""The kinds of evaluation, by `config.evals.<set>.name`; see `judging.py`.

M images of a set that can be used, S texts, P pairs, E embedding width.
"""

import dataclasses
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from absl import logging
from jaxtyping import Float, Int

from navit_jax import agreement, calibration, mean_iou, retrieval, zero_shot
from navit_jax import config as config_lib
from navit_jax.batch import PackedBatch
from navit_jax.data.bad_image import BadImage
from navit_jax.data.records import Record, Source
from navit_jax.errors import ConfigError
from navit_jax.judging import Asked, Judge, Texts, Training, interval
from navit_jax.metrics import Mean
from navit_jax.tasks import Task

# Captions of larger training sets are not searched for the names of classes.
SEARCHED = 100_000


def compute_metrics(task: Task, params: Any, batch: PackedBatch) -> dict[str, Mean]:
    """Terms of the task's means, by slot or by token."""
    return task.metrics(params, batch)


def embed_images(task: Task, params: Any, batch: PackedBatch) -> Any:
    """Embeddings [B N E]."""
    return task.outputs(params, batch)["image"]


@dataclasses.dataclass(frozen=True)
class Metrics:
    """The task's own metrics, folded over the set."""

    def read(self, source: Source, training: Training) -> Asked:
        """Nothing."""
        return Asked([], np.zeros((0, 2), np.int64))

    compute = staticmethod(compute_metrics)

    def conclude(
        self,
        asked: Asked,
        texts: Texts | None,
        found: Mapping[str, Mean],
        index: Int[np.ndarray, " M"],
        source: Source,
    ) -> dict[str, float]:
        """Means, with the interval of those by image, and the calibration."""
        values = {}
        for name, mean in found.items():
            values[name] = jax.tree.map(np.sum, mean).result()
            here = mean.weight > 0
            if index.shape == here.shape:
                own = jax.tree.map(lambda x, here=here: x[here], mean)
                values |= interval(name, own, index[here], source)
        if "confidence" in found and (here := found["confidence"].weight > 0).any():
            confidence = found["confidence"].total[here]
            right = found["accuracy"].total[here]
            error = calibration.calibration_error(confidence, right)
            values["calibration_error"] = error
            values["calibrated_error"] = calibration.calibrated_error(confidence)
        return values


@dataclasses.dataclass(frozen=True)
class Retrieval:
    """R@1, 5, 10 from images to captions and back, see `retrieval.py`."""

    def read(self, source: Source, training: Training) -> Asked:
        """All captions of all images."""
        return Asked(*retrieval.list_pairs([r.captions for r in read_all(source)]))

    compute = staticmethod(embed_images)

    def conclude(
        self,
        asked: Asked,
        texts: Texts | None,
        found: Float[np.ndarray, "S E"],
        index: Int[np.ndarray, " S"],
        source: Source,
    ) -> dict[str, float]:
        """Recall among the images that have a caption, and the captions they have.

        Raises:
          ConfigError: no image that can be used has a caption of use.
        """
        assert texts is not None
        here = index >= 0
        known = asked.pairs[texts.known[asked.pairs[:, 1]]]
        used, chosen, pairs = retrieval.restrict(known, index[here])
        if not len(pairs):
            raise ConfigError(no_captions(source))
        groups = getattr(source, "groups", None)
        return retrieval.recall(
            found[here][used],
            texts.vectors[chosen],
            pairs,
            None if groups is None else groups[index[here][used]],
        ) | {
            "captions": float(len(pairs)),
            "without_caption": float(here.sum() - len(used)),
        }


@dataclasses.dataclass(frozen=True)
class ZeroShot:
    """Accuracy among the classes of a set by what they are called.

    Attributes:
      templates: Texts with one {} for the name.
      names: What the classes are called, by number; () is as the source names them,
        without the path and with blanks for underscores.
    """

    templates: Sequence[str] = zero_shot.TEMPLATES
    names: Sequence[str] = ()

    def read(self, source: Source, training: Training) -> Asked:
        """All prompts of all classes, and the labels of the images; raises as `ask`."""
        names, prompts = self.ask(source)
        labels = [(i, c) for i, r in enumerate(read_all(source)) for c in r.labels]
        pairs = np.array(labels, np.int64).reshape(-1, 2)
        captions = training()
        absent = None if captions is None else zero_shot.find_absent(names, captions)
        return Asked(prompts, pairs, absent)

    def ask(self, source: Source) -> tuple[Sequence[str], list[str]]:
        """What the classes are called, and all their prompts.

        Raises:
          ConfigError: the source has no classes, or names and templates do not fit.
        """
        names = self.names or list(map(zero_shot.call_class, source.class_names))
        if not names or len(names) != len(source.class_names):
            raise ConfigError(
                f"zero_shot: source {source.name} has {len(source.class_names)} "
                f"classes, and {len(names)} names are given: give labels to the "
                "source, and a name to each of them"
            )
        return names, zero_shot.list_prompts(names, self.templates)

    compute = staticmethod(embed_images)

    def conclude(
        self,
        asked: Asked,
        texts: Texts | None,
        found: Float[np.ndarray, "S E"],
        index: Int[np.ndarray, " S"],
        source: Source,
    ) -> dict[str, float]:
        """Accuracy by image: the nearest class is one of its labels.

        `accuracy_absent` is that of the images all of whose labels have names that no
        training caption holds, `absent` the number of these images.
        """
        assert texts is not None
        if not texts.known.all():
            text = asked.texts[int(texts.known.argmin())]
            raise ConfigError(
                f"zero_shot: the tokenizer leaves out {text!r}; call it otherwise "
                "(names=...)"
            )
        here = index >= 0
        used, labels, pairs = retrieval.restrict(asked.pairs, index[here])
        if not len(pairs):
            raise ConfigError(f"zero_shot: no image of {source.name} has a label")
        own = index[here][used]
        classes = zero_shot.average_prompts(texts.vectors, len(source.class_names))
        right = np.stack([pairs[:, 0], labels[pairs[:, 1]]], 1)
        hits = retrieval.hits(found[here][used], classes, right, (1,))[:, 0]
        values = {"accuracy": float(hits.mean())}
        terms = Mean(total=hits, weight=np.ones(len(hits)))
        values |= interval("accuracy", terms, own, source)
        if asked.absent is not None:
            absent = np.ones(len(hits), bool)
            np.logical_and.at(absent, right[:, 0], asked.absent[right[:, 1]])
            values["absent"] = float(absent.sum())
            if absent.any():
                values["accuracy_absent"] = float(hits[absent].mean())
        return values


JUDGES = {
    "agreement": agreement.Agreement,
    "metrics": Metrics,
    "retrieval": Retrieval,
    "segmentation": mean_iou.MeanIou,
    "zero_shot": ZeroShot,
}


def choose(
    section: Mapping[str, Any], where: str
) -> tuple[Callable[..., Judge], list[str]]:
    """How a set of `evals` is judged, by its `name`, and the keys that this reads."""
    named = {"name": section.get("name", "metrics")}
    judge, _ = config_lib.choose(named, JUDGES, where)
    return judge, list(inspect.signature(judge).parameters)


def build(section: Mapping[str, Any], where: str) -> Judge:
    """The judge of a set, with the keys of its section that it reads."""
    judge, keys = choose(section, where)
    return judge(**{key: section[key] for key in keys if key in section})


def no_captions(source: Source) -> str:
    """The message for a source that retrieval can do nothing with."""
    return (
        f"source {source.name} has no caption of use for retrieval: name the feature "
        "that holds them (caption=...)"
    )


def read_captions(sources: Sequence[Source]) -> list[str] | None:
    """All captions of some sources; None, and a line of the log, if too many."""
    if (records := sum(map(len, sources))) > SEARCHED:
        logging.info(
            "zero_shot: the captions of %d training records are too many to tell "
            "which names they hold", records,
        )  # fmt: skip
        return None
    return [c for source in sources for r in read_all(source) for c in r.captions]


def read_all(source: Source) -> Iterator[Record]:
    """The records of a source; one that can not be had has no captions and labels."""
    for i in range(len(source)):
        try:
            yield source[i]
        except (OSError, BadImage):
            yield Record(f"#{i}", b"")
