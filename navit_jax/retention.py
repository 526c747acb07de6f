"""Chooses the checkpoints that stay: the newest, the periodic, the best.

The scores come from our records, not from the metrics file of orbax: damage to that one
would keep its manager from opening at all.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from absl import logging
from etils import epath

from navit_jax import records, saved_steps
from navit_jax.errors import CheckpointError


class Retention:
    """A preservation policy for orbax, with the scores of all checkpoints."""

    def __init__(self, keep: int, period: int, best: str, mode: str):
        self._keep, self._period = keep, period
        self.best = [best, mode]
        self._scores: dict[int, float] = {}

    def read(self, folder: epath.Path) -> None:
        """Notes the scores of the checkpoints that are there."""
        for step in saved_steps.find(folder):
            try:
                self.note(step, records.read(folder / str(step)))
            except (records.Damaged, CheckpointError) as error:
                logging.warning("Checkpoint %s/%d: %s", folder, step, error)

    def note(self, step: int, record: Mapping[str, Any]) -> None:
        """Notes the score of a checkpoint, if it has one."""
        score = records.score(record["body"], self.best)
        if score is not None:
            self._scores[step] = score

    def forget(self, damaged: Sequence[int]) -> None:
        """Drops the scores of checkpoints that turned out to be damaged."""
        for step in damaged:
            self._scores.pop(step, None)

    def should_preserve(
        self, checkpoints: Sequence[Any], *, context: Any
    ) -> Sequence[bool]:
        """Tells orbax which of the checkpoints, in order of steps, stay."""
        del context
        all_steps = [checkpoint.step for checkpoint in checkpoints]
        stay = set(all_steps[-self._keep :])
        if self._period:
            stay |= {step for step in all_steps if step % self._period == 0}
        scored = [step for step in all_steps if step in self._scores]
        if scored:
            stay.add(max(scored, key=lambda step: (self._scores[step], step)))
        return [step in stay for step in all_steps]
