"""Vision transformers on images of any size and shape, in JAX."""

import importlib
from typing import Any

__version__ = "0.1.0"

# Where a name comes from; imported when it is asked for, so that this package loads
# quickly and touches no device.
LAZY = {
    "check_isolation": "navit_jax.isolation",
    "find_nonfinite": "navit_jax.isolation",
    "PackedBatch": "navit_jax.batch",
    "packed_attention": "navit_jax.models.attention",
    "NaViT": "navit_jax.models.navit",
    "assign_rows": "navit_jax.data.packers",
    "load": "navit_jax.pretrained",
}


def __getattr__(name: str) -> Any:
    if name in LAZY:
        return getattr(importlib.import_module(LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *LAZY])
