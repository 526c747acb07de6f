"""The record beside the arrays of a checkpoint: what it should hold, as JSON.

{"format": 1, "digest": sha256 of the body, "body": {"metadata": ..., "metrics": ...,
"best": [metric, "max" or "min"], "leaves": {path: {"checksum", "shape", "dtype"}}}}
"""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

from navit_jax import checksums, paths
from navit_jax.config import nearest
from navit_jax.errors import CheckpointError, ConfigError

FILE = "run.json"
FORMAT = 1


class Damaged(Exception):
    """A checkpoint is not what was written: names the leaf and the reason."""


def make(
    state: Any,
    metadata: Mapping[str, Any],
    metrics: Mapping[str, float],
    best: Sequence[str],
) -> dict[str, Any]:
    """The record of a state that is about to be saved."""
    sums = checksums.compute(state)
    body = {
        "metadata": dict(metadata),
        "metrics": {name: float(value) for name, value in metrics.items()},
        "leaves": {
            name: {
                "checksum": sums[name],
                "shape": list(leaf.shape),
                "dtype": str(leaf.dtype),
            }
            for name, leaf in paths.flatten(state).items()
        },
        "best": list(best),
    }
    return {"format": FORMAT, "digest": _digest(body), "body": body}


def read(path: epath.Path) -> dict[str, Any]:
    """Reads and proves the record of the checkpoint in `path`.

    Raises:
      Damaged: it is missing, cut or changed.
      CheckpointError: a newer version of this code wrote it.
    """
    try:
        record = json.loads((path / "run" / FILE).read_text())
        version, digest, body = record["format"], record["digest"], record["body"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise Damaged(f"the record run/{FILE} can not be read: {error!r}") from error
    if isinstance(version, int) and version > FORMAT:
        raise CheckpointError(
            f"{path} has format {version}, newer than {FORMAT}, the newest this code "
            "knows: install a newer navit_jax"
        )
    if version != FORMAT or digest != _digest(body):
        raise Damaged(f"the digest of the record run/{FILE} differs")
    return record


def check_leaves(
    wanted: Mapping[str, Any], saved: Mapping[str, Any], path: epath.Path
) -> None:
    """Compares the leaves that a run has with those a checkpoint holds.

    Raises:
      ConfigError: one is not there, or has another shape or dtype.
    """
    for name, leaf in wanted.items():
        if name not in saved:
            raise ConfigError(
                f"the checkpoint {path} has no {name}: it is of another model or "
                f"optimizer; {nearest(name, saved)}. Take its config, or a new folder"
            )
        mine = (list(leaf.shape), str(leaf.dtype))
        held = (saved[name]["shape"], saved[name]["dtype"])
        if mine != held:
            raise ConfigError(
                f"the checkpoint {path} has {name} as {held[1]} {held[0]}, the "
                f"config asks for {mine[1]} {mine[0]}. Take its config, or a new folder"
            )


def locate(leaves: Mapping[str, Any], subtree: str, path: epath.Path) -> dict[str, str]:
    """Where each leaf under `subtree` is in a checkpoint, by its path there.

    Of the running mean "ema" those of frozen parameters are not kept: they are these.

    Raises:
      CheckpointError: there is no such part.
    """
    parts = {name.split("/")[0] for name in leaves}
    if subtree not in parts:
        raise CheckpointError(f"{path} holds no {subtree!r}; it holds {sorted(parts)}")
    found = {}
    for part in ["params", "ema"] if subtree == "ema" else [subtree]:
        prefix = part + "/"
        found |= {n.removeprefix(prefix): n for n in leaves if n.startswith(prefix)}
    return found


def _digest(body: Any) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def score(body: Mapping[str, Any], best: Sequence[str] | None) -> float | None:
    """How good a checkpoint is by (metric, "max" or "min"): more is better.

    None if it was saved without that metric, or the metric was a NaN.
    """
    metric, mode = best or ("", "max")
    value = body["metrics"].get(metric)
    if value is None or math.isnan(value):
        return None
    return value if mode == "max" else -value
