"""Stores the pictures of a source as pixels, smaller, to be read without decoding.

`python -m navit_jax.data.prepare --config=configs/smoke.py --source=clipart --side=256
--output=/data/small` writes a TFDS set of array_record files, and prints the section of
a config that opens it. Called again after a stop, it goes on.
"""

import concurrent.futures
import functools
import io
import os
import pathlib
from collections.abc import Callable, Iterator

import numpy as np
import tqdm
from absl import flags

from navit_jax import command_line, models
from navit_jax import config as config_lib
from navit_jax.data import codec as codecs
from navit_jax.data import images, open_sources, record_files, resolution
from navit_jax.data.record_files import Entry, Written
from navit_jax.data.records import StoredSource
from navit_jax.errors import ConfigError

# Pictures of a file: at side 256 a third of a gigabyte.
SHARD = 2048
# Of these so many may wait in memory to be written.
CHUNK = 256


def shrink(
    source: StoredSource, side: float | int, patch: int, codec: str, index: int
) -> Entry:
    """Makes of a picture what a plan at that side would, without enlarging it."""
    try:
        record = source[index]
    except OSError:
        return Entry(f"#{index}", "unreadable")
    try:
        size = images.read_size(record.image)
        sides = np.array([float(side)])
        grid = resolution.grids(np.array([size]), sides, patch, upscale=False)[0]
        height, width = (patch * grid).tolist()
        pixels, _ = images.read(record.image, size, (height, width), codec=codec)
    except images.BadImage as error:
        return Entry(record.key, error.reason)
    file = io.BytesIO()
    np.save(file, np.ascontiguousarray(pixels), allow_pickle=False)
    captions = [text.encode("utf-8", "surrogatepass") for text in record.captions]
    data = record_files.make_example(
        record.key, file.getvalue(), captions, record.labels
    )
    return Entry(record.key, "", data, (height, width))


def prepare(
    source: StoredSource,
    output: pathlib.Path,
    side: float | int,
    patch: int,
    codec: str = "auto",
    threads: int | None = None,
) -> Written:
    """Writes the set, or the files of it that are not there yet.

    Raises:
      ConfigError: the folder holds something else.
      DataError: no picture can be used.
    """
    codecs.choose(codec)
    made = {
        "source": [source.name, source.fingerprint(), len(source)],
        "codec": [codec, codecs.versions()],
        "side": side,
        "patch": patch,
        "shard": SHARD,
    }
    one = functools.partial(shrink, source, side, patch, codec)
    starts = range(0, len(source), SHARD)
    ends = [min(start + SHARD, len(source)) for start in starts]
    with (
        concurrent.futures.ThreadPoolExecutor(threads or os.cpu_count()) as pool,
        tqdm.tqdm(total=len(source), desc=f"{source.name}", unit="img") as bar,
    ):

        def entries(start: int, end: int) -> Iterator[Entry]:
            for i in range(start, end, CHUNK):
                for entry in pool.map(one, range(i, min(i + CHUNK, end))):
                    bar.update()
                    yield entry

        shards = [
            functools.partial(entries, *part) for part in zip(starts, ends, strict=True)
        ]
        return record_files.write_set(
            output, "pixels", made, shards, ends, bar, source.class_names
        )


def define_main() -> Callable[[], int]:
    """Defines the flags, and returns what reads them and prepares."""
    config = command_line.define_config()
    name = flags.DEFINE_string("source", None, "One of data.sources", required=True)
    output = flags.DEFINE_string("output", None, "A new folder", required=True)
    side = flags.DEFINE_float(
        "side",
        None,
        "Pixels: of a square of equal area; none is enlarged",
        lower_bound=1,
        required=True,
    )
    codec = flags.DEFINE_string("codec", "auto", "As data.codec")

    def main() -> int:
        resolved = config_lib.resolve(config.value)
        sections = resolved["data"]["sources"]
        if name.value not in sections:
            hint = config_lib.nearest(name.value, sections)
            raise ConfigError(f"--source={name.value}: {hint}")
        (source,), _ = open_sources({name.value: sections[name.value]})
        patch = models.patch_size(resolved["model"]["size"])
        folder = pathlib.Path(output.value).expanduser().absolute()
        prepare(source, folder, side.value, patch, codec.value).tell(folder, name.value)
        return 0

    return main


if __name__ == "__main__":
    command_line.run(define_main())
