"""Pictures to packed rows on one core: `python benchmarks/pipeline.py`.

Two Markdown tables: images a core-second from JPEGs and from stored pixels, by our
functions alone and through grain; and what worker processes add. `--tiny` is for a
test.
"""

import dataclasses
import io
import itertools
import os
import pathlib
import tempfile
import time
from collections.abc import Callable, Iterator

import numpy as np
import psutil
import timing
from absl import app, flags, logging
from PIL import Image

from navit_jax.batch import BatchInfo, PackedBatch
from navit_jax.data import (
    LoadBatch,
    Stream,
    images,
    open_sources,
    prepare,
    resolution,
    token_drop,
)
from navit_jax.data.load import Loader
from navit_jax.data.plan import Plan
from navit_jax.data.records import Record, Source
from navit_jax.data.rows import Batches

TINY = flags.DEFINE_bool("tiny", False, "Few pictures, one repeat")
REPEATS = flags.DEFINE_integer("repeats", 7, "Timed rounds; the median is told")
SIDES = resolution.Uniform(64, 256)
HALF = token_drop.Constant(0.5)


@dataclasses.dataclass(frozen=True)
class Pictures:
    """Some files in memory, again and again."""

    files: tuple[bytes, ...]
    number: int
    name: str = "pictures"
    folder: str = ""
    class_names: tuple[str, ...] = ("thing",)

    def __len__(self) -> int:
        """So many in all."""
        return self.number

    def __getitem__(self, index: int) -> Record:
        """One of them, with a label."""
        return Record(str(index), self.files[index % len(self.files)], (0,))

    def fingerprint(self) -> str:
        """They are always the same."""
        return str(self.number)


def noise(height: int, width: int, seed: int) -> np.ndarray:
    """A picture with the 1/f spectrum of photographs, which fills a JPEG as they do."""
    rng = np.random.default_rng(seed)
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.fftfreq(width))
    frequency[0, 0] = np.inf
    grey, colour = (
        rng.normal(size=(height, width, 1)),
        rng.normal(size=(height, width, 3)),
    )
    spectrum = np.fft.fft2(grey + colour / 2, axes=(0, 1)) / frequency[..., None]
    pixels = np.fft.ifft2(spectrum, axes=(0, 1)).real
    return (128 + 32 * pixels / pixels.std()).clip(0, 255).astype(np.uint8)


def encode(pixels: np.ndarray, kind: str) -> bytes:
    """As a JPEG of quality 90, or as an array."""
    file = io.BytesIO()
    if kind == "jpeg":
        Image.fromarray(pixels).save(file, "JPEG", quality=90)
    else:
        np.save(file, pixels)
    return file.getvalue()


def make(kind: str, short: int, long: int, number: int) -> Pictures:
    """48 pictures, half of them upright, as a source of `number`."""
    shapes = (short, long), (long, short)
    files = tuple(encode(noise(*shapes[i % 2], i), kind) for i in range(48))
    return Pictures(files, number)


def open_stream(
    source: Source,
    law: resolution.Law,
    drop: token_drop.Law,
    codec: str,
    threads: int = 1,
    workers: int = 0,
) -> Stream:
    """Batches of 16 rows of 1,024 tokens and at most 40 images."""
    table = np.array([images.read_size(source[i].image) for i in range(len(source))])
    plan = Plan(
        tables=[table.astype(np.uint16)],
        weights=[1],
        seed=0,
        patch=16,
        tokens=1024,
        slots=40,
        rows=16,
        resolution=law,
        token_drop=drop,
    )
    loader = Loader((source,), (source.name,), 16, 1024, 40, 1, codec)
    return Stream(plan, loader, threads, workers, prefetch=2)


def alone(stream: Stream) -> Iterator[tuple[PackedBatch, BatchInfo]]:
    """The batches of a stream by the functions that grain calls, and nothing else."""
    load = LoadBatch(Batches(stream.plan), stream.loader, np.arange(stream.plan.rows))
    for k in itertools.count():
        loaded = load[k]
        yield loaded["batch"], loaded["info"]


def taker(
    batches: Iterator[tuple[PackedBatch, BatchInfo]], number: int, counts: list[int]
) -> Callable[[], None]:
    """Takes so many batches, counts their images, and waits until all is quiet again.

    What grain prefetched before it has then prefetched anew: the work of a call is that
    of the batches it takes.
    """

    def take() -> None:
        taken = itertools.islice(batches, number)
        counts.append(sum(int(batch.image_mask.sum()) for batch, _ in taken))
        busy = True
        while busy:
            before = time.process_time()
            time.sleep(0.05)
            busy = time.process_time() - before > 1e-3

    return take


