import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from navit_jax import checksums, sharding

DTYPES = ["float32", "bfloat16", "float16", "int32", "uint8", "int8", "bool"]


def array(dtype, seed=0):
    bits = np.random.default_rng(seed).integers(0, 100, (4, 6))
    return np.asarray(jnp.asarray(bits % 2 if dtype == "bool" else bits, dtype))


def by_loop(x):
    """The definition, element by element, in Python's integers."""

    def mix(word):
        word = (word ^ word >> 16) * 0x85EBCA6B % 2**32
        word = (word ^ word >> 13) * 0xC2B2AE35 % 2**32
        return word ^ word >> 16

    words = x.reshape(-1).view(f"uint{8 * x.dtype.itemsize}")
    return sum(mix(int(w) ^ mix(i + 1)) for i, w in enumerate(words)) % 2**32


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_checksum_follows_its_definition(dtype):
    x = array(dtype)
    assert checksums.compute({"x": x}) == {"x": by_loop(x)}


def test_every_single_flipped_bit_changes_the_checksum():
    x = array("float32")
    flipped = np.repeat(x.view(np.uint32).reshape(1, -1), 24 * 32, 0)
    for k in range(24 * 32):
        flipped[k, k // 32] ^= np.uint32(1 << k % 32)
    sums = jax.vmap(checksums._checksum)(flipped.view(np.float32).reshape(-1, 4, 6))
    assert by_loop(x) not in np.asarray(sums).tolist()


def test_swapped_elements_change_the_checksum():
    x = np.arange(24, dtype=np.float32).reshape(4, 6)
    sums = [
        checksums.compute(y)[""] for y in (x, x[::-1], x[:, ::-1], x.T.reshape(4, 6))
    ]
    assert len(set(sums)) == 4


@pytest.mark.parametrize("spec", [P(), P("fsdp"), P(("replica", "fsdp"), "tensor")])
def test_a_checksum_is_equal_under_any_sharding(spec):
    x = np.random.default_rng(0).normal(size=(8, 6, 3)).astype(np.float32)
    mesh = sharding.make_mesh(2, 2, 2)
    placed = jax.device_put(x, NamedSharding(mesh, spec))
    assert checksums.compute({"x": placed})["x"] == by_loop(x)


def test_typed_keys_and_scalars_have_checksums():
    keys = [jax.random.key(0), jax.random.key(1)]
    sums = {checksums.compute({"key": key})["key"] for key in keys}
    assert len(sums) == 2
    assert sums == {by_loop(np.asarray(jax.random.key_data(key))) for key in keys}
    assert checksums.compute({"step": jnp.int32(7)})["step"] == by_loop(np.int32([7]))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_leaves_that_are_not_finite_are_named(bad):
    x = jnp.ones((2, 3), jnp.bfloat16).at[1, 2].set(bad)
    tree = {"a": {"kernel": x}, "b": jnp.ones(2), "key": jax.random.key(0), "n": 3}
    tree["n"] = jnp.int32(3)
    assert checksums.find_nonfinite(tree) == ["a/kernel"]
