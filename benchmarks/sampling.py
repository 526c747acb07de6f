"""Lookups between cells, and maps of mixed sizes: `python benchmarks/sampling.py`.

Prints, forward + backward on this backend and in one run, five lookups of one map by
each implementation, and the stem on tiles against canvases with what memory each takes.
`--tiny` is for a test.
"""

import functools
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import timing
from absl import app, flags

from navit_jax.models import rois, sampling
from navit_jax.models.feature_maps import CUTS, Maps, Stem
from navit_jax.models.sparseformer_sizes import SHAPES

TINY = flags.DEFINE_bool("tiny", False, "Small shapes, one repeat")
REPEATS = flags.DEFINE_integer("repeats", 5, "Timed rounds")
STAGES = 5  # at which both versions look at one map
PATCH = 16


def lookups(name: str, side: int, implementation: str) -> tuple[Any, tuple[Any, ...]]:
    """Gradient of all stages of a named model on one picture, and its arguments."""
    shape, cells = SHAPES[name], side // 4
    tiles = cells // 4
    keys = jax.random.split(jax.random.key(0), 3)
    boxes = jnp.asarray(rois.half_grid(shape.latents))[None]
    offsets = jax.random.normal(keys[0], (1, shape.latents, shape.points, 2))
    points = rois.place_points(boxes, offsets)
    values = jax.random.normal(keys[1], (1, tiles**2, 4, 4, shape.channels))
    steps = 0.01 * jax.random.normal(keys[2], (STAGES, *points.shape))
    slots = jnp.zeros((1, shape.latents), int)

    def total(values, points):
        maps = Maps(
            cells=values,
            slots=jnp.zeros((1, tiles**2), int),
            starts=jnp.zeros((1, 1), int),
            columns=jnp.full((1, 1), tiles),
            sizes=jnp.full((1, 1, 2), cells),
        )
        maps, summed = sampling.prepare(maps, implementation), 0.0
        for step in steps:
            found = sampling.lookup(
                maps, slots, points + step, shape.padding, implementation
            )
            summed += jnp.square(found).sum()
        return summed

    return jax.jit(jax.grad(total, (0, 1))), (values, points)


def draw_row(num_tokens: int, slots: int, low: int, high: int) -> list[np.ndarray]:
    """Grids of pictures of mixed size and shape that fill a row, first fit."""
    rng, room, grids = np.random.default_rng(0), num_tokens, []
    for _ in range(1000):
        side, aspect = rng.uniform(low, high), 2 ** rng.uniform(-1, 1)
        grid = np.maximum(np.rint(side / PATCH * aspect ** np.array([0.5, -0.5])), 1)
        if grid.prod() <= room and len(grids) < slots:
            grids.append(grid.astype(int))
            room -= int(grid.prod())
    return grids


def stem(cut: str, grids: list[np.ndarray], num_tokens: int, slots: int, side: int):
    """Gradient of the stem's parameters on one row, and its arguments."""
    coords = np.zeros((1, num_tokens, 2), int)
    ids, table = np.zeros((1, num_tokens), int), np.zeros((1, slots, 2), int)
    start = 0
    for slot, grid in enumerate(grids):
        own = np.indices(tuple(grid)).reshape(2, -1).T
        coords[0, start : start + len(own)] = own
        ids[0, start : start + len(own)] = slot + 1
        table[0, slot] = grid
        start += len(own)
    patches = np.random.default_rng(0).integers(
        0, 256, (1, num_tokens, 3 * PATCH**2), np.uint8
    )
    row = tuple(jnp.asarray(each) for each in (patches, coords, ids, table))
    shape = SHAPES["v1_tiny"]
    module = Stem(shape.channels, shape.pixel_mean, shape.pixel_std, jnp.float32)

    def loss(params, patches, coords, ids, grids):
        pixels, maps = CUTS[cut](patches, coords, ids, grids, PATCH, side)
        cells = cast(jax.Array, module.apply(params, pixels, maps, PATCH * grids))
        seen = (maps.slots >= 0)[..., None, None, None]
        return jnp.square(jnp.where(seen, cells, 0)[..., 0]).sum()

    pixels, maps = CUTS[cut](*row, PATCH, side)
    params = module.init(jax.random.key(0), pixels, maps, PATCH * row[3])
    return jax.jit(jax.grad(loss)), (params, *row)


def time_all(
    cases: dict[str, tuple[Any, tuple[Any, ...]]], repeats: int
) -> tuple[dict[str, np.ndarray], dict[str, float]]:
    """Seconds of each round, and MB of temporaries, of each case."""
    calls, memory = {}, {}
    for name, (function, arguments) in cases.items():
        compiled = function.lower(*arguments).compile()
        memory[name] = compiled.memory_analysis().temp_size_in_bytes / 1e6
        calls[name] = functools.partial(
            lambda f, a: jax.block_until_ready(f(*a)), compiled, arguments
        )
    return timing.interleave(calls, repeats), memory


def main(_: list[str]) -> None:
    """Prints the two tables."""
    tiny, repeats = TINY.value, 1 if TINY.value else REPEATS.value
    names = list(sampling.LOOKUPS)
    print(f"| model, side | {' ms | '.join(names)} ms | {' MB | '.join(names)} MB |")
    print("|---" * (1 + 2 * len(names)) + "|")
    shapes = [("v2_micro", 32)] if tiny else [
        ("v1_tiny", 224), ("v2_augreg_b", 224), ("v2_augreg_b", 448)
    ]  # fmt: skip
    for name, side in shapes:
        cases = {each: lookups(name, side, each) for each in names}
        seconds, memory = time_all(cases, repeats)
        times = [f"{1e3 * np.median(seconds[each]):.1f}" for each in names]
        sizes = [f"{memory[each]:.1f}" for each in names]
        print(f"| {name}, {side} | {' | '.join(times + sizes)} |", flush=True)

    print("\n| row | tiles ms | canvas ms | canvas / tiles | tiles MB | canvas MB |")
    print("|---|---|---|---|---|---|")
    rows = [("mixed", 24, 3, 32, 64, 4)] if tiny else [
        ("mixed 64 .. 256", 256, 6, 64, 256, 23),
        ("mixed 128 .. 384", 1024, 8, 128, 384, 34),
        ("one of 224 x 224", 196, 1, 224, 224, 14),
    ]  # fmt: skip
    for label, num_tokens, slots, low, high, side in rows:
        grids = draw_row(num_tokens, slots, low, high)
        if slots == 1:
            grids = [np.array([side, side])]
        cases = {cut: stem(cut, grids, num_tokens, slots, side) for cut in CUTS}
        seconds, memory = time_all(cases, repeats)
        cells = [f"{1e3 * np.median(seconds[cut]):.1f}" for cut in CUTS]
        cells.append(timing.ratio(seconds["canvas"], seconds["tiles"]))
        cells += [f"{memory[cut]:.1f}" for cut in CUTS]
        print(f"| {label}, {len(grids)} images | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    app.run(main)
