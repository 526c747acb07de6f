"""Scenes composed when they are read: cut-outs at random places of a photograph.

Every pixel's object is known, and an object is small in its scene, so that where a
model looks can be judged. A scene is a function of (seed, split, index): there are no
files of scenes. h, w pixels of one; M scenes, O objects of one.
"""

import dataclasses
import functools
import io
import pathlib
from collections.abc import Sequence

import numpy as np
from jaxtyping import UInt8, UInt16
from PIL import Image

from navit_jax.data import draws
from navit_jax.data.builders import classes, groups
from navit_jax.data.masks import visible
from navit_jax.data.records import (
    Objects,
    Record,
    Selection,
    Source,
    cache_folder,
    digest,
)
from navit_jax.data.stored import array_record
from navit_jax.errors import ConfigError

CUTOUTS, BACKGROUNDS = "cutouts", "backgrounds"
LABELS: dict[str, tuple[str, ...]] = {
    "classes8": classes.CLASSES8, "classes34": classes.CLASSES34, "none": ()
}  # fmt: skip
# Raise it when the same arguments compose other pixels.
VERSION = 1
# Of an object's pixels, above it: what the cut-out covers.
SOLID = 127


def built_folder() -> pathlib.Path:
    """Where `python -m navit_jax.data.builders.composites` builds."""
    return cache_folder() / "composites"


@dataclasses.dataclass(frozen=True, eq=False)
class Composites:
    """A source of scenes; its arguments are those of `composites`.

    Attributes:
      cutouts, backgrounds: What scenes are made of.
      class_names: As in Source; of the cut-outs.
      sizes: uint16 [M 2], the (h, w) of all scenes.
    """

    cutouts: Source
    backgrounds: Source
    class_names: tuple[str, ...]
    split: str
    count: int
    seed: int
    most: int
    share: tuple[float, float]
    side: tuple[int, int]
    stamp: str
    sizes: np.ndarray = dataclasses.field(init=False)

    def __post_init__(self):
        object.__setattr__(self, "sizes", self._draw_sizes())

    @property
    def name(self) -> str:
        """As in Source, and so are the other members."""
        return f"composites/{self.split}"

    @property
    def folder(self) -> str:
        """Of the cut-outs."""
        return getattr(self.cutouts, "folder", "")

    def fingerprint(self) -> str:
        """Of what scenes are made of, and of the arguments."""
        return self.stamp

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Record:
        if not 0 <= index < self.count:
            raise IndexError(index)
        scene, objects = self.compose(index)
        file = io.BytesIO()
        np.save(file, scene, allow_pickle=False)
        labels = tuple(sorted(set(objects.labels.tolist())))
        return Record(f"{self.split}/{index}", file.getvalue(), labels, objects=objects)

    def compose(self, index: int) -> tuple[UInt8[np.ndarray, "h w 3"], Objects]:
        """The pixels of a scene, and its objects as far as they are visible.

        Objects are laid one after the other, so a later one hides what is below it.
        """
        height, width = map(int, self.sizes[index])
        scene = self._background(index, height, width)
        instances = np.zeros((height, width), np.uint8)
        side, labels = (height * width) ** 0.5, []
        for number in range(1, 1 + int(1 + self._draw(index, "objects") * self.most)):
            draw = functools.partial(self._draw, index, number=number)
            record = self.cutouts[int(draw("cutout") * len(self.cutouts))]
            with Image.open(io.BytesIO(record.image)) as opened:
                cutout = opened.convert("RGBA")
            low, high = self.share
            wanted = side * (low + (high - low) * draw("share"))
            scale = wanted / max(cutout.size)
            w, h = (max(1, round(x * scale)) for x in cutout.size)
            w, h = min(w, width), min(h, height)
            cutout = cutout.resize((w, h), Image.Resampling.LANCZOS)
            left = int(draw("left") * (width - w + 1))
            top = int(draw("top") * (height - h + 1))
            scene.paste(cutout, (left, top), cutout)
            solid = np.asarray(cutout.getchannel("A")) > SOLID
            instances[top : top + h, left : left + w][solid] = number
            labels.append(record.labels[0] if record.labels else -1)
        return np.array(scene), visible(instances, np.array(labels, np.int32))

    def _background(self, index: int, height: int, width: int) -> Image.Image:
        """A crop of a photo with the aspect of the scene, half its area or more."""
        which = int(self._draw(index, "background") * len(self.backgrounds))
        with Image.open(io.BytesIO(self.backgrounds[which].image)) as opened:
            photo = opened.convert("RGB")
        largest = min(photo.width / width, photo.height / height)
        scale = largest * (0.5 + 0.5 * self._draw(index, "zoom")) ** 0.5
        w, h = width * scale, height * scale
        left = self._draw(index, "background left") * (photo.width - w)
        top = self._draw(index, "background top") * (photo.height - h)
        box = (left, top, min(left + w, photo.width), min(top + h, photo.height))
        resample = Image.Resampling.BILINEAR
        return photo.resize((width, height), resample, box=box, reducing_gap=3.0)

    def _draw(self, index: int, purpose: str, number: int = 0) -> float:
        where = f"{self.split}/{purpose}/{number}"
        return float(draws.uniform(self.seed, 0, np.array([index]), where)[0])

    def _draw_sizes(self) -> UInt16[np.ndarray, "M 2"]:
        """Aspects (w / h) and, within the limits, short sides are log-uniform."""
        places, (short, long) = np.arange(self.count), self.side
        u, v = (
            draws.uniform(self.seed, 0, places, f"{self.split}/{purpose}")
            for purpose in ("aspect", "side")
        )
        aspect = 3 ** (2 * u - 1)
        stretch = np.maximum(aspect, 1 / aspect)
        least = short * np.maximum(long / stretch / short, 1) ** v
        shape = np.sqrt(np.stack([1 / aspect, aspect], 1) * stretch[:, None])
        sides = np.rint(least[:, None] * shape)
        return np.clip(sides, 1, long).astype(np.uint16)


