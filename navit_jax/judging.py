"""What a kind of evaluation is, and the interval of a mean that most of them give.

A judge is a frozen dataclass of pure functions; its attributes are keys of the set:
  read(source, training) -> what is asked of the set, once; its texts are embedded
  compute(task, params, batch) -> arrays by slot (terms of means: by slot or token)
  conclude(asked, texts, found, index, source) -> {metric: value} of all batches

M images of a set that can be used, P pairs, S texts, C classes, E embedding width.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int

from navit_jax.batch import PackedBatch
from navit_jax.data.records import Source
from navit_jax.metrics import Mean, interval_by_group
from navit_jax.tasks import Task

# The captions that were trained on; None if they are too many to read.
Training = Callable[[], Sequence[str] | None]


class Asked(NamedTuple):
    """What is asked of a set.

    Attributes:
      texts: To be embedded.
      pairs: [P 2] (image, text), or (image, class).
      absent: [C], the classes whose names no training caption holds, if known.
    """

    texts: list[str]
    pairs: Int[np.ndarray, "P 2"]
    absent: np.ndarray | None = None


class Texts(NamedTuple):
    """Embeddings [S E], and whether the tokenizer knows the text [S]."""

    vectors: np.ndarray
    known: np.ndarray


@runtime_checkable
class Judge(Protocol):
    """One kind of evaluation."""

    def read(self, source: Source, training: Training) -> Asked:
        """What is asked of the set, whatever the parameters."""
        ...

    @property
    def compute(self) -> Callable[[Task, Any, PackedBatch], Any]:
        """What the devices say of a batch; the same function for all that are alike."""
        ...

    def conclude(
        self,
        asked: Asked,
        texts: Texts | None,
        found: Any,
        index: Int[np.ndarray, " M"],
        source: Source,
    ) -> dict[str, float]:
        """The metrics of all batches.

        Args:
          texts: Of `asked.texts`; None where there are none.
          found: What was computed, joined over the batches: of slots [slots ...].
          index: The image of each slot; -1 of those without one that can be used.
        """
        ...


def interval(
    name: str, terms: Mean, index: np.ndarray, source: Source
) -> dict[str, float]:
    """The 95 % interval of a mean by image, if near-duplicates are known."""
    groups = getattr(source, "groups", None)
    if groups is None:
        return {}
    low, high = interval_by_group(terms.total, terms.weight, groups[index])
    return {f"{name}_low": low, f"{name}_high": high}
