"""Padding and speed of packing on one core: `python benchmarks/packing.py`.

Three Markdown tables: the padding of our packers and of grain's on three loads, how
many images a second one core plans, packs and writes into rows, and what the room for
texts costs where images bring captions. `--tiny` is for a test.
"""

import dataclasses
import os
import time
from collections.abc import Callable, Iterator

import grain
import numpy as np
import timing
from absl import app, flags
from grain import experimental

from navit_jax.data import resolution, sources, token_drop
from navit_jax.data.captions import caption_lengths
from navit_jax.data.pack import LoadedImage, pack_rows
from navit_jax.data.packers import assign_rows
from navit_jax.data.plan import Plan
from navit_jax.data.tokenizer import open_tokenizer

TINY = flags.DEFINE_bool("tiny", False, "Few images, one repeat")
REPEATS = flags.DEFINE_integer("repeats", 9, "Timed rounds; the median is told")
WINDOW = 16_384
OURS = ("auto", "best_fit", "closing", "first_fit:32", "next_fit")
GRAINS = {
    "grain best fit": experimental.BestFitPackIterDataset,
    "grain first fit": experimental.FirstFitPackIterDataset,
}
OPEN = 32  # rows that grain's packers keep open
FEW = 4096  # images for them: they work image by image, so more change nothing


def make_plan(
    seed: int,
    images: int,
    packer: str = "auto",
    texts: np.ndarray | None = None,
    room: int = 0,
) -> Plan:
    """Sides U(64, 256), log-aspect of sigma 0.35, half of the tokens dropped.

    Args:
      texts: Tokens of the caption of each image.
      room: Text tokens of a row.
    """
    rng = np.random.default_rng(seed)
    aspect, side = np.exp(rng.normal(0, 0.35, images)), 400
    shapes = np.stack([side * np.sqrt(aspect), side / np.sqrt(aspect)], 1)
    return Plan(
        tables=[shapes.astype(np.uint16)],
        weights=[1],
        seed=seed,
        patch=16,
        tokens=256,
        slots=10,
        rows=64,
        resolution=resolution.Uniform(64, 256),
        token_drop=token_drop.Constant(0.5),
        packer=packer,
        window=min(images, WINDOW),
        captions=() if texts is None else [texts[:, None].astype(np.uint16)],
        text_tokens=room,
    )


def of_the_paper(seed: int, images: int) -> np.ndarray:
    """Lengths as `make_plan` plans them, in the order of the stream."""
    planned = make_plan(seed, images, "next_fit").plan_window(0, 0).images
    return planned.kept[np.argsort(planned.images_seen)]


def uniform(seed: int, images: int) -> np.ndarray:
    """Lengths that are uniform in 16..256."""
    return np.random.default_rng(seed).integers(16, 257, images)


LOADS = {  # how lengths are drawn, L, N, the bound for `auto` in percent
    "sides U(64, 256), drop 0.5, L = 256, N = 10": (of_the_paper, 256, 10, 1.0),
    "lengths U(16, 256), L = 1024, N = 16": (uniform, 1024, 16, 0.2),
    "lengths U(16, 256), L = 4096, N = 40": (uniform, 4096, 40, 0.2),
}


def padding(lengths: np.ndarray, L: int, N: int, packer: str) -> float:
    """Percent of the tokens that hold no image."""
    rows = assign_rows(lengths[:, None], [L], N, packer)
    return 100 * (1 - lengths.sum() / ((rows.max() + 1) * L))


def pack_by_grain(
    name: str, elements: list[dict[str, np.ndarray]], L: int, N: int
) -> Iterator[dict[str, np.ndarray]]:
    """The rows that a packer of grain makes."""
    return iter(
        GRAINS[name](
            grain.MapDataset.source(elements).to_iter_dataset(
                grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
            ),
            length_struct=dict.fromkeys(elements[0], L),
            num_packing_bins=OPEN,
            shuffle_bins=False,
            max_sequences_per_bin=N,
        )
    )


def padding_by_grain(lengths: np.ndarray, L: int, N: int, name: str) -> float:
    """The same, without the rows that were open when the images ended."""
    elements = [{"x": np.zeros(n, np.uint8)} for n in lengths]
    rows = list(pack_by_grain(name, elements, L, N))[:-OPEN]
    return 100 * np.mean([row["x_segment_ids"] == 0 for row in rows])


def table_of_padding(seeds: int, images: int) -> Iterator[str]:
    """The lines of the first table."""
    yield f"| padding, %: mean of {seeds} seeds | " + " | ".join(LOADS) + " |"
    yield "|---|" + "---:|" * len(LOADS)
    bounds = " | ".join(f"<= {bound}" for *_, bound in LOADS.values())
    yield f"| bound for `auto` | {bounds} |"
    for name in (*OURS, *GRAINS):
        few, measure = images, padding
        if name in GRAINS:
            few, measure = min(images, FEW), padding_by_grain
        cells = []
        for draw, L, N, _ in LOADS.values():
            found = [measure(draw(i, few), L, N, name) for i in range(seeds)]
            cells.append(f"{np.mean(found):.2f} (+- {np.std(found):.2f})")
        yield f"| {name if name in GRAINS else f'`{name}`'} | {' | '.join(cells)} |"


