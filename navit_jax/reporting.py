"""What a run tells: a progress line, metrics.jsonl, TensorBoard events."""

import contextlib
import importlib
import json
import math
import socket
import time
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
import tqdm
from absl import logging
from etils import epath
from jax.experimental import multihost_utils

from navit_jax import storage
from navit_jax.batch import BatchInfo, PackedBatch
from navit_jax.errors import CheckpointError


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
        self._log = storage.Log(self.path, [json.dumps(r) for r in kept])
        self._events = _open_events(workdir, first_step)

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Writes one record; numbers that are not finite become null in the JSON."""
        if not self.active:
            return
        record = {"step": step} | {k: _json_number(v) for k, v in values.items()}
        try:
            self._log.append(json.dumps(record))
        except OSError as error:
            raise CheckpointError(
                f"{self.path} can not be written: {error}. Make room or mend the "
                "folder, and start the same command again"
            ) from error
        if self._events is None:
            return
        try:
            _write_scalars(self._events, step, values)
        except OSError as error:
            logging.warning("TensorBoard events stop here: %s", error)
            self.close()

    def close(self) -> None:
        """Closes the event file, even if what is left of it finds no room."""
        events, self._events = self._events, None
        if events is not None:
            with contextlib.suppress(OSError):
                events.close()


def _write_scalars(events: Any, step: int, values: Mapping[str, Any]) -> None:
    from tensorboardX import summary

    for name, value in values.items():
        if isinstance(value, int | float) and math.isfinite(value):
            _write_event(events, step=step, summary=summary.scalar(name, value))
    events.flush()


def _write_event(events: Any, **fields: Any) -> None:
    event = _event_classes().Event(wall_time=time.time(), **fields)
    events.write(event.SerializeToString())


def read_metrics(workdir: epath.Path) -> list[dict[str, Any]]:
    """The records of `metrics.jsonl`; a line cut short by a crash is left out."""
    path, records = workdir / "metrics.jsonl", []
    for line in storage.read_log(path):
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            logging.warning(
                "%s: a line was cut short and is left out: %.40r", path, line
            )
    return records


def was_evaluated(workdir: epath.Path, step: int) -> bool:
    """Whether an evaluation of that step is on record; all processes agree."""
    found = jax.process_index() == 0 and any(
        record["step"] == step and any(key.startswith("eval/") for key in record)
        for record in read_metrics(workdir)
    )
    return bool(multihost_utils.broadcast_one_to_all(np.bool_(found)))


def _open_events(workdir: epath.Path, first_step: int) -> Any:
    if not storage.is_local(workdir):
        logging.info("no TensorBoard events on %s, which can not append", workdir)
        return None
    try:
        from tensorboardX.record_writer import RecordWriter

        # Not its SummaryWriter: that one's thread dies of a full disk in silence, and
        # then it waits for ever.
        folder, host = workdir / "tensorboard", socket.gethostname()
        folder.mkdir(parents=True, exist_ok=True)
        name = f"events.out.tfevents.{time.time():.0f}.{host}"
        events = RecordWriter(str(folder / name))
        _write_event(events, file_version="brain.Event:2")
        # Hides what an earlier writer told of later steps: the run makes them again.
        log = _event_classes().SessionLog
        start = log(status=log.START)
        _write_event(events, step=first_step + 1, session_log=start)
        return events
    except OSError as error:
        logging.warning("no TensorBoard events: %s", error)
        return None


def _event_classes() -> Any:
    # Imported by name: protobuf makes its classes at run time.
    return importlib.import_module("tensorboardX.proto.event_pb2")


def _json_number(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


class Clock:
    """Throughput over the last interval and the time left, on the monotonic clock."""

    def __init__(self, steps: int):
        """The first tick starts the clock: the first step compiles."""
        self.steps = steps
        self.begun: float | None = None

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


def watch(
    stream: Any, title: str, rows: Any = None
) -> Iterator[tuple[PackedBatch, BatchInfo]]:
    """Batches of one pass, with a bar of images and time left where it takes a while.

    Args:
      stream: A `data.Stream` of an evaluation.
      rows: As in its `batches`; None is all rows.
    """
    rows = np.arange(stream.plan.rows) if rows is None else rows
    total, hosts = sum(map(len, stream.plan.tables)), jax.process_count()
    with tqdm.tqdm(
        total=total,
        desc=title,
        unit="img",
        delay=5,
        mininterval=2,
        disable=jax.process_index() > 0,
    ) as bar:
        for host, info in stream.batches(rows):
            yield host, info
            bar.update(hosts * int(host.image_mask.sum()))


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
        show("pack/text_padding", ".2%", "of text"),
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
