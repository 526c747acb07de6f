"""Tasks: the only place where a model, a loss and a metric meet.

A task is a frozen dataclass of pure functions, with no devices and no optimiser in it:
  init(key, batch) -> params
  weights(batch) -> counts a loss is divided by, summed over micro-batches first
  loss(params, batch, key, weights) -> (scalar, {name: Mean})
  outputs(params, batch) -> {name: [B N ...] or [B L ...]}
  metrics(params, batch) -> {name: Mean of terms [B N], by image, or [B L], by token}

A task may have two more attributes: `frozen`, patterns of parameters that no step
changes, and `inherit`, rules of `inheritance.inherit` for the first state.

A task whose loss is no sum over images is a `Coupled` one, with two more:
  embed(params, batch, key) -> {name: [B N ...]}
  couple(params, embeddings, batch) -> (scalar, {name: Mean}), of the whole batch
"""

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import jax

from navit_jax.batch import PackedBatch
from navit_jax.metrics import Mean
from navit_jax.tasks.bootstrapping import Bootstrapping
from navit_jax.tasks.classification import Classification
from navit_jax.tasks.contrastive import Contrastive
from navit_jax.tasks.masked_patches import MaskedPatches
from navit_jax.tasks.segmentation import Segmentation


@runtime_checkable
class Task(Protocol):
    """What the loop, evaluation and prediction need of a task."""

    def init(self, key: jax.Array, batch: PackedBatch) -> Mapping[str, Any]:
        """Fresh parameters, as a nested dict."""
        ...

    def weights(self, batch: PackedBatch) -> dict[str, jax.Array]:
        """Counts the loss is divided by; no parameters involved."""
        ...

    def loss(
        self,
        params: Mapping[str, Any],
        batch: PackedBatch,
        key: jax.Array,
        weights: Mapping[str, jax.Array],
    ) -> tuple[jax.Array, dict[str, Mean]]:
        """The loss summed over this batch and divided by the given weights."""
        ...

    def outputs(
        self, params: Mapping[str, Any], batch: PackedBatch
    ) -> dict[str, jax.Array]:
        """What prediction uses: arrays by slot or by token."""
        ...

    def metrics(self, params: Mapping[str, Any], batch: PackedBatch) -> dict[str, Mean]:
        """What evaluation folds over a data set: terms by image or by token."""
        ...


@runtime_checkable
class Coupled(Task, Protocol):
    """A task whose loss depends on all images at once, through their embeddings alone.

    `loss` is `couple` of `embed`, and needs the whole batch.
    """

    def embed(
        self, params: Mapping[str, Any], batch: PackedBatch, key: jax.Array
    ) -> dict[str, jax.Array]:
        """Arrays by slot; the same for an image in whatever part of the batch it is."""
        ...

    def couple(
        self,
        params: Mapping[str, Any],
        embeddings: dict[str, jax.Array],
        batch: PackedBatch,
    ) -> tuple[jax.Array, dict[str, Mean]]:
        """The loss of the embeddings of the whole batch."""
        ...


TASKS = {
    "bootstrapping": Bootstrapping,
    "classification": Classification,
    "contrastive": Contrastive,
    "masked_patches": MaskedPatches,
    "segmentation": Segmentation,
}
