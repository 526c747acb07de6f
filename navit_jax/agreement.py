"""Whether a student says of a picture what its teacher says.

A plain cosine is nearly met by one constant vector, since all vectors of a teacher
point much the same way; so they are centred first, and each is asked to find its own.

M images, D width.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from navit_jax import retrieval
from navit_jax.batch import PackedBatch
from navit_jax.data.records import Source
from navit_jax.errors import ConfigError
from navit_jax.judging import Asked, Texts, Training
from navit_jax.metrics import interval_by_group
from navit_jax.tasks import Task

Vectors = Float[np.ndarray, "M D"]


def compute_vectors(task: Task, params: Any, batch: PackedBatch) -> Any:
    """`student` and `teacher` [B N D].

    Raises:
      ConfigError: the task has no teacher.
    """
    vectors = getattr(task, "vectors", None)
    if vectors is None:
        raise ConfigError(
            "an evaluation of name 'agreement' needs a task with a teacher: "
            "config.task.name='bootstrapping'"
        )
    return vectors(params, batch)


def compare(student: Vectors, teacher: Vectors) -> dict[str, Float[np.ndarray, " M"]]:
    """What is said of each image.

    Returns:
      `cosine` of the two vectors; `centred_cosine`, after each got length 1 and lost
      the mean of the teacher's, which leaves about 0 to a constant vector; `r1`,
      whether the student's vector is nearest to its own teacher's among all (ties count
      by chance); `constant_cosine`, the cosine of the teacher's mean.
    """
    student, teacher = _unit(student), _unit(teacher)
    mean = teacher.mean(0)
    own = np.arange(len(student))
    pairs = np.stack([own, own], 1)
    return {
        "cosine": (student * teacher).sum(1),
        "centred_cosine": (_unit(student - mean) * _unit(teacher - mean)).sum(1),
        "r1": retrieval.hits(student, teacher, pairs, (1,))[:, 0],
        "constant_cosine": teacher @ _unit(mean),
    }


def _unit(vectors: np.ndarray) -> np.ndarray:
    """The vectors, of length 1; one of 0 stays."""
    vectors = np.asarray(vectors, np.float64)
    norms = np.linalg.norm(vectors, axis=-1, keepdims=True)
    return vectors / np.where(norms > 0, norms, 1)


@dataclasses.dataclass(frozen=True)
class Agreement:
    """The means of `compare` over a set, with their intervals.

    Where the source knows of no near-duplicates, as of composed scenes, each picture is
    a group of its own.
    """

    def read(self, source: Source, training: Training) -> Asked:
        """Nothing."""
        return Asked([], np.zeros((0, 2), np.int64))

    compute = staticmethod(compute_vectors)

    def conclude(
        self,
        asked: Asked,
        texts: Texts | None,
        found: Mapping[str, np.ndarray],
        index: Int[np.ndarray, " S"],
        source: Source,
    ) -> dict[str, float]:
        """The means over the images that can be used."""
        here = index >= 0
        terms = compare(found["student"][here], found["teacher"][here])
        groups = getattr(source, "groups", None)
        own = index[here] if groups is None else groups[index[here]]
        values = {}
        for name, term in terms.items():
            low, high = interval_by_group(term, np.ones(len(term)), own)
            mean = float(term.mean())
            values |= {name: mean, f"{name}_low": low, f"{name}_high": high}
        return values
