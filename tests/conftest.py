"""Eight CPU devices, quick compilation, and parsed absl flags for every test."""

import gc
import importlib.metadata
import os
import pathlib
import resource
import signal
import sys

os.environ["JAX_PLATFORMS"] = "cpu"
# Tests compile much and compute little: unoptimised code takes a third of the time.
FLAGS = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
# In one piece: 32 that are compiled side by side take an eighth more in all.
FLAGS += " --xla_cpu_parallel_codegen_split_count=1"
if importlib.metadata.version("jax") < "0.11":  # the flag is gone there
    FLAGS += " --xla_cpu_use_fusion_emitters=false"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {FLAGS}"
# Commands that tests start find what was compiled here, and the other way round.
CACHE = pathlib.Path(__file__).parent.parent / ".cache" / "xla"
os.environ["JAX_COMPILATION_CACHE_DIR"] = str(CACHE)
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.2"
if os.environ.pop("PYTHONDONTWRITEBYTECODE", None):
    # They would compile all that they import, which takes as long as importing it.
    os.environ["PYTHONPYCACHEPREFIX"] = str(CACHE.parent / "bytecode")
    sys.pycache_prefix = os.environ["PYTHONPYCACHEPREFIX"]
    sys.dont_write_bytecode = False

import hypothesis  # noqa: E402

# Equal to the bit on equal numbers of threads only: as many on every machine.
if hasattr(os, "sched_setaffinity"):
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:2])

import pytest  # noqa: E402
from absl import flags  # noqa: E402

# The same examples every time: what passed once is what a change is judged by.
hypothesis.settings.register_profile("fixed", derandomize=True)
hypothesis.settings.load_profile("fixed")


@pytest.fixture(autouse=True, scope="session")
def parsed_flags():
    # grain reads absl flags, which only app.run() parses.
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()


@pytest.fixture(autouse=True, scope="module")
def frozen():
    """What the files before left, as what is compiled, is not searched for garbage."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def full_at():
    """Sets the size in bytes of a file at which the disk is full; -1 makes room."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    signal.signal(signal.SIGXFSZ, before)
