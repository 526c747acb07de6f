"""Predicts: `python -m navit_jax.predict --workdir=runs/demo --images=folder
--output=out.csv`.

A line a picture, in the order of the folder's file names: what it is, with which
probability, or why it can not be used.
"""

import csv
import os
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import tqdm
from absl import flags
from etils import epath

from navit_jax import command_line
from navit_jax.data.bad_image import BadImage
from navit_jax.data.folders import folder
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
        predictor = load(workdir.value, step())
        if not predictor.class_names:
            raise ConfigError(f"--workdir={workdir.value}: that run has no classes")
        count = min(top.value, len(predictor.class_names))
        asked = command_line.parse_side(side.value) if side.value else None
        law = predictor.law(asked, tokens.value)
        bad = 0
        with (
            path.open("w") as file,
            tqdm.tqdm(total=len(source), unit="img", desc="predict") as bar,
        ):
            writer = csv.writer(file)
            writer.writerow(header(count))
            for start in range(0, len(source), CHUNK):
                names = source.files[start : start + CHUNK]
                files = [pathlib.Path(source.folder, name) for name in names]
                lines: list[list[Any]] = [[] for _ in names]
                for found in predictor.results(
                    "probabilities", files, law, upscale.value
                ):
                    lines[found.place] = line(found, predictor.class_names, count)
                    bar.update()
                for name, columns in zip(names, lines, strict=True):
                    # A name need not be UTF-8.
                    text = os.fsencode(name).decode("utf-8", "backslashreplace")
                    writer.writerow([text, *columns])
                    bad += bool(columns[2])
        print(f"{len(source)} pictures in {output.value}, {bad} could not be used")
        return 0

    return main


if __name__ == "__main__":
    command_line.run(define_main())
