"""Predicts: `python -m navit_jax.predict --workdir=runs/demo --images=folder
--output=out.csv`.

A line a picture, in the order of the folder's file names: what it is, with which
probability, or why it can not be used.
"""

import contextlib
import csv
import itertools
import os
import pathlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import tqdm
from absl import flags
from etils import epath

from navit_jax import command_line, run_folder
from navit_jax.data.bad_image import BadImage
from navit_jax.data.folders import folder
from navit_jax.dial import choose_law
from navit_jax.errors import ConfigError
from navit_jax.predictor import Result, load

# Pictures packed together; their lines are written before the next are read.
CHUNK = 4096


def line(result: Result, class_names: Sequence[str], top: int) -> list[Any]:
    """The columns of `header` after the file's name."""
    if isinstance(result.value, BadImage):
        return ["", "", result.value.reason, *[""] * (2 * top)]
    best = np.argsort(-result.value, kind="stable")[:top]
    pairs = [(class_names[c], f"{result.value[c]:.6f}") for c in best]
    return [*result.grid, "", *(cell for pair in pairs for cell in pair)]


def header(top: int) -> list[str]:
    """The names of the columns."""
    names = [(f"class_{i}", f"probability_{i}") for i in range(1, top + 1)]
    columns = ["file", "patch_rows", "patch_columns", "error"]
    return [*columns, *(name for pair in names for name in pair)]


@contextlib.contextmanager
def open_table(
    path: epath.Path, columns: Sequence[str]
) -> Iterator[Callable[[Iterable[Sequence[Any]]], None]]:
    """A new file with its first line, and what adds more; each call reaches the disk.

    A table that is there is as it was until the first call.

    Raises:
      ConfigError: it can not be written, or not any further, as on a full disk.
    """
    file: Any = None

    def add(lines: Iterable[Sequence[Any]]) -> None:
        nonlocal file
        with _writing(path):
            if file is None:
                file = path.open("w")
                lines = itertools.chain([columns], lines)
            csv.writer(file).writerows(lines)
            file.flush()

    try:
        if path.exists() and path.stat().length:
            with _writing(path):
                path.open("a").close()
        else:
            add([])
        yield add
    except BaseException:
        with contextlib.suppress(OSError):  # What found no room finds none now.
            if file:
                file.close()
        raise
    with _writing(path):
        if file:
            file.close()


@contextlib.contextmanager
def _writing(path: epath.Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ConfigError(f"--output={path} can not be written: {error}") from error


def define_main() -> Callable[[], int]:
    """Defines the flags, and returns what reads them and predicts."""
    workdir = flags.DEFINE_string("workdir", None, "Folder of the run", required=True)
    images = flags.DEFINE_string("images", None, "Folder of pictures", required=True)
    output = flags.DEFINE_string("output", None, "A .csv file", required=True)
    step = command_line.define_step()
    side = flags.DEFINE_string("side", None, "Side in pixels, or native")
    tokens = flags.DEFINE_integer(
        "tokens", None, "Most patches of a picture", lower_bound=1
    )
    upscale = flags.DEFINE_bool("upscale", None, "Enlarge smaller pictures; as trained")
    top = flags.DEFINE_integer("top", 3, "Classes a picture", lower_bound=1)

    def main() -> int:
        path = epath.Path(output.value)
        if path.is_dir() or not path.parent.is_dir():
            raise ConfigError(
                f"--output={output.value}: give the name of a file in a folder that "
                "exists"
            )
        source = folder(images.value, labels=False)
        config = run_folder.read_config(epath.Path(workdir.value))
        class_names = run_folder.read_class_names(epath.Path(workdir.value))
        if not class_names:
            raise ConfigError(f"--workdir={workdir.value}: that run has no classes")
        count = min(top.value, len(class_names))
        asked = command_line.parse_side(side.value) if side.value else None
        law, which, bad = choose_law(config, asked, tokens.value), step(), 0
        with open_table(path, header(count)) as add:
            predictor = load(workdir.value, which)
            bar = tqdm.tqdm(total=len(source), unit="img", desc="predict")
            for start in range(0, len(source), CHUNK):
                names = source.files[start : start + CHUNK]
                files = [pathlib.Path(source.folder, name) for name in names]
                lines: list[list[Any]] = [[] for _ in names]
                for found in predictor.results(
                    "probabilities", files, law, upscale.value
                ):
                    lines[found.place] = line(found, class_names, count)
                    bar.update()
                # A name need not be UTF-8.
                texts = [
                    os.fsencode(n).decode("utf-8", "backslashreplace") for n in names
                ]
                add([text, *rest] for text, rest in zip(texts, lines, strict=True))
                bad += sum(bool(columns[2]) for columns in lines)
            bar.close()
        print(f"{len(source)} pictures in {output.value}, {bad} could not be used")
        return 0

    return main


if __name__ == "__main__":
    command_line.run(define_main())
