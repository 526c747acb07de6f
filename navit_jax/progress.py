"""Gathers what the steps of an interval say, and tells it: line, jsonl, TensorBoard."""

import collections
import functools
from collections.abc import Callable, Mapping
from typing import Any

from absl import logging

from navit_jax import reporting
from navit_jax.batch import BatchInfo
from navit_jax.host_signals import Totals


class Progress:
    """Sums metrics over the steps of an interval and reports at its end.

    Metrics are read one step late, so reading them never waits for the step just sent.
    """

    def __init__(
        self,
        *,
        writer: reporting.MetricWriter,
        first_step: int,
        steps: int,
        report_every: int,
        rows: int,
        num_tokens: int,
        schedule: Callable[[int], Any],
        flops: Callable[[float, float, float], float],
        peak_flops: float,
        tokens_seen: int = 0,
    ):
        """Starts at a step.

        Args:
          rows: Rows of the global batch.
          num_tokens: Tokens of a row.
          schedule: Learning rate by step.
          flops: Training FLOPs of (tokens, sum of n_i^2, images).
          peak_flops: FLOP/s of all devices together.
          tokens_seen: Before the first step.
        """
        self.writer, self.steps, self.every = writer, steps, report_every
        self.rows, self.num_tokens = rows, num_tokens
        self.schedule, self.flops, self.peak = schedule, flops, peak_flops
        self.tokens_seen = tokens_seen
        self.clock = reporting.Clock(first_step, steps)
        self.seconds_aside = 0.0
        self.skipped: collections.Counter[str] = collections.Counter()
        self.notes: collections.Counter[str] = collections.Counter()
        self.sources: collections.Counter[str] = collections.Counter()
        self.shrunk = 0
        self._read: list[dict[str, Any]] = []

    def add(
        self, step: int, info: BatchInfo, place: Totals, metrics: Mapping[str, Any]
    ) -> None:
        """Adds the fetched metrics of one step; reports when the interval is full.

        Args:
          place: Of all hosts after the step.
        """
        self._read.append(dict(metrics))
        self.skipped.update(reason for _, reason in info.skipped)
        self.notes.update(info.notes)
        names = (name.split(":", 1)[0] for row in info.keys for name in row)
        self.sources.update(names)
        self.shrunk += info.shrunk
        self.tokens_seen += int(metrics["counts"]["tokens"])
        begun = self.clock.begun is not None
        if not begun or step % self.every == 0 or step == self.steps:
            self._report(step, place)

    def _report(self, step: int, place: Totals) -> None:
        read, self._read = self._read, []
        seconds, left = self.clock.tick(step, self.seconds_aside)
        self.seconds_aside = 0.0
        counts = {
            name: sum(float(m["counts"][name]) for m in read)
            for name in read[0]["counts"]
        }
        rows, planned = len(read) * self.rows, sum(self.sources.values())
        values = {
            **self._means(read),
            "train/gradient_norm": float(read[-1]["gradient_norm"]),
            "train/learning_rate": float(self.schedule(step - 1)),
            "train/nonfinite_steps": int(read[-1]["nonfinite"]),
            "pack/padding": 1 - counts["tokens"] / (rows * self.num_tokens),
            "pack/images_per_row": counts["images"] / rows,
            "data/images_seen": place.images_seen,
            "data/tokens_seen": self.tokens_seen,
            "data/skipped": sum(self.skipped.values()),
            "data/shrunk": self.shrunk,
            **{f"data/skipped/{reason}": n for reason, n in self.skipped.items()},
            **{f"data/notes/{note}": n for note, n in self.notes.items()},
            **{f"data/share/{k}": n / planned for k, n in self.sources.items()},
            **self._throughput(seconds, counts, len(read)),
        }
        logging.info("%s", reporting.progress_line(step, self.steps, left, values))
        self.writer.write(step, {**values, "position": place.position})

    def _means(self, read: list[dict[str, Any]]) -> dict[str, float]:
        # A step that was not finite is counted, and left out of the interval's means.
        finite = [m["means"] for m in read if m["finite"]]
        if not finite:
            return {"train/loss": float("nan")}
        return {
            f"train/{name}": functools.reduce(
                lambda a, b: a + b, (means[name] for means in finite)
            ).result()
            for name in finite[0]
        }

    def _throughput(
        self, seconds: float, counts: Mapping[str, float], num_steps: int
    ) -> dict[str, float]:
        if not seconds > 0:
            return {}
        images = counts["images"]
        useful = self.flops(counts["tokens"], counts["attention_pairs"], images)
        tokens = float(num_steps * self.rows * self.num_tokens)
        padded = self.flops(tokens, tokens * self.num_tokens, images)
        return {
            "throughput/step_seconds": seconds / num_steps,
            "throughput/images_per_second": images / seconds,
            "throughput/tokens_per_second": counts["tokens"] / seconds,
            "throughput/mfu": useful / seconds / self.peak,
            "throughput/mfu_padded": padded / seconds / self.peak,
        }

    def evaluated(self, step: int, values: Mapping[str, float], seconds: float) -> None:
        """Writes an evaluation, whose time counts in no throughput."""
        self.seconds_aside += seconds
        shown = "  ".join(f"{name[5:]} {value:.4g}" for name, value in values.items())
        logging.info("step %d evaluated in %.1f s: %s", step, seconds, shown)
        self.writer.write(step, values)

    def close(self) -> None:
        """Closes the files."""
        self.writer.close()
