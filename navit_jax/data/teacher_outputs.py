"""A teacher's vectors of all images of a source, computed once and read by number.

`python -m navit_jax.teach` writes them. M images, E width.
"""

import dataclasses
import functools
import json
import os
import pathlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from absl import logging
from jaxtyping import Float32

from navit_jax.data.records import StoredSource
from navit_jax.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class TeacherOutputs:
    """Files of vectors, in the order of the sources; it travels by their names.

    Attributes:
      files: Each [M E] float32.
      width: E.
    """

    files: tuple[str, ...]
    width: int

    def read(self, source: int, index: int) -> Float32[np.ndarray, " E"]:
        """The vector of an image."""
        return _map(self.files[source])[index]


@functools.lru_cache(64)
def _map(file: str) -> np.ndarray:
    return np.load(file, mmap_mode="r", allow_pickle=False)


def write(
    folder: str | os.PathLike[str],
    name: str,
    source: StoredSource,
    vectors: Float32[np.ndarray, "M E"],
    about: Mapping[str, Any],
    side: int | float | str,
) -> None:
    """Writes the vectors of one source.

    Args:
      name: Of the source in the config.
      about: What the teacher was: anything that JSON has.
      side: At which it saw the images, in pixels or "native"; a run may have another.
    """
    path = pathlib.Path(folder).expanduser()
    path.mkdir(parents=True, exist_ok=True)
    np.save(path / f"{name}.npy", vectors, allow_pickle=False)
    stamp = {"fingerprint": source.fingerprint(), "about": about, "side": side}
    # Last, so that what was broken off is not there.
    (path / f"{name}.json").write_text(json.dumps(stamp, indent=1) + "\n")


def check_about(
    section: Mapping[str, Any], about: Callable[[], Mapping[str, Any]]
) -> None:
    """Raises ConfigError if the vectors of section `data` are of another teacher.

    Args:
      about: Gives what `write` would be told now.
    """
    if not (folder := section.get("teacher")):
        return
    wanted = json.loads(json.dumps(about()))
    for name in section["sources"]:
        found = _stamp(folder, name)["about"]
        if found != wanted:
            raise ConfigError(
                f"config.data.teacher={folder!r} has vectors of another teacher, "
                f"{found}, than config.task: {wanted}; {_remedy(folder)} anew"
            )


def open_outputs(
    folder: str,
    names: Iterable[str],
    sources: Sequence[StoredSource],
    crop: Mapping[str, Any] | None = None,
) -> TeacherOutputs | None:
    """Opens what was written of all sources; None without a folder.

    Args:
      crop: Section `data.crop`.

    Raises:
      ConfigError: something is missing, or of other data; images are cropped.
    """
    if not folder:
        return None
    if crop and crop["name"] != "none":
        raise ConfigError(
            "config.data.teacher has vectors of whole images: remove config.data.crop, "
            "or config.data.teacher"
        )
    path, width = pathlib.Path(folder).expanduser(), 0
    for name, source in zip(names, sources, strict=True):
        stamp = _stamp(folder, name)
        if stamp["fingerprint"] != source.fingerprint():
            raise ConfigError(
                f"config.data.teacher={folder!r}: the vectors of source {name!r} are "
                f"of other data, or of images without texts: {_remedy(folder)} anew"
            )
        width = _map(str(path / f"{name}.npy")).shape[1]
        side = f"side {stamp['side']}" if "side" in stamp else "an unknown side"
        logging.info("vectors of %s in %s: at %s", name, folder, side)
    return TeacherOutputs(tuple(str(path / f"{name}.npy") for name in names), width)


def _stamp(folder: str, name: str) -> dict[str, Any]:
    path = pathlib.Path(folder).expanduser() / f"{name}.json"
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"config.data.teacher={folder!r} has no vectors of source {name!r}: "
            f"{_remedy(folder)}"
        ) from error


def _remedy(folder: str) -> str:
    return (
        f"`python -m navit_jax.teach --config=... --side=PIXELS --out={folder}` writes "
        "them"
    )
