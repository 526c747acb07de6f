"""The sources a config can name, the embedded set `clipart` and `padded` among them.

Letters: M images.
"""

import pathlib
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from navit_jax import config as config_lib
from navit_jax.data.composites import composites
from navit_jax.data.folders import folder
from navit_jax.data.padded import Padded
from navit_jax.data.prepared import open_folder, tfds
from navit_jax.data.records import Record, Selection, Source, cache_folder
from navit_jax.data.sizes import size_table
from navit_jax.data.stored import array_record
from navit_jax.errors import ConfigError

__all__ = [
    "SOURCES", "Record", "Source", "array_record", "clipart", "composites", "folder",
    "padded", "tfds",
]  # fmt: skip

CLIPART = pathlib.Path(__file__).parent / "clipart"
SPLITS = ("train", "validation", "test")
LABELS = ("classes8", "classes34", "none")


def full_clipart() -> pathlib.Path:
    """Where `python -m navit_jax.data.builders.clipart --full` builds."""
    return cache_folder() / "clipart-full"


def clipart(
    split: str,
    labels: str = "classes8",
    full: bool = False,
    path: str | None = None,
) -> Selection:
    """Opens the embedded clip art, or its full-size build.

    Args:
      split: "train", "validation", "test" (80/10/10 by group), "all", or one part of
        five-fold cross-validation by group over all pictures: "fold0:train" ..
        "fold4:test".
      labels: "classes8" (kinds of things), "classes34" (finer) or "none". Only
        pictures with at least one label of the set are in the source, several have
        more than one; "none" has all pictures.
      full: The full-size build instead of the embedded set.
      path: A built set elsewhere.

    Raises:
      ConfigError: an unknown split or label set, or the set is not built.
    """
    if labels not in LABELS:
        raise ConfigError(f"labels={labels!r} is unknown; known: {', '.join(LABELS)}")
    root = pathlib.Path(path) if path else full_clipart() if full else CLIPART
    if not (root / "index.npz").exists():
        raise ConfigError(
            f"no clip art in {root}; `python -m navit_jax.data.builders.clipart"
            f"{' --full' if full else ''}` builds it"
        )
    with np.load(root / "index.npz", allow_pickle=False) as file:
        index = dict(file)
    chosen = _choose(split, index["split"], index["fold"])
    label = None if labels == "none" else labels
    if label:
        chosen &= index[label]
    whole = open_folder(
        "clipart", str(root), "+".join(SPLITS), "image", label, "caption", "key"
    )
    indices = np.flatnonzero(chosen).astype(np.int32)
    return Selection(
        whole, indices, index["group"][indices], index["original_sizes"][indices]
    )


def _choose(split: str, splits: np.ndarray, folds: np.ndarray) -> np.ndarray:
    """Bool [M]: which pictures are in the split."""
    if split == "all":
        return np.ones(len(splits), bool)
    if split in SPLITS:
        return splits == SPLITS.index(split)
    if match := re.fullmatch(r"fold([0-4]):(train|test)", split):
        return (folds == int(match[1])) == (match[2] == "test")
    raise ConfigError(
        f"split={split!r} is unknown; known: {', '.join(SPLITS)}, all, fold0:train .. "
        "fold4:test"
    )


def padded(source: Any, seed: int = 0, split: str = "") -> Padded:
    """Opens another source, its pictures on white canvases of each other's aspects.

    Args:
      source: Its section, as of any source.
      seed: Of the aspects, see `padded.draw_canvases`.
      split: Stands for that of the section, so that a set can be judged on another part
        as any other; "" leaves it.

    Raises:
      ConfigError: `source` is no section, or as the source itself.
    """
    if not isinstance(source, Mapping):
        raise ConfigError(
            f"source={source!r} of a padded source: give a section, as "
            "{'name': 'clipart', 'split': 'test'}"
        )
    section = {**source, "split": split} if split else source
    whole = config_lib.build(section, SOURCES, "padded.source")
    return Padded(whole, size_table(whole), seed)


SOURCES = {
    "array_record": array_record,
    "clipart": clipart,
    "composites": composites,
    "folder": folder,
    "padded": padded,
    "tfds": tfds,
}
