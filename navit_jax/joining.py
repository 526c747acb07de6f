"""Which process of how many this one is: said by flags, or by the cluster it is in."""

import os
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from absl import flags
from jax._src import clusters

from navit_jax.errors import ConfigError

# Beside the flags; JAX itself reads the first alone.
NAMES = {
    "coordinator": "JAX_COORDINATOR_ADDRESS",
    "num_processes": "JAX_NUM_PROCESSES",
    "process_id": "JAX_PROCESS_ID",
}
REMEDY = "give all of " + ", ".join(f"--{k} (or {v})" for k, v in NAMES.items())
# What may say in which cluster this is; nothing secret has such a name.
TELLING = re.compile(r"(JAX|SLURM|OMPI|TPU|MEGASCALE|JOB_COMPLETION)_")


class Place(NamedTuple):
    """Which process of a run this is.

    Attributes:
      coordinator: HOST:PORT at which process 0 waits for the others.
      num_processes: Of the run.
      process_id: Of this one, from 0.
      devices: Local ones that it uses; None is all.
      cluster: Who said so: "flags", or a cluster that JAX knows, as "slurm".
    """

    coordinator: str
    num_processes: int
    process_id: int
    devices: tuple[int, ...] | None
    cluster: str


def define_flags() -> Callable[[], Place | None]:
    """Defines the flags that say it, and returns what reads them: `find`'s place."""
    coordinator = flags.DEFINE_string("coordinator", None, "HOST:PORT of process 0")
    num = flags.DEFINE_string("num_processes", None, "Of the run")
    process_id = flags.DEFINE_string("process_id", None, "Of this process, from 0")
    cluster = flags.DEFINE_string(
        "cluster", "auto", "Who says which process this is: auto, none, slurm, ompi, .."
    )
    port = flags.DEFINE_integer(
        "coordinator_port", None, "Of process 0, if a cluster names its host alone"
    )
    devices = flags.DEFINE_list(
        "local_devices", [], "Numbers of this host's devices, or all; default: as JAX"
    )

    def read() -> Place | None:
        given = (coordinator.value, num.value, process_id.value)
        return find(given, cluster.value, port.value, devices.value)

    return read


def find(
    given: Sequence[str | None] = (None, None, None),
    cluster: str = "auto",
    port: int | None = None,
    devices: Sequence[str] = (),
    timeout: int = 300,
) -> Place | None:
    """Which process of how many this is; None where nothing says that there are more.

    Args:
      given: coordinator, num_processes, process_id; those of `NAMES` in the environment
        stand in for None.
      cluster: "auto", "none", or the name of one that JAX knows.
      port: Of the coordinator, where a cluster names its host alone.
      devices: As of --local_devices.
      timeout: Seconds to wait for the coordinator's name to be known.

    Raises:
      ConfigError: some of the three are missing or can not be, there is no such
        cluster, or what it says can not be read.
    """
    own = None
    if devices and list(devices) != ["all"]:
        own = tuple(_whole("--local_devices", each) for each in devices)
    names = NAMES.values()
    said = [
        os.environ.get(name) if value is None else value
        for name, value in zip(names, given, strict=True)
    ]
    if any(value is not None for value in said):
        return Place(*_check(*said), own, "flags")
    if cluster == "none" or (name := _find_cluster(cluster)) is None:
        return None
    known = _known()[name]
    try:
        address = known.get_coordinator_address(timeout, str(port) if port else None)
        num, process_id = known.get_process_count(), known.get_process_id()
        local = known.get_local_process_id()
    except Exception as error:
        raise ConfigError(
            f"the environment of {name} can not be read: {error!r}; "
            f"{tell_environment()}; {REMEDY}"
        ) from error
    if not devices and local is not None and name in ("slurm", "ompi") and num > 1:
        own = (local,)  # one process for each device, as JAX has it
    return Place(address, num, process_id, own, name)


def tell_environment() -> str:
    """The variables that may say in which cluster this is."""
    told = [f"{k}={v}" for k, v in sorted(os.environ.items()) if TELLING.match(k)]
    return "environment: " + (" ".join(told) or "nothing of a cluster")


def _check(
    address: str | None, num: str | None, process_id: str | None
) -> tuple[str, int, int]:
    if address is None or num is None or process_id is None:
        raise ConfigError(f"one of several processes: {REMEDY}")
    host, _, number = address.rpartition(":")
    if not host or not number.isdecimal():
        raise ConfigError(f"--coordinator={address}: give HOST:PORT, as 10.0.0.2:8476")
    total = _whole("--num_processes", num)
    index = _whole("--process_id", process_id)
    if index >= total:
        raise ConfigError(
            f"--process_id={index}: there are {total} processes, numbered from 0"
        )
    return address, total, index


def _known() -> dict[str, Any]:
    # That of Kubernetes is the one without a name.
    return {each.name or "k8s": each for each in clusters.ClusterEnv._cluster_types}


def _find_cluster(asked: str) -> str | None:
    known = _known()
    if asked == "auto":
        there = (
            name
            for name, each in known.items()
            if not each.opt_in_only_method and each.is_env_present()
        )
        return next(there, None)
    if asked not in known:
        raise ConfigError(f"--cluster={asked}: give auto, none, {', '.join(known)}")
    if not known[asked].is_env_present():
        raise ConfigError(f"--cluster={asked}: not there; {tell_environment()}")
    return asked


def _whole(flag: str, text: str) -> int:
    if not text.isdecimal():
        raise ConfigError(f"{flag}={text}: give a whole number")
    return int(text)