def cases(folder: pathlib.Path, number: int) -> dict[str, tuple[Stream, int, str]]:
    """Streams, how many batches of each are timed, and the bound."""
    jpegs = make("jpeg", 375, 500, number)
    pixels, native = make("npy", 128, 208, number), resolution.Native()
    large = make("npy", 224, 288, number)
    section = prepare.prepare(pixels, folder, 256, 16).section
    (stored,), _ = open_sources({"stored": section})
    size = np.mean([len(file) for file in jpegs.files]) / 1000
    whole = token_drop.NoDrop()
    return {
        f"JPEGs of 500 x 375, {size:.0f} KB, at sides U(64, 256): Pillow": (
            open_stream(jpegs, SIDES, whole, "pillow"), 3, ">= 550"
        ),
        "the same JPEGs, extra `fast`": (
            open_stream(jpegs, SIDES, whole, "fast"), 3, ">= 900"
        ),
        "pixels of 208 x 128, 52 of 104 patches kept": (
            open_stream(pixels, native, HALF, "auto"), 20, ">= 20,000"
        ),
        "the same pixels from an array_record file": (
            open_stream(stored, native, HALF, "auto"), 20, ""
        ),
        "pixels of 288 x 224 at sides U(64, 256): Pillow": (
            open_stream(large, SIDES, whole, "pillow"), 5, ""
        ),
        "the same larger pixels, extra `fast`": (
            open_stream(large, SIDES, whole, "fast"), 10, ""
        ),
    }  # fmt: skip


def table_of_speed(folder: pathlib.Path, number: int, repeats: int) -> Iterator[str]:
    """The lines of the first table."""
    found = cases(folder, number)
    counts: dict[str, list[int]] = {}
    calls: dict[str, Callable[[], None]] = {}
    for name, (stream, batches, _) in found.items():
        every = np.arange(stream.plan.rows)
        for way, rows in (("alone", alone(stream)), ("grain", stream.batches(every))):
            key = f"{name} {way}"
            calls[key] = taker(rows, batches, counts.setdefault(key, []))
    seconds = timing.interleave(calls, repeats, clock=time.process_time)
    yield (
        "| images a core-second, to rows of 1,024 tokens | functions | by grain | "
        "overhead | bound |"
    )
    yield "|---|---:|---:|---:|---:|"
    for name, (_, _, bound) in found.items():
        speeds = []
        for way in ("alone", "grain"):
            key = f"{name} {way}"
            speeds.append(np.array(counts[key][-repeats:]) / seconds[key])
        overhead = np.median(speeds[0] / speeds[1]) - 1
        cells = " | ".join(f"{np.median(speed):,.0f}" for speed in speeds)
        yield f"| {name} | {cells} | {overhead:.1%} | {bound} |"


def cpu_seconds() -> float:
    """Of this process and of those it started."""
    process = psutil.Process()
    times = [p.cpu_times() for p in (process, *process.children(recursive=True))]
    return sum(t.user + t.system for t in times)


def scale(threads: int, workers: int, number: int, batches: int) -> list[float]:
    """Images a second, cores used and images a core-second, of JPEGs."""
    jpegs = make("jpeg", 375, 500, number)
    drop = token_drop.NoDrop()
    stream = open_stream(jpegs, SIDES, drop, "auto", threads, workers)
    rows = stream.batches(np.arange(stream.plan.rows))
    for _ in itertools.islice(rows, 4 + 2 * workers):
        pass
    start, before, count = time.perf_counter(), cpu_seconds(), 0
    for batch, _ in itertools.islice(rows, batches):
        count += int(batch.image_mask.sum())
    spent, used = time.perf_counter() - start, cpu_seconds() - before
    return [count / spent, used / spent, count / used]


def table_of_workers(number: int, repeats: int, batches: int) -> Iterator[str]:
    """The lines of the second table."""
    ways = [(1, 0), (2, 0), (1, 1), (1, 2)]
    found = [[scale(*way, number, batches) for way in ways] for _ in range(repeats)]
    yield (
        f"| JPEGs, {os.cpu_count()} cores, codec auto: threads, workers | images/s | "
        "cores used | images a core-second |"
    )
    yield "|---|---:|---:|---:|"
    for way, (speed, cores, core) in zip(ways, np.median(found, axis=0), strict=True):
        yield f"| {way[0]}, {way[1]} | {speed:,.0f} | {cores:.2f} | {core:,.0f} |"


def main(_: list[str]) -> None:
    """Prints both tables."""
    tiny = TINY.value
    logging.set_verbosity(logging.WARNING)
    number, repeats = (96, 1) if tiny else (2048, REPEATS.value)
    cores = os.sched_getaffinity(0)
    # A core-second is one of this core.
    os.sched_setaffinity(0, {max(cores)})
    with tempfile.TemporaryDirectory() as folder:
        for line in table_of_speed(pathlib.Path(folder), number, repeats):
            print(line, flush=True)
    os.sched_setaffinity(0, cores)
    print()
    for line in table_of_workers(number, 1 if tiny else 3, 2 if tiny else 12):
        print(line, flush=True)


if __name__ == "__main__":
    app.run(main)
