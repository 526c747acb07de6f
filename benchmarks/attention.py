"""Packed attention, `blocks` against `dense`: `python benchmarks/attention.py`.

Prints forward + backward times on this backend, the memory each needs, and the work of
`blocks` against the least possible. `--tiny` is for a test.
"""

import functools
from collections.abc import Callable

import fixed_list
import jax
import jax.numpy as jnp
import numpy as np
import timing
from absl import app, flags

from navit_jax.models.attention import packed_attention
from navit_jax.models.attention_blocks import count_scores

TINY = flags.DEFINE_bool("tiny", False, "Small shapes, one repeat")
REPEATS = flags.DEFINE_integer("repeats", 7, "Timed rounds")
WIDTH = 64  # of a head


def unequal(num_tokens: int, num_images: int) -> np.ndarray:
    """Segment ids [1 L] of images whose lengths differ by up to 3 times, no padding."""
    weights = np.random.default_rng(num_images).uniform(1, 3, num_images)
    ends = np.rint(np.cumsum(weights) / weights.sum() * num_tokens).astype(int)
    ids = np.searchsorted(ends, np.arange(num_tokens), side="right") + 1
    return ids[None].astype(np.int32)


def gradient(implementation: str) -> Callable[..., tuple[jax.Array, ...]]:
    """Forward and backward, jitted."""

    def loss(q, k, v, ids, upstream):
        return (packed_attention(q, k, v, ids, implementation) * upstream).sum()

    return jax.jit(jax.grad(loss, (0, 1, 2)))


def inputs(ids: np.ndarray, heads: int) -> tuple[jax.Array, ...]:
    """Normal q, k, v, the ids, and a gradient from above."""
    shape = (*ids.shape, heads, WIDTH)
    keys = jax.random.split(jax.random.key(0), 4)
    q, k, v, upstream = (jax.random.normal(key, shape) for key in keys)
    return q, k, v, jnp.asarray(ids), upstream


def time_pair(ids: np.ndarray, heads: int, repeats: int) -> list[str]:
    """A line of the table of times."""
    arrays = inputs(ids, heads)
    cases = {
        name: functools.partial(
            lambda f: jax.block_until_ready(f(*arrays)), gradient(name)
        )
        for name in ("dense", "blocks")
    }
    seconds = timing.interleave(cases, repeats, settle=True)
    times = [f"{1e3 * np.median(seconds[name]):.1f}" for name in cases]
    scores = ids.size**2 / int(count_scores(jnp.asarray(ids)))
    return [*times, timing.ratio(seconds["dense"], seconds["blocks"]), f"{scores:.1f}"]


def memory(name: str, ids: np.ndarray, heads: int) -> float:
    """MB that the compiler takes for temporaries of forward and backward."""
    compiled = gradient(name).lower(*inputs(ids, heads)).compile()
    return compiled.memory_analysis().temp_size_in_bytes / 1e6


def main(_: list[str]) -> None:
    """Prints the three tables."""
    tiny, repeats = TINY.value, 1 if TINY.value else REPEATS.value
    shapes = [(64, 4, 2)] if tiny else [
        (length, images, heads)
        for length, images in ((1024, 8), (4096, 32)) for heads in (3, 6, 12)
    ]  # fmt: skip
    print("| L | images | heads | dense ms | blocks ms | dense / blocks | by scores |")
    print("|---|---|---|---|---|---|---|")
    for length, images, heads in shapes:
        cells = time_pair(unequal(length, images), heads, repeats)
        print(f"| {length} | {images} | {heads} | {' | '.join(cells)} |", flush=True)

    print("\n| L | temporaries of blocks MB | of dense MB |\n|---|---|---|")
    for length in (64, 128) if tiny else (1024, 2048, 4096, 8192):
        ids = unequal(length, length // 128 + 1)
        # Dense scores of 8192 tokens alone are 0.8 GB a head.
        dense = f"{memory('dense', ids, 3):.0f}" if length < 8192 else "-"
        print(f"| {length} | {memory('blocks', ids, 3):.1f} | {dense} |")

    print("\n| images in rows of 4096 | work / sum n^2 |\n|---|---|")
    for low, high in ((64, 256), (128, 384)):
        shapes = fixed_list.grids(64 if tiny else 512, low, high)
        lengths = shapes.prod(1)
        rows = fixed_list.navit_jax.assign_rows(lengths[:, None], [4096], 64, "auto")
        ids = np.zeros((rows.max() + 1, 4096), np.int32)
        for row in range(len(ids)):
            own = np.repeat(np.arange(1, (rows == row).sum() + 1), lengths[rows == row])
            ids[row, : len(own)] = own
        work = int(count_scores(jnp.asarray(ids))) / (lengths**2).sum()
        print(f"| side {low} to {high} | {work:.2f} |")


if __name__ == "__main__":
    app.run(main)
