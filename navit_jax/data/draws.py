"""Order and random draws of the stream, as functions of where one is in it.

No generator has a state to keep: a draw is a hash of (seed, epoch, index, purpose), the
order of an epoch a keyed bijection. M images.
"""

import hashlib

import numpy as np
from jaxtyping import Float64, Int64, Integer, UInt64

Epochs = int | Integer[np.ndarray, " M"]

# With fewer, some orders of five or six images are visibly likelier than others.
ROUNDS = 12
WORD = 2**64 - 1
GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def mix(x: np.ndarray) -> np.ndarray:
    """The finaliser of splitmix64 (Steele et al. 2014): a bijection of 64 bits."""
    x = x ^ (x >> np.uint64(30))
    x *= np.uint64(0xBF58476D1CE4E5B9)
    x ^= x >> np.uint64(27)
    x *= np.uint64(0x94D049BB133111EB)
    x ^= x >> np.uint64(31)
    return x


def mix_one(x: int) -> np.uint64:
    """`mix` of one number of 64 bits: an array of one would take ten times as long."""
    x &= WORD
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & WORD
    x = (x ^ x >> 27) * 0x94D049BB133111EB & WORD
    return np.uint64(x ^ x >> 31)


def key(
    seed: int, epoch: Epochs, indices: Integer[np.ndarray, " M"], purpose: str
) -> UInt64[np.ndarray, " M"]:
    """64 random bits for each index.

    Args:
      seed: Any integer, of any size.
      epoch: One for all indices, or one for each.
      purpose: Draws for different purposes are independent of each other.
    """
    digest = hashlib.blake2b(f"{seed}/{purpose}".encode(), digest_size=8).digest()
    stream = np.uint64(int.from_bytes(digest, "big"))
    # At least one dimension: arrays wrap around in silence, scalars warn.
    epochs = np.atleast_1d(np.asarray(epoch)).astype(np.uint64)
    return mix(mix(epochs * GOLDEN + stream) + indices.astype(np.uint64) * GOLDEN)


def uniform(
    seed: int, epoch: Epochs, indices: Integer[np.ndarray, " M"], purpose: str
) -> Float64[np.ndarray, " M"]:
    """A number in [0, 1) for each index, with 53 random bits; arguments as of `key`."""
    return (key(seed, epoch, indices, purpose) >> np.uint64(11)) * 2.0**-53


def permute(
    positions: Integer[np.ndarray, " M"], size: int, seed: int, epoch: int
) -> Int64[np.ndarray, " M"]:
    """Sends positions of an epoch to indices: a random bijection of range(size).

    A Feistel network on the smallest power of two that holds `size` (at least 4);
    what falls outside of range(size) is sent through it again, until it falls inside
    (cycle walking). Costs memory only for the positions asked for.

    Args:
      positions: Each in range(size), in any order.
    """
    bits = max(2, (size - 1).bit_length())
    low = np.uint64(bits // 2)
    low_mask = np.uint64((1 << (bits // 2)) - 1)
    high_mask = np.uint64((1 << (bits - bits // 2)) - 1)
    keys = key(seed, epoch, np.arange(ROUNDS), "permute")

    def scramble(x: np.ndarray) -> np.ndarray:
        left, right = x >> low, x & low_mask
        for i in range(0, ROUNDS, 2):
            # The halves differ in width, so they do not swap: each in turn is changed
            # by a function of the other, which can always be undone.
            left ^= mix(right + keys[i]) & high_mask
            right ^= mix(left + keys[i + 1]) & low_mask
        return left << low | right

    indices = scramble(positions.astype(np.uint64))
    while (outside := np.flatnonzero(indices >= size)).size:
        indices[outside] = scramble(indices[outside])
    return indices.astype(np.int64)