def speeds(images: int) -> dict[str, tuple[int, Callable[[], object]]]:
    """What is timed: images a call, and the call."""
    window = min(images, WINDOW)
    plan, number = make_plan(0, 80 * images), iter(range(10**9))
    lengths = of_the_paper(0, window)[:, None]
    some = [{"x": np.zeros(n, np.uint8)} for n in lengths[: window // 8, 0]]
    rng = np.random.default_rng(0)
    patches = rng.integers(0, 256, (304, 52, 768), np.uint8)
    loaded = [
        LoadedImage(p, np.zeros((52, 2), np.int32), (8, 13), (0, i), (1,), "")
        for i, p in enumerate(patches)
    ]
    rows = [loaded[19 * i : 19 * (i + 1)] for i in range(16)]
    arrays = [{"patches": p, "coords": np.zeros((52, 2), np.int32)} for p in patches]
    return {
        "plan: permutation, draws, packing": (
            window,
            lambda: plan.plan_window(0, next(number) % 80),
        ),
        **{
            f"packing alone, `{name}`": (
                window,
                lambda name=name: assign_rows(lengths, [256], 10, name),
            )
            for name in OURS
        },
        **{
            f"packing alone, {name} (one byte a token)": (
                len(some),
                lambda name=name: list(pack_by_grain(name, some, 256, 10)),
            )
            for name in GRAINS
        },
        "rows from arrays of 52 tokens": (
            len(loaded),
            lambda: pack_rows(rows, 1024, 24, 768, 1),
        ),
        "rows from arrays of 52 tokens, grain first fit": (
            len(loaded),
            lambda: list(pack_by_grain("grain first fit", arrays, 1024, 24)),
        ),
    }


BOUNDS = {
    "plan: permutation, draws, packing": 500_000,
    "rows from arrays of 52 tokens": 60_000,
}


def table_of_speed(images: int, repeats: int) -> Iterator[str]:
    """The lines of the second table."""
    cases = speeds(images)
    seconds = timing.interleave(
        {name: call for name, (_, call) in cases.items()},
        repeats,
        settle=True,
        clock=time.process_time,
    )
    yield "| images a core-second, L = 256 or 1024 | | bound |"
    yield "|---|---:|---:|"
    for name, (number, _) in cases.items():
        speed = number / np.median(seconds[name])
        bound = f">= {BOUNDS[name]:,}" if name in BOUNDS else ""
        yield f"| {name} | {speed:,.0f} | {bound} |"


def of_the_embedded(seed: int, images: int) -> np.ndarray:
    """Lengths of the embedded training captions, cut at 24."""
    source = sources.clipart("train", "none")
    lengths = caption_lengths(source, open_tokenizer(length=24))
    return np.random.default_rng(seed).choice(lengths[:, 0], images)


def longer(seed: int, images: int) -> np.ndarray:
    """Lengths about 13, log-normal of sigma 0.45, 2 to 24: their mean is 13.8."""
    drawn = np.random.default_rng(seed).lognormal(np.log(13), 0.45, images)
    return np.rint(drawn).clip(2, 24)


TEXTS = {"embedded captions": of_the_embedded, "longer texts": longer}
ROOMS = (48, 56, 64, 72, 80, 88, 96, 128)


def table_of_texts(images: int, repeats: int) -> Iterator[str]:
    """The lines of the third table."""
    images = 20 * min(images, WINDOW)
    cases, reports, number = {}, {}, iter(range(10**9))
    for name, draw in TEXTS.items():
        for room in ROOMS:
            plan = make_plan(0, images, "auto", draw(0, images), room)
            plan = dataclasses.replace(plan, window=images // 20)
            reports[f"{name} | {room}"] = plan.report()
            cases[f"{name} | {room}"] = lambda plan=plan: plan.plan_window(
                0, next(number) % 20
            )
    seconds = timing.interleave(cases, repeats, settle=True, clock=time.process_time)
    yield (
        "| `auto`, L = 256, N = 10 | T | image padding, % | text padding, % | "
        "pairs planned a core-second |"
    )
    yield "|---|---:|---:|---:|---:|"
    for name, report in reports.items():
        # All of one kind of texts recommend the same: it depends on no room.
        mark = " (recommended)" * name.endswith(f" {report['enough_text']}")
        yield (
            f"| {name}{mark} | {100 * report['padding']:.2f} | "
            f"{100 * report['text_padding']:.2f} | "
            f"{images / 20 / np.median(seconds[name]):,.0f} |"
        )
    yield "| bound | recommended | <= 1.5 |  | >= 100,000 |"


def main(_: list[str]) -> None:
    """Prints the tables."""
    # A core-second is one of this core.
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    images = 2048 if TINY.value else WINDOW
    for line in table_of_padding(2 if TINY.value else 10, images):
        print(line, flush=True)
    print()
    repeats = 1 if TINY.value else REPEATS.value
    for line in table_of_speed(images, repeats):
        print(line, flush=True)
    print()
    for line in table_of_texts(images, repeats):
        print(line, flush=True)


if __name__ == "__main__":
    app.run(main)
