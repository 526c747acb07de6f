"""Which mesh, accumulation and rematerialisation a config would train fastest with."""

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

from absl import logging

from navit_jax import pods
from navit_jax.data import Stream
from navit_jax.errors import ConfigError
from navit_jax.topology import Topology

HEADER = ("replica", "fsdp", "tensor", "accumulate", "remat", "GiB a device",
          "s a step", "images/s", "MFU")  # fmt: skip


def list_meshes(on: Topology) -> list[dict[str, int]]:
    """Parameters split over all devices, over some 16 and 1 of them, heads over 2.

    Replicas alone are over several slices.
    """
    num, slices = len(on.devices), on.slices
    replicas = {slices, num, math.lcm(slices, max(1, num // 16))}
    meshes = [
        {"replica": replica, "fsdp": num // replica // tensor, "tensor": tensor}
        for replica, tensor in itertools.product(sorted(replicas), (1, 2))
        if num % (replica * tensor) == 0
    ]
    return meshes


def search(
    config: Mapping[str, Any],
    stream: Stream,
    on: Topology,
    classes: int,
    meshes: Sequence[Mapping[str, int]] = (),
    accumulate: Sequence[int] = (1, 2, 4),
    remat: Sequence[str] = ("light", "full"),
) -> list[dict[str, Any]]:
    """What each choice takes, as of `pods.account`, the fastest first.

    One that does not fit, or that the rows do not divide, is told in the log alone.
    """
    found = []
    choices = list(itertools.product(meshes or list_meshes(on), accumulate, remat))
    for number, (mesh, passes, policy) in enumerate(choices, 1):
        changed = {
            **config,
            "mesh": mesh,
            "train": {**config.get("train", {}), "accumulate": passes},
            "model": {**config["model"], "remat": policy},
        }
        told = f"{number} of {len(choices)}: {mesh}, accumulate {passes}, {policy}"
        try:
            found.append(pods.account(changed, stream, on, classes))
            logging.info("%s: fits", told)
        except ConfigError as error:
            logging.info("%s: %s", told, error)
    return sorted(found, key=lambda each: each["seconds"]["without overlap"])


def format_table(found: Sequence[Mapping[str, Any]]) -> str:
    """A Markdown table."""
    lines = [f"| {' | '.join(HEADER)} |", "|---" * len(HEADER) + "|"]
    for each in found:
        cells = [
            *map(str, each["mesh"].values()),
            str(each["accumulate"]),
            each["remat"],
            f"{each['memory']['total'] / 2**30:.2f}",
            f"{each['seconds']['without overlap']:.4f}",
            f"{each['images_per_second']:,.0f}",
            f"{each['mfu']:.1%}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
