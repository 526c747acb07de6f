"""Intersection over union by class, of all pixels of a set together.

S image slots of all batches, C classes.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Int

from navit_jax.batch import PackedBatch
from navit_jax.data.records import Source
from navit_jax.errors import ConfigError
from navit_jax.judging import Asked, Texts, Training, interval
from navit_jax.metrics import Mean
from navit_jax.tasks import Task


def count_confusions(task: Task, params: Any, batch: PackedBatch) -> Any:
    """`hit`, `said` and `true` [B N C].

    Raises:
      ConfigError: the task has no classes of pixels.
    """
    confusion = getattr(task, "confusion", None)
    if confusion is None:
        raise ConfigError(
            "an evaluation of name 'segmentation' needs config.task.name='segmentation'"
        )
    return confusion(params, batch)


@dataclasses.dataclass(frozen=True)
class MeanIou:
    """The mean of the classes' intersections over their unions, and accuracies.

    Pixels are those of the planned grids, not of the files. A class that is neither
    there nor guessed in the whole set counts in no mean.

    Attributes:
      by_class: Whether each class's own `iou_<name>` is told.
    """

    by_class: bool = True

    def read(self, source: Source, training: Training) -> Asked:
        """Nothing."""
        return Asked([], np.zeros((0, 2), np.int64))

    compute = staticmethod(count_confusions)

    def conclude(
        self,
        asked: Asked,
        texts: Texts | None,
        found: Mapping[str, np.ndarray],
        index: Int[np.ndarray, " S"],
        source: Source,
    ) -> dict[str, float]:
        """`mean_iou`, `pixel_accuracy` with its interval, `mean_accuracy` of classes.

        Raises:
          ConfigError: the classes are not as many as the source has.
        """
        names = name_classes(source.class_names, found["hit"].shape[-1])
        by_image = {k: np.asarray(v, np.int64)[index >= 0] for k, v in found.items()}
        hit, said, true = (by_image[k].sum(0) for k in ("hit", "said", "true"))
        iou = _divide(hit, said + true - hit)
        right = Mean(
            total=by_image["hit"].sum(1).astype(float),
            weight=by_image["true"].sum(1).astype(float),
        )
        values = {
            "mean_iou": _average(iou),
            "mean_accuracy": _average(_divide(hit, true)),
            "pixel_accuracy": float(_divide(hit.sum(), true.sum())),
        }
        values |= interval("pixel_accuracy", right, index[index >= 0], source)
        if self.by_class:
            values |= {
                f"iou_{name.replace('/', '_')}": float(value)
                for name, value in zip(names, iou, strict=True)
            }
        return values


def name_classes(known: tuple[str, ...], num: int) -> tuple[str, ...]:
    """The names of so many classes, the first of which may be the background.

    Raises:
      ConfigError: they are not as many.
    """
    names = known if num == len(known) else ("background", *known)
    if num != len(names):
        raise ConfigError(
            f"the set has {len(known)} classes, the model {num} with the background: "
            "judge it on sources with the classes of training"
        )
    return names


def _divide(total: Any, weight: Any) -> np.ndarray:
    """nan of nothing."""
    return np.where(weight > 0, total / np.maximum(weight, 1), np.nan)


def _average(values: np.ndarray) -> float:
    """Of those that are numbers."""
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else float("nan")
