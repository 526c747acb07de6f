"""Gathers what the steps of an interval say, and tells it: line, jsonl, TensorBoard."""

import collections
import math
from collections.abc import Callable, Mapping
from typing import Any

from absl import logging

from navit_jax import reporting
from navit_jax.batch import BatchInfo
from navit_jax.data.quality import SHRUNK, Named
from navit_jax.host_signals import Totals

Sums = collections.Counter[str]

# Ends of names of an evaluation's numbers that its line in the log has room for.
SHOWN = ("/accuracy", "/loss", "r1", "/centred_cosine", "/mean_iou", "/pixel_accuracy")


class Progress:
    """Sums metrics over the steps of an interval and reports at its end.

    Metrics are read one step late, so reading them never waits for the step just sent.
    What it has summed so far goes into a checkpoint: a resumed run reports what an
    unbroken one does, but for times.
    """

    def __init__(
        self,
        *,
        writer: reporting.MetricWriter,
        steps: int,
        report_every: int,
        rows: int,
        num_tokens: int,
        flops: Callable[[Mapping[str, float | int]], float],
        peak_flops: float,
        state: Mapping[str, Any] | None = None,
    ):
        """Starts, or goes on.

        Args:
          rows: Rows of the global batch.
          num_tokens: Tokens of a row.
          flops: Of training, by the counts of `train_state.batch_counts`.
          peak_flops: FLOP/s of all devices together; a NaN if not known: no MFU then.
          state: What `state()` gave.
        """
        self.writer, self.steps, self.every = writer, steps, report_every
        self.rows, self.num_tokens = rows, num_tokens
        self.flops, self.peak = flops, peak_flops
        state = state or {}
        # Of the run; of the interval; of the steps since the clock last ticked.
        self.run: Sums = collections.Counter(state.get("run", {}))
        self.interval: Sums = collections.Counter(state.get("interval", {}))
        self.timed: Sums = collections.Counter()
        self.clock = reporting.Clock(steps)
        self.seconds_aside = 0.0
        self.shrunk = Named(SHRUNK)

    def state(self) -> dict[str, dict[str, float | int]]:
        """What a checkpoint keeps; JSON-able."""
        return {"run": dict(self.run), "interval": dict(self.interval)}

    def add(
        self, step: int, info: BatchInfo, place: Totals, metrics: Mapping[str, Any]
    ) -> None:
        """Adds the fetched metrics of one step; reports when the interval is full.

        Args:
          place: Of all hosts after the step.
        """
        counts = {name: float(n) for name, n in metrics["counts"].items()}
        self.run.update([f"skipped/{reason}" for _, reason in info.skipped])
        self.run.update({f"notes/{note}": n for note, n in info.notes.items()})
        self.run.update(
            "share/" + name.split(":", 1)[0] for row in info.keys for name in row
        )
        self.shrunk.note(info.shrunk)
        tokens = int(counts["tokens"])
        everywhere = {"skipped": place.skipped, "tokens_seen": tokens}
        self.run.update({"shrunk": len(info.shrunk), **everywhere})
        self.timed.update({"steps": 1, **counts})
        self.interval.update({"steps": 1, **counts})
        # A step that was not finite is counted, and left out of the interval's means.
        if metrics["finite"]:
            for name, mean in metrics["means"].items():
                total, weight = float(mean.total), float(mean.weight)
                self.interval.update({f"total/{name}": total, f"weight/{name}": weight})
        if step == 1 or step % self.every == 0 or step == self.steps:
            self._report(step, place, metrics)
        elif self.clock.begun is None:
            self._tick(step)  # The first step after resuming compiles.

    def _tick(self, step: int) -> tuple[dict[str, float], float]:
        """Throughput since the last tick, and the seconds left."""
        seconds, left = self.clock.tick(step, self.seconds_aside)
        timed, self.timed = self.timed, collections.Counter()
        self.seconds_aside = 0.0
        return self._throughput(seconds, timed) if seconds > 0 else {}, left

    def _report(self, step: int, place: Totals, metrics: Mapping[str, Any]) -> None:
        sums, self.interval = self.interval, collections.Counter()
        names = [name for name in sums if name.startswith("total/")]
        means = {
            f"train/{n[6:]}": sums[n] / max(sums[f"weight/{n[6:]}"], 1) for n in names
        }
        throughput, left = self._tick(step)
        rows = sums["steps"] * self.rows
        values = {
            **(means or {"train/loss": float("nan")}),
            "train/gradient_norm": float(metrics["gradient_norm"]),
            "train/learning_rate": float(metrics["learning_rate"]),
            "train/nonfinite_steps": int(metrics["nonfinite"]),
            "pack/padding": 1 - sums["tokens"] / (rows * self.num_tokens),
            **_text_padding(sums),
            "pack/images_per_row": sums["images"] / rows,
            "data/images_seen": place.images_seen,
            **self._of_the_run(),
            **throughput,
        }
        logging.info("%s", reporting.progress_line(step, self.steps, left, values))
        self.writer.write(step, {**values, "position": place.position})

    def _of_the_run(self) -> dict[str, float | int]:
        shares = {k: n for k, n in self.run.items() if k.startswith("share/")}
        planned = max(sum(shares.values()), 1)
        return {
            **{f"data/{k}": n for k, n in self.run.items() if k not in shares},
            **{f"data/{k}": n / planned for k, n in shares.items()},
        }

    def _throughput(self, seconds: float, sums: Sums) -> dict[str, float]:
        rows = float(sums["steps"] * self.rows)
        tokens, text_tokens = rows * self.num_tokens, float(sums["text_room"])
        # Full rows: every token a real one, and all of a row in one image or text.
        padded = {
            **sums,
            "tokens": tokens,
            "attention_pairs": tokens * tokens / rows,
            "text_tokens": text_tokens,
            "text_attention_pairs": text_tokens * text_tokens / rows,
        }
        utilisation = {
            "throughput/mfu": self.flops(sums) / seconds / self.peak,
            "throughput/mfu_padded": self.flops(padded) / seconds / self.peak,
        }
        return {
            "throughput/step_seconds": seconds / sums["steps"],
            "throughput/images_per_second": sums["images"] / seconds,
            "throughput/tokens_per_second": sums["tokens"] / seconds,
            **({} if math.isnan(self.peak) else utilisation),
        }

    def evaluated(self, step: int, values: Mapping[str, float], seconds: float) -> None:
        """Writes an evaluation, whose time counts in no throughput."""
        self.seconds_aside += seconds
        shown = "  ".join(
            f"{name[5:]} {value:.4g}"
            for name, value in values.items()
            if name.endswith(SHOWN)
        )
        logging.info("step %d evaluated in %.1f s: %s", step, seconds, shown)
        self.writer.write(step, values)

    def close(self) -> None:
        """Closes the files."""
        self.writer.close()


def _text_padding(sums: Sums) -> dict[str, float]:
    """Empty where batches have no text."""
    if not (room := sums["text_room"]):
        return {}
    return {"pack/text_padding": 1 - sums["text_tokens"] / room}
