"""Eight CPU devices, a compilation cache, and parsed absl flags for every test."""

import os
import pathlib

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)

import jax
import pytest
from absl import flags

CACHE = pathlib.Path(__file__).parent.parent / ".cache" / "xla"
jax.config.update("jax_compilation_cache_dir", str(CACHE))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


@pytest.fixture(autouse=True, scope="session")
def parsed_flags():
    # grain reads absl flags, which only app.run() parses.
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()
