"""Pictures that somebody gives, as a source: arrays, Pillow images, paths.

M pictures.
"""

import dataclasses
import io
import math
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int64, UInt16
from PIL import Image, ImageOps

from navit_jax.data import Stream, modes, resolution, sizes
from navit_jax.data.bad_image import decoding
from navit_jax.data.load import Loader
from navit_jax.data.plan import Plan
from navit_jax.data.records import Record, Source, StoredSource

# Rows of the length of training that a device takes at once: enough to keep it busy.
ROWS = 8
# Tokens of a picture, at most: a row of them is the largest that a device may be given.
LONGEST = 2**16


@dataclasses.dataclass(frozen=True, eq=False)
class Given:
    """Pictures in memory or in files, in a given order, without labels.

    Attributes:
      pictures: Each a path, the bytes of a file, a Pillow image, or a uint8 array
        [h w 3], [h w 4] (with alpha), [h w 1] or [h w].
    """

    pictures: Sequence[Any] | np.ndarray
    name: str = "pictures"
    class_names: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int) -> Record:
        picture = self.pictures[index]
        if isinstance(picture, str | os.PathLike):
            try:
                return Record(str(picture), pathlib.Path(picture).read_bytes())
            except ValueError as error:
                # No file can have such a name, as one with NUL.
                raise OSError(str(error)) from error
        if not isinstance(picture, bytes):
            picture = _encode(picture, f"images[{index}]")
        return Record(f"[{index}]", picture)


def check_pictures(images: Any) -> None:
    """Refuses what is no list of pictures, such as a single one.

    Raises:
      ValueError: says what is taken.
    """
    one = isinstance(images, ONE) or getattr(images, "ndim", 4) != 4
    if one or not (hasattr(images, "__len__") and hasattr(images, "__getitem__")):
        raise ValueError(
            f"images is one {type(images).__name__}: give a list of pictures (paths, "
            "bytes, Pillow images, uint8 arrays), an array [M h w 3], or a source"
        )


def _encode(picture: Any, where: str) -> bytes:
    """The same pixels as an uncompressed file, so that there is one way of reading.

    Raises:
      ValueError: it is no picture; names the type or the shape.
      BadImage: Pillow can not load it, as of a cut file or one that is closed.
    """
    file = io.BytesIO()
    if isinstance(picture, Image.Image):
        with decoding():
            image = ImageOps.exif_transpose(picture)
        if image.mode in ("La", "RGBa", "PA"):
            image = image.convert("RGBA" if image.mode != "La" else "LA")
        if image.mode not in PNG_MODES:
            image = modes.flatten(image, plain_cmyk=False)
    else:
        array = np.asarray(picture)
        if array.ndim == 3 and array.shape[2] == 1:
            array = array[..., 0]
        planes = array.shape[2:] in ((), (3,), (4,))
        if array.dtype != np.uint8 or array.ndim not in (2, 3) or not planes:
            raise ValueError(
                f"{where} is a {type(picture).__name__} of dtype {array.dtype} and "
                f"shape {array.shape}: give a path, a Pillow image, or a uint8 array "
                "[h w 3], [h w 4], [h w 1] or [h w]"
            )
        if not array.size:
            raise ValueError(f"{where} has shape {array.shape}: it has no pixel")
        image = Image.fromarray(array)
    image.save(file, format="png", compress_level=0)
    return file.getvalue()


# These have a length and parts as well, which are no pictures by number.
ONE = (str, bytes, bytearray, memoryview, os.PathLike, Image.Image, Mapping)
# The others that Pillow has, such as CMYK and F, are no PNG.
PNG_MODES = ("1", "L", "LA", "I;16", "P", "RGB", "RGBA")


def count_patches(
    table: UInt16[np.ndarray, "M 2"],
    law: resolution.Law,
    patch: int,
    upscale: bool,
    square: bool,
    max_side: int | None,
) -> Int64[np.ndarray, " M"]:
    """The patches of each picture by a law that draws nothing, LONGEST at most."""
    whole = np.zeros(len(table))
    side = law(whole, table.astype(np.int64))
    grids = resolution.grids(table, side, patch, upscale, square)
    return resolution.limit(grids, table, whole, LONGEST, max_side)[1]


def row_length(tokens: int, needed: int) -> int:
    """A length of rows, doubled until a picture of the needed patches fits."""
    while tokens < needed:
        tokens *= 2
    return tokens


def lengthen(stream: Stream, shards: int) -> Stream:
    """A pass over one source in rows that its longest picture needs.

    A batch has as many fewer of them, but one for each of the shards that split rows.
    """
    plan = stream.plan
    lengths = count_patches(
        plan.tables[0], plan.resolution, plan.patch, plan.upscale, plan.square,
        plan.max_side,
    )  # fmt: skip
    tokens = row_length(plan.tokens, int(lengths.max()))
    rows = shards * max(1, plan.rows * plan.tokens // (tokens * shards))
    return dataclasses.replace(
        stream,
        plan=dataclasses.replace(plan, tokens=tokens, rows=rows),
        loader=dataclasses.replace(stream.loader, num_tokens=tokens),
    )


def plan_pictures(
    source: Source,
    law: resolution.Law,
    *,
    patch: int,
    tokens: int,
    slots: int,
    max_side: int,
    upscale: bool,
    square: bool,
    num_labels: int,
    codec: str,
    devices: int,
) -> Stream:
    """One pass over pictures, in rows as long as the longest of them needs.

    Args:
      law: The resolution of each.
      tokens: L of training, which is doubled until the longest picture fits.
      devices: Rows are a multiple of these, and few where the pictures are.

    The others are those of `Plan` and `Loader`.
    """
    threads = os.cpu_count() or 1
    if isinstance(source, StoredSource):
        table = sizes.size_table(source)
    else:
        table, _ = sizes.scan(source, threads, quiet=True)
    lengths = count_patches(table, law, patch, upscale, square, max_side)
    largest = law.largest or 0
    if not upscale:
        largest = min(largest, math.sqrt(table.prod(1, dtype=np.int64).max()))
    # The plan wants room for a square image of that side, whether there is one or not.
    needed = max(int(lengths.max()), (int(largest) // patch) ** 2)
    length = row_length(tokens, needed)
    wanted = lengths.sum() / (length * devices)
    rows = min(2 ** max(0, math.ceil(math.log2(wanted))), ROWS * tokens // length)
    plan = Plan(
        tables=[table],
        weights=[1],
        seed=0,
        patch=patch,
        tokens=length,
        slots=slots,
        rows=devices * max(1, rows),
        resolution=law,
        upscale=upscale,
        square=square,
        max_side=max_side,
        training=False,
    )
    loader = Loader((source,), (source.name,), patch, length, slots, num_labels, codec)
    return Stream(plan, loader, threads=threads, workers=0, prefetch=2)
