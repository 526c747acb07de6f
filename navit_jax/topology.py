"""Devices that are not here: TPU topologies, for which this machine can compile.

It takes libtpu (the extra `tpu`), which is the compiler alone; no TPU is asked for.
"""

import dataclasses
import importlib.util
import math
import os
import re
from collections.abc import Mapping
from typing import Any

from navit_jax import peak_flops
from navit_jax.errors import ConfigError

GIB = 2**30
PEAK = peak_flops.PEAK_BFLOAT16


@dataclasses.dataclass(frozen=True)
class Chip:
    """What a device can do.

    Rates are a vendor's or, of networks, those of "How to scale your model"
    (jax-ml.github.io/scaling-book, chapter 2).

    Attributes:
      memory: Bytes.
      flops: Dense bfloat16 FLOP/s.
      clock: Cycles a second, what the products of its matrix units at their peak take.
      link: Bytes a second that a device sends along one axis of its torus, both ways.
      network: Bytes a second that it sends to another slice.
    """

    memory: int
    flops: float
    clock: float
    link: float
    network: float = 6.25e9


CHIPS: Mapping[str, Chip] = {
    "v4": Chip(32 * GIB, PEAK["TPU v4"], 1.05e9, 9e10),
    "v5e": Chip(16 * GIB, PEAK["TPU v5e"], 1.5e9, 9e10),
    "v5p": Chip(95 * GIB, PEAK["TPU v5p"], 1.75e9, 1.8e11),
    "v6e": Chip(32 * GIB, PEAK["TPU v6e"], 1.75e9, 1.8e11),
}
# What libtpu reads before it looks for a machine that is not there.
ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    # Compiling holds no device, so several may.
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


@dataclasses.dataclass(frozen=True)
class Topology:
    """Devices of one kind in a torus, or in several.

    Attributes:
      text: As it was asked for.
      chip: Each device's.
      devices: As `sharding.make_mesh` takes them.
      slices: How many toruses.
    """

    text: str
    chip: Chip
    devices: tuple[Any, ...]
    slices: int


def open_topology(text: str) -> Topology:
    """The devices of a topology, as "v5e:16x16", or of several slices, "2*v5e:16x16".

    "here" is the devices of this machine.

    Raises:
      ConfigError: it is nothing of the kind, there is none, or libtpu is missing.
    """
    if text == "here":
        return _open_here()
    form = re.fullmatch(r"(?:(\d+)\*)?(\w+):(\d+(?:x\d+){1,2})", text)
    if not form or form[2] not in CHIPS or form[1] == "0":
        raise ConfigError(
            f"--topology={text}: give a chip of {', '.join(CHIPS)} and its torus, as "
            "v5e:16x16 or v5p:4x4x4, of several slices 2*v5e:16x16; or here"
        )
    if not importlib.util.find_spec("libtpu"):
        raise ConfigError(
            f"--topology={text}: compiling for TPUs needs libtpu: "
            "pip install 'navit_jax[tpu]'"
        )
    slices = int(form[1] or 1)
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    from jax.experimental import topologies

    options: dict[str, Any] = {"num_slices": slices} if slices > 1 else {}
    if form[2] == "v4":
        options["chip_config_name"] = (
            "megacore"  # one device a chip, as on its machines
        )
    try:
        found = topologies.get_topology_desc(
            platform="tpu", topology_name=f"{form[2]}:{form[3]}", **options
        )
    except Exception as error:
        raise ConfigError(f"--topology={text}: {error}") from error
    return Topology(text, CHIPS[form[2]], tuple(found.devices), slices)


def _open_here() -> Topology:
    import jax

    devices = jax.devices()
    limit = (devices[0].memory_stats() or {}).get("bytes_limit")
    # Devices of a CPU share its memory; what goes between them is not known.
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // len(devices)
    flops = peak_flops.peak_flops(devices[0])
    chip = Chip(limit or memory, flops, math.inf, math.inf, math.inf)
    return Topology("here", chip, tuple(devices), 1)
