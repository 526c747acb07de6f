"""The commands that a run's folder can be given, for its report."""

import shlex
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from navit_jax import experiment, models


def list_commands(
    config: Mapping[str, Any], folder: str, argv: Sequence[str] = ()
) -> list[str]:
    """Lines for a shell that fit the run.

    Args:
      argv: Arguments with which it was trained, if known.
    """
    where = f"--workdir={shlex.quote(folder)}"
    lines = [f"python -m navit_jax.train {shlex.join(argv)}"] if argv else []
    if config.get("evals"):
        parts = ["python -m navit_jax.evaluate", where, *_dial(config)]
        lines.append(" ".join(parts))
    # What others give is no probability of a class.
    if config["task"].get("name") == "classification":
        lines.append(
            f"python -m navit_jax.predict {where} --images=FOLDER "
            "--output=predictions.csv"
        )
    return lines


def _dial(config: Mapping[str, Any]) -> Iterator[str]:
    """The sides and budgets of all eval sets, as far as the model's positions reach."""
    patch = models.patch_size(config["model"]["size"])
    longest = experiment.build_encoder(config).max_side

    def reached(side: float | int) -> bool:
        return side < (longest + 1) * patch

    found: dict[str, dict[Any, None]] = {"sides": {}, "budgets": {}}
    for section in config["evals"].values():
        for side in section.get("sides", ()):
            if side == "native" or reached(side):
                found["sides"][side] = None
        for tokens in section.get("budgets", ()):
            if reached(tokens**0.5 * patch):
                found["budgets"][tokens] = None
    for flag, values in found.items():
        if values:
            yield f"--{flag}={','.join(map(str, values))}"
