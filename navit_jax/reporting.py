"""What a run tells: a progress line, metrics.jsonl, TensorBoard events."""

import json
import math
import time
import warnings
from collections.abc import Mapping
from typing import Any

from absl import logging
from etils import epath


class MetricWriter:
    """Appends records to `metrics.jsonl` and scalars to TensorBoard events.

    A failing TensorBoard folder is reported once and then left alone: a run does not
    end because a curve can not be drawn.
    """

    def __init__(self, workdir: epath.Path, first_step: int = 0, active: bool = True):
        """Drops records of steps beyond `first_step`, which a resumed run makes again.

        Args:
          active: Whether this process writes; one of a job does.
        """
        self.path, self.active = workdir / "metrics.jsonl", active
        self._events = None
        if not active:
            return
        kept = [r for r in read_metrics(workdir) if r["step"] <= first_step]
        self.path.write_text("".join(json.dumps(r) + "\n" for r in kept))
        self._events = _open_events(workdir, first_step)

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Writes one record; numbers that are not finite become null in the JSON."""
        if not self.active:
            return
        record = {"step": step} | {k: _json_number(v) for k, v in values.items()}
        with self.path.open("a") as file:
            file.write(json.dumps(record) + "\n")
        if self._events is None:
            return
        try:
            for name, value in values.items():
                if isinstance(value, int | float):
                    self._events.add_scalar(name, value, step)
            self._events.flush()
        except OSError as error:
            logging.warning("TensorBoard events stop here: %s", error)
            self._events = None

    def close(self) -> None:
        """Closes the event file."""
        if self._events is not None:
            self._events.close()


def read_metrics(workdir: epath.Path) -> list[dict[str, Any]]:
    """The records of `metrics.jsonl`; a line cut short by a crash is left out."""
    path = workdir / "metrics.jsonl"
    if not path.exists():
        return []
    records = []
    for line in path.read_text().splitlines():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            logging.warning(
                "%s: a line was cut short and is left out: %.40r", path, line
            )
    return records


def _open_events(workdir: epath.Path, first_step: int) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import tensorboardX

        # Steps beyond purge_step are hidden from the curves: the run makes them again.
        return tensorboardX.SummaryWriter(
            str(workdir / "tensorboard"), purge_step=first_step + 1, flush_secs=60
        )
    except OSError as error:
        logging.warning("no TensorBoard events: %s", error)
        return None


def _json_number(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


class Clock:
    """Throughput over the last interval and the time left, on the monotonic clock."""

    def __init__(self, first_step: int, steps: int):
        """Starts the clock after the first step, which compiles."""
        self.first_step, self.steps = first_step, steps
        self.begun: float | None = None
        self.interval = 0.0

    def tick(self, step: int, seconds_aside: float = 0.0) -> tuple[float, float]:
        """Seconds since the last tick, and seconds left of the run at the mean pace.

        Args:
          seconds_aside: Time since the last tick that was not spent on steps.
        """
        now = time.monotonic()
        if self.begun is None:
            self.begun, self.begun_step, self.last = now, step, now
            return float("nan"), float("nan")
        self.begun += seconds_aside
        passed, self.last = now - self.last - seconds_aside, now
        pace = (now - self.begun) / max(step - self.begun_step, 1)
        return passed, pace * (self.steps - step)


def progress_line(step: int, steps: int, left: float, values: Mapping[str, Any]) -> str:
    """One line a person reads: where the run is, how it does, how long it takes."""

    def show(name: str, form: str, label: str) -> str:
        value = values.get(name)
        return "" if value is None else f"  {label} {value:{form}}"

    parts = [
        f"step {step}/{steps} {step / max(steps, 1):4.0%}",
        f"  left {duration(left)}",
        show("train/loss", ".4f", "loss"),
        show("train/accuracy", ".3f", "accuracy"),
        show("throughput/images_per_second", ".0f", "images/s"),
        show("throughput/tokens_per_second", ",.0f", "tokens/s"),
        show("pack/padding", ".2%", "padding"),
        show("throughput/mfu", ".1%", "MFU"),
        show("data/skipped", ",.0f", "skipped") if values.get("data/skipped") else "",
    ]
    return "".join(parts)


def duration(seconds: float | int) -> str:
    """Seconds as 1h02m, 3m05s or 9s; ? if unknown."""
    if not math.isfinite(seconds):
        return "?"
    hours, rest = divmod(round(seconds), 3600)
    minutes, rest = divmod(rest, 60)
    if hours:
        return f"{hours}h{minutes:02d}m"
    return f"{minutes}m{rest:02d}s" if minutes else f"{rest}s"
