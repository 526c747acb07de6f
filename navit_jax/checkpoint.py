"""Keeps the state of a run on disk, and proves on reading that it is what was written.

A checkpoint is a folder `<step>/` with two items: `state`, the arrays (orbax), and
`run/run.json`, the record: what the caller gave (position, config, versions, ...), the
checksum, shape and dtype of every leaf, and a digest of itself. Leaves are stored under
their paths, so neither class names nor code are in a checkpoint.
"""

import types
from collections.abc import Callable, Mapping
from typing import Any

import jax
import orbax.checkpoint as ocp
from absl import logging
from etils import epath
from jax.experimental import multihost_utils

from navit_jax import checksums, paths, records, saved_steps, storage
from navit_jax.errors import CheckpointError, ConfigError
from navit_jax.retention import Retention
from navit_jax.saved_steps import Restored


class Checkpoints:
    """The checkpoints of one run, which this process (or job) alone writes.

    Saving happens in the background; if it fails, the next call of any method raises.
    Left-overs of interrupted saves are removed at the start.
    """

    def __init__(
        self,
        folder: epath.PathLike,
        keep: int = 3,
        keep_period: int = 0,
        best: str = "",
        best_mode: str = "max",
        resume: str = "",
    ):
        """Opens the folder, or creates it.

        Args:
          keep: How many of the newest checkpoints stay.
          keep_period: Checkpoints of steps that are multiples of it stay for ever; 0
            for none.
          best: The metric whose best checkpoint stays too, as
            `eval/test_64/accuracy`; "" for none. Checkpoints saved without it are never
            the best.
          best_mode: `max` or `min`.
          resume: The folder of another run, to go on from while there is no checkpoint
            here; "" for none. Nothing in it is changed.

        Raises:
          ConfigError: an argument out of range, or a folder that can not be written.
        """
        if keep < 1 or keep_period < 0 or best_mode not in ("max", "min"):
            raise ConfigError(
                f"config.checkpoint: keep={keep} must be 1 or more, keep_period="
                f"{keep_period} 0 or more, best_mode={best_mode!r} 'max' or 'min'"
            )
        self._folder = epath.Path(folder)
        self._resume = storage.locate(resume) / "checkpoints" if resume else None
        self._saving: int | None = None
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            if jax.process_index() == 0:
                saved_steps.remove_leftovers(self._folder)
        except OSError as error:
            raise ConfigError(
                f"the checkpoint folder {self._folder} can not be written: {error}"
            ) from error
        self._retention = Retention(keep, keep_period, best, best_mode)
        self._retention.read(self._folder)
        self._manager = ocp.CheckpointManager(
            self._folder,
            options=ocp.CheckpointManagerOptions(preservation_policy=self._retention),
            item_handlers={
                "state": ocp.PyTreeCheckpointHandler(),
                "run": ocp.JsonCheckpointHandler(filename=records.FILE),
            },
        )

    def save(
        self,
        step: int,
        state: Any,
        metadata: Mapping[str, Any],
        metrics: Mapping[str, float] = types.MappingProxyType({}),
    ) -> bool:
        """Starts to save a state; returns as soon as it may be changed or donated.

        Args:
          state: Any tree of jax arrays.
          metadata: JSON-able: the position in the data, the config, fingerprints.
          metrics: Numbers measured on this very state.

        Returns:
          Whether it is being saved. Not so, with a line in the log, if the step is not
          after the last one, or if a floating leaf holds a NaN or an infinity: such a
          state never becomes the newest checkpoint.

        Raises:
          CheckpointError: this or the previous save failed, as on a full disk. The
            earlier checkpoints are whole.
        """
        self.wait()
        latest = self._manager.latest_step()
        if latest is not None and step <= latest:
            logging.info("Step %d is not saved: step %d is there.", step, latest)
            return False
        bad = checksums.find_nonfinite(state)
        if bad:
            logging.error("Step %d is not saved: not finite: %s", step, ", ".join(bad))
            return False
        record = records.make(state, metadata, metrics, self._retention.best)
        self._retention.note(step, record)
        self._saving = step
        try:
            return self._manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.PyTreeSave(paths.nest(paths.flatten(state))),
                    run=ocp.args.JsonSave(record),
                ),
                force=True,
            )
        except Exception as error:
            raise self._failed(error) from error

    def wait(self) -> None:
        """Waits until the save in the background is complete.

        Raises:
          CheckpointError: it failed.
        """
        try:
            self._manager.wait_until_finished()
        except Exception as error:
            raise self._failed(error) from error

    def _failed(self, error: Exception) -> CheckpointError:
        step, self._saving = self._saving, None
        self._manager.reload()
        return CheckpointError(
            f"saving step {step} to {self._folder} failed: {error}\nThe checkpoints "
            f"before it, {saved_steps.find(self._folder)}, are as they were. Make room "
            "or mend the folder, and start the same command again."
        )

    def restore(self, abstract: Any, steps: int | None = None) -> Restored | None:
        """Reads the newest checkpoint that is whole; None if there are none at all.

        A damaged newer one is logged and set aside as `<step>.damaged`, so that its
        step can be saved again. Those of another run that `resume` names are read if
        there are none here, and stay as they are.

        Args:
          abstract: The state as `jax.ShapeDtypeStruct`s with the shardings wanted, of
            any mesh.
          steps: Of the run that goes on from another one.

        Raises:
          CheckpointError: there are checkpoints and none is whole, or the newest was
            written by a newer version of this code.
          ConfigError: the checkpoint holds another tree of parameters, or `resume`
            names a folder without one, or a run that has done all `steps`.
        """
        self.wait()
        restored, damaged = saved_steps.read_newest_whole(self._folder, abstract)
        if damaged and jax.process_index() == 0:
            for step in damaged:
                saved_steps.set_aside(self._folder / str(step))
        if damaged:
            multihost_utils.sync_global_devices("navit_jax.checkpoint.set_aside")
            self._manager.reload()
            self._retention.forget(damaged)
        if restored or not self._resume:
            return restored
        restored, _ = saved_steps.read_newest_whole(self._resume, abstract)
        if not restored:
            raise ConfigError(
                f"config.checkpoint.resume={str(self._resume.parent)!r} has no "
                f"checkpoint ({self._resume} is empty or missing): give the --workdir "
                "of a run that has saved, or leave it out to start from scratch"
            )
        if steps is not None and restored.step >= steps:
            raise ConfigError(
                f"config.checkpoint.resume={str(self._resume.parent)!r} goes on after "
                f"step {restored.step}: raise config.steps={steps}"
            )
        logging.info("going on from %s, step %d", self._resume.parent, restored.step)
        return restored

    def close(self) -> None:
        """Waits for the save in the background, and lets the folder go.

        Raises:
          CheckpointError: that save failed.
        """
        self.wait()
        self._manager.close()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def restore_params(
    folder: epath.PathLike,
    step: int | str | None = None,
    subtree: str = "params",
    shardings: Callable[[Any], Any] | None = None,
) -> Restored:
    """Reads the parameters of a run, which may be running; changes nothing in it.

    Args:
      step: A step; None for the newest checkpoint that is whole; or "best", by the
        metric that the run keeps the best of.
      subtree: The part of the state to read, as `params` or `ema`.
      shardings: A function from the tree of shapes to a tree of shardings; everything
        on the first local device without it.

    Raises:
      CheckpointError: there is no such checkpoint, or it is damaged.
    """
    folder = epath.Path(folder)
    candidates = _candidates(folder, step)
    for candidate in candidates:
        path = folder / str(candidate)
        try:
            leaves = records.read(path)["body"]["leaves"]
            located = records.locate(leaves, subtree, path)
            abstract = paths.nest({n: _shape(leaves[at]) for n, at in located.items()})
            places = shardings(abstract) if shardings else _first_device(abstract)
            placed = paths.flatten(jax.tree.map(_place, abstract, places))
            wanted = paths.nest({located[name]: leaf for name, leaf in placed.items()})
            restored = saved_steps.read(folder, candidate, wanted)
            found = paths.flatten(restored.state)
            state = paths.nest({name: found[at] for name, at in located.items()})
            return restored._replace(state=state)
        except records.Damaged as error:
            logging.error("CHECKPOINT DAMAGED: %s: %s", path, error)
    raise CheckpointError(
        f"{folder} has no whole checkpoint for step={step!r}; it has the steps "
        f"{saved_steps.find(folder)}"
        + (f", of which {candidates} are damaged" if candidates else "")
        + ("; config.checkpoint.best names what is best" if step == "best" else "")
    )


def _candidates(folder: epath.Path, step: int | str | None) -> list[int]:
    """The steps that will do, the preferred one first."""
    there = saved_steps.find(folder)[::-1]
    if step is None:
        return there
    if step != "best":
        return [step] if step in there else []
    bodies = {}
    for candidate in there:
        try:
            bodies[candidate] = records.read(folder / str(candidate))["body"]
        except records.Damaged as error:
            logging.error("CHECKPOINT DAMAGED: %s/%d: %s", folder, candidate, error)
    # What the run calls best now; its config may have changed on the way.
    best = next((body["best"] for body in bodies.values()), None)
    scores = {c: records.score(body, best) for c, body in bodies.items()}
    scored = [candidate for candidate in there if scores.get(candidate) is not None]
    return sorted(scored, key=lambda c: (scores[c], c), reverse=True)


def _shape(leaf: Mapping[str, Any]) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf["shape"], leaf["dtype"])


def _place(leaf: jax.ShapeDtypeStruct, sharding: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _first_device(abstract: Any) -> Any:
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.tree.map(lambda _: device, abstract)
