"""Finds and reads the checkpoints in a folder, and proves them whole."""

from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from etils import epath
from jax.experimental import multihost_utils

from navit_jax import checksums, paths, records
from navit_jax.errors import CheckpointError


class Restored(NamedTuple):
    """A checkpoint that was read and found whole.

    Attributes:
      step: The step it was saved at.
      state: The tree that was asked for.
      metadata: What the caller of `save` gave, after a round through JSON.
    """

    step: int
    state: Any
    metadata: dict[str, Any]


def find(folder: epath.PathLike) -> list[int]:
    """The steps with a checkpoint, ascending, whether they are whole or not."""
    folder = epath.Path(folder)
    if not folder.exists():
        return []
    return sorted(int(path.name) for path in folder.iterdir() if path.name.isdigit())


def read_newest_whole(
    folder: epath.Path, abstract: Any
) -> tuple[Restored | None, list[int]]:
    """The newest checkpoint that is whole, and the damaged steps after it.

    Raises:
      CheckpointError, ConfigError: as `Checkpoints.restore`.
    """
    candidates, damaged = find(folder)[::-1], []
    while True:
        # Process 0 says which is next: a listing may be stale on another host.
        step = int(
            multihost_utils.broadcast_one_to_all(
                np.int32(candidates[0] if candidates else -1)
            )
        )
        if step < 0:
            break
        candidates = [candidate for candidate in candidates if candidate < step]
        try:
            restored, reason = read(folder, step, abstract), ""
        except records.Damaged as error:
            restored, reason = None, str(error)
        whole = multihost_utils.process_allgather(np.bool_(restored is not None))
        if whole.all():
            return restored, damaged
        damaged.append(step)
        logging.error(
            "CHECKPOINT DAMAGED: step %d in %s can not be used: %s. Trying the one "
            "before it.",
            step,
            folder,
            reason or "another process could not read it",
        )
    if damaged:
        raise CheckpointError(
            f"none of the checkpoints in {folder} can be used (steps {damaged}; the "
            "reasons are in the log). Restore the folder from a copy, or take a new one"
        )
    return None, []


def read(folder: epath.PathLike, step: int, abstract: Any) -> Restored:
    """Reads one checkpoint, or a part of its tree, and proves its checksums.

    Args:
      abstract: A tree of `jax.ShapeDtypeStruct`s with shardings, each of whose leaves
        the checkpoint holds under its path.

    Raises:
      Damaged: a file is missing, cut or changed; it names the leaf and the reason.
      CheckpointError: a newer version of this code wrote it.
      ConfigError: the checkpoint does not hold these leaves.
    """
    path = epath.Path(folder) / str(step)
    body = records.read(path)["body"]
    wanted = paths.flatten(abstract)
    records.check_leaves(wanted, body["leaves"], path)
    nested = paths.nest(wanted)
    try:
        found = ocp.Checkpointer(ocp.PyTreeCheckpointHandler()).restore(
            path / "state",
            args=ocp.args.PyTreeRestore(
                item=nested,
                restore_args=ocp.checkpoint_utils.construct_restore_args(nested),
                partial_restore=True,
            ),
        )
    except Exception as error:
        # Whatever is wrong with a file, tensorstore and orbax raise anything.
        reason = str(error).split(" [tensorstore_spec")[0]
        raise records.Damaged(f"orbax can not read it: {reason}") from error
    leaves = paths.flatten(found)
    for name, checksum in checksums.compute(leaves).items():
        if checksum != body["leaves"][name]["checksum"]:
            raise records.Damaged(f"the checksum of {name} differs")
    state = jax.tree.unflatten(
        jax.tree.structure(abstract), [leaves[name] for name in wanted]
    )
    return Restored(step, state, body["metadata"])


def remove_leftovers(folder: epath.Path) -> None:
    """Removes what interrupted saves left; nothing else may be saving."""
    for path in folder.iterdir():
        if ".orbax-checkpoint-tmp" in path.name:
            logging.warning("Removing %s, left by an interrupted save.", path)
            path.rmtree()


def set_aside(path: epath.Path) -> None:
    """Renames a damaged checkpoint, so that it is kept but no longer found."""
    aside, count = path.parent / f"{path.name}.damaged", 1
    while aside.exists():
        count += 1
        aside = path.parent / f"{path.name}.damaged{count}"
    logging.error("Setting %s aside as %s.", path, aside)
    path.rename(aside)