def composites(
    split: str,
    count: int,
    labels: str = "classes8",
    seed: int = 0,
    objects: int = 5,
    share: Sequence[float | int] = (0.2, 0.5),
    side: Sequence[int] = (64, 480),
    path: str | None = None,
) -> Composites:
    """Opens scenes of clip art on photographs.

    Args:
      split: "train", "validation" or "test"; no cut-out and no photo is in two.
      count: Number of scenes.
      labels: "classes8" or "classes34" of the embedded set: only cut-outs with a label
        of it are used; "none": all, without labels.
      seed: Of all draws.
      objects: The most objects of a scene; the least is 1.
      share: Least and largest long side of an object, as a share of the square root of
        the scene's area.
      side: Least short and largest long side of a scene, in pixels; its aspect is 1:3
        to 3:1.
      path: Where the sets were built; None: in the cache folder.

    Raises:
      ConfigError: an argument that can not work, or the sets are not built.
    """
    if labels not in LABELS:
        raise ConfigError(
            f"labels={labels!r} of composites is unknown; known: {', '.join(LABELS)}"
        )
    if split not in groups.SPLITS:
        raise ConfigError(
            f"split={split!r} of composites is unknown; known: "
            f"{', '.join(groups.SPLITS)}"
        )
    if count < 1 or not 1 <= objects <= 255:
        raise ConfigError(
            f"count={count}, objects={objects} of composites: give at least 1 scene, "
            "and 1 to 255 objects"
        )
    if not (0 < share[0] <= share[1] <= 0.57 and 0 < side[0] <= side[1]):
        raise ConfigError(
            f"share={share}, side={side} of composites: needs 0 < least <= largest; an "
            "object of more than .57 does not fit across a scene of 1:3"
        )
    folder, names = pathlib.Path(path or built_folder()), LABELS[labels]
    files = [folder / f"{kind}-{split}.array_record" for kind in (CUTOUTS, BACKGROUNDS)]
    if not all(file.exists() for file in files):
        raise ConfigError(
            f"no cut-outs in {folder}; `python -m navit_jax.data.builders.composites` "
            "builds them"
        )
    label = labels if names else None
    cutouts = array_record(
        str(files[0]), "image", label, key="key", num_classes=len(names)
    )
    photos = array_record(str(files[1]), "image", key="key")
    chosen: Source = cutouts
    if names:
        places = [i for i in range(len(cutouts)) if cutouts[i].labels]
        chosen = Selection(cutouts, np.array(places, np.int32))
    parts = [VERSION, cutouts.fingerprint(), photos.fingerprint(), split, count, labels]
    return Composites(
        cutouts=chosen,
        backgrounds=photos,
        class_names=names,
        split=split,
        count=count,
        seed=seed,
        most=objects,
        share=(float(share[0]), float(share[1])),
        side=(int(side[0]), int(side[1])),
        stamp=digest([*parts, seed, objects, tuple(share), tuple(side)]),
    )
