"""Tasks: the only place where a model, a loss and a metric meet.

A task is a frozen dataclass of pure functions, with no devices and no optimiser in it:
  init(key, batch) -> params
  weights(batch) -> counts a loss is divided by, summed over micro-batches first
  loss(params, batch, key, weights) -> (scalar, {name: Mean})
  outputs(params, batch) -> {name: [B N ...] or [B L ...]}
  metrics(params, batch) -> {name: Mean of terms [B N], by image, or [B L], by token}
"""

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import jax

from navit_jax.batch import PackedBatch
from navit_jax.metrics import Mean
from navit_jax.tasks.classification import Classification
from navit_jax.tasks.masked_patches import MaskedPatches


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


TASKS = {"classification": Classification, "masked_patches": MaskedPatches}
