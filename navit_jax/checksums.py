"""Computes checksums of arrays where they lie, equal under any sharding.

Each element counts as its bits mixed with its index in the global array, so a flipped
bit always changes the sum, and swapped elements do but for one chance in 2^32.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, UInt32

from navit_jax import paths


def compute(tree: Any) -> dict[str, int]:
    """The checksum of each leaf by its path; integers, floats, booleans, typed keys."""
    sums = jax.device_get(_compute(paths.flatten(tree)))
    return {name: int(value) for name, value in sums.items()}


def find_nonfinite(tree: Any) -> list[str]:
    """The paths of floating leaves that hold a NaN or an infinity."""
    finite = jax.device_get(_finite(paths.flatten(tree)))
    return [name for name, good in finite.items() if not good]


@jax.jit
def _compute(leaves: dict[str, Array]) -> dict[str, UInt32[Array, ""]]:
    return {name: _checksum(leaf) for name, leaf in leaves.items()}


@jax.jit
def _finite(leaves: dict[str, Array]) -> dict[str, Array]:
    return {
        name: jnp.isfinite(leaf).all()
        for name, leaf in leaves.items()
        if jnp.issubdtype(leaf.dtype, jnp.floating)
    }


def _checksum(x: Array) -> UInt32[Array, ""]:
    words = _words(x)
    index = jnp.zeros(words.shape, jnp.uint32)
    for dim in range(words.ndim):
        stride = np.uint32(math.prod(words.shape[dim + 1 :]) % 2**32)
        place = jax.lax.broadcasted_iota(jnp.uint32, words.shape, dim)
        index += stride * place
    return jnp.sum(_mix(words ^ _mix(index + np.uint32(1))), dtype=jnp.uint32)


def _words(x: Array) -> UInt32[Array, "..."]:
    """The bits of each element as one word, or as several in a new last dimension."""
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        x = jax.random.key_data(x)
    if x.dtype == jnp.bool_:
        x = x.astype(jnp.uint8)
    size = min(x.dtype.itemsize, 4)
    bits = jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * size}"))
    return bits.astype(jnp.uint32)


def _mix(x: UInt32[Array, "..."]) -> UInt32[Array, "..."]:
    """MurmurHash3's finalizer: a bijection of words, so no flip is ever lost."""
    x = (x ^ (x >> 16)) * np.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * np.uint32(0xC2B2AE35)
    return x ^ (x >> 16)
