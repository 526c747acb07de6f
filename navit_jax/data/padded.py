"""Pictures on white canvases whose aspect says nothing of what is on them.

Where aspect gives labels away (`navit_jax/baselines.py`), a model of native aspects has
a clue in the shape of its grid that a model of squares lacks. Here that shape is worth
nothing; what is drawn keeps its own. M images; sizes are (height, width), upright.
"""

import dataclasses
import io

import numpy as np
from jaxtyping import UInt16

from navit_jax.data import draws, images
from navit_jax.data.containers import MAX_PIXELS, MAX_SIDE
from navit_jax.data.records import Record, StoredSource, digest


@dataclasses.dataclass(frozen=True, eq=False)
class Padded:
    """The pictures of a source, each in the middle of a white canvas of their scale.

    Attributes:
      whole: The source.
      own_sizes: uint16 [M 2], its size table.
      seed: Of `draw_canvases`.
      sizes: uint16 [M 2], the size table here: of the canvases.
    """

    whole: StoredSource
    own_sizes: np.ndarray
    seed: int
    sizes: np.ndarray = dataclasses.field(init=False)

    def __post_init__(self):
        canvases = draw_canvases(np.asarray(self.own_sizes), self.seed)
        object.__setattr__(self, "sizes", canvases)

    @property
    def name(self) -> str:
        """As in Source, and so are the other members."""
        return f"{self.whole.name} padded"

    @property
    def class_names(self) -> tuple[str, ...]:
        """The classes of the whole."""
        return self.whole.class_names

    @property
    def groups(self) -> np.ndarray | None:
        """The near-duplicate groups of the whole, if known."""
        return getattr(self.whole, "groups", None)

    @property
    def folder(self) -> str:
        """The folder of the whole."""
        return self.whole.folder

    def fingerprint(self) -> str:
        """Of the whole and of the draw."""
        return digest(["padded", self.seed, self.whole.fingerprint()])

    def __len__(self) -> int:
        return len(self.whole)

    def __getitem__(self, index: int) -> Record:
        record = self.whole[index]
        height, width = own = tuple(self.own_sizes[index].tolist())
        try:
            # By Pillow, so that the pixels do not depend on what else is installed.
            pixels, _ = images.read(record.image, own, own, codec="pillow")
        except images.BadImage:
            return record  # Whoever reads it is told why.
        rows, columns = self.sizes[index].tolist()
        top, left = (rows - height) // 2, (columns - width) // 2
        canvas = np.full((rows, columns, 3), 255, np.uint8)
        canvas[top : top + height, left : left + width] = pixels
        file = io.BytesIO()
        np.save(file, canvas, allow_pickle=False)
        return dataclasses.replace(
            record, key=f"{record.key} padded", image=file.getvalue()
        )


def draw_canvases(
    sizes: UInt16[np.ndarray, "M 2"], seed: int
) -> UInt16[np.ndarray, "M 2"]:
    """The least canvas for each picture that has the aspect of another one.

    Aspects are those of the set, dealt anew by a random permutation: independent of
    the pictures, so of labels and sizes too, while their law stays the one that a model
    of the set was trained on. (A law of our own, as log-uniform in 1/3 .. 3, would add
    more white than this, and judge on shapes that are rare in training.)

    Args:
      sizes: (0, 0) for a picture that can not be read, which has no canvas either.
      seed: The draw is a function of it, the picture's number and the set's sizes.

    Returns:
      At least as high and as wide as the picture, and larger along one side at most; no
      larger than what can be read.
    """
    canvases = np.zeros_like(sizes)
    usable = np.flatnonzero(sizes.all(1))
    own = sizes[usable].astype(np.int64)
    dealt = own[draws.permute(np.arange(len(own)), len(own), seed, 0)]
    wanted = np.rint(own[:, ::-1] * dealt / dealt[:, ::-1])
    largest = np.minimum(MAX_PIXELS // own[:, ::-1], MAX_SIDE)
    canvases[usable] = np.maximum(own, np.minimum(wanted, largest))
    return canvases
