"""The packing plan: which images, at which size, in which row, before any is decoded.

All of it is a function of the size tables and the arguments of `Plan`. M images.
"""

import dataclasses
import functools
import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float64, Int64

from navit_jax.data import crop as crops
from navit_jax.data import draws, mapped, packers
from navit_jax.data import resolution as resolutions
from navit_jax.data import token_drop as token_drops
from navit_jax.data.captions import draw_captions
from navit_jax.data.mixture import Mixture, repeat
from navit_jax.data.window import PlannedRow, PlannedWindow, summarize
from navit_jax.errors import ConfigError, DataError, TooLarge

# Goes up when the same arguments plan other rows: a checkpoint of before is refused.
PLAN_VERSION = 1
# Fewer images pack badly, so a smaller source may come twice in a window of a mixture.
SMALLEST_WINDOW = 1024


@dataclasses.dataclass(frozen=True, eq=False)
class Plan:
    """An endless stream of images (in evaluation: one pass), packed window by window.

    Attributes:
      tables: For each source, [M 2] the (height, width) of its images in pixels; (0, 0)
        for one that can not be read, planned as one patch. Mapped files travel by name.
      weights: Shares of the sources in the stream.
      seed: Of order and draws.
      patch: Side of a patch, in pixels.
      tokens: L, tokens of a row.
      slots: N, images of a row at most.
      rows: B, global rows of a batch.
      resolution: A law of `resolution.LAWS`.
      token_drop: A law of `token_drop.LAWS`; in evaluation nothing is dropped.
      crop: A law of `crop.LAWS`; in evaluation nothing is cropped.
      window: Images that are packed together, at most.
      plan_shards: Windows are dealt to so many shards, of which each batch takes an
        equal number of rows; a host plans only the shards of its rows.
      packer: A name for `packers.choose`.
      upscale: Whether images may be enlarged.
      square: Side x side whatever the aspect: the plain ViT.
      fill: Whether the last image of a row keeps as many tokens as there is room for.
      flip: Probability of mirroring, in training.
      jitter: Colour factors are uniform in [1 - jitter, 1 + jitter], in training.
      max_side: Longest side in patches, that of the position table; None: any.
      repeats: Times that an image comes in a window, in training (Hoffer et al. 2019).
      training: False plans each image once, in order of the table; nothing is drawn.
      captions: For each source, [M K] tokens of each caption; see `captions.py`.
        Without: no image brings a text.
      text_tokens: T, text tokens of a row.

    Raises:
      ConfigError: an argument that can not work, named with the remedy.
      DataError: a source without images.
    """

    tables: Sequence[np.ndarray]
    weights: Sequence[float | int]
    seed: int
    patch: int
    tokens: int
    slots: int
    rows: int
    resolution: resolutions.Law
    token_drop: token_drops.Law = dataclasses.field(default_factory=token_drops.NoDrop)
    crop: crops.Law = dataclasses.field(default_factory=crops.Whole)
    window: int = 16_384
    plan_shards: int = 1
    packer: str = "auto"
    upscale: bool = True
    square: bool = False
    fill: bool = False
    flip: float | int = 0.0
    jitter: float | int = 0.0
    max_side: int | None = None
    repeats: int = 1
    training: bool = True
    captions: Sequence[np.ndarray] = ()
    text_tokens: int = 0

    def __post_init__(self):
        for i, table in enumerate(self.tables):
            if not len(table):
                raise DataError(f"source {i} has no images; check its path and split")
        if not self.training and len(self.tables) != 1:
            raise ConfigError(
                f"data.sources: evaluation takes one source, not {len(self.tables)}; "
                "give each an evaluation of its own"
            )
        whole = ("patch", "tokens", "slots", "rows", "window", "plan_shards", "repeats")
        for field in whole:
            if getattr(self, field) < 1:
                raise ConfigError(f"data.{field}={getattr(self, field)} must be >= 1")
        for field in ("flip", "jitter"):
            if not 0 <= getattr(self, field) <= 1:
                raise ConfigError(f"data.{field}={getattr(self, field)}: needs 0 to 1")
        if self.rows % self.plan_shards:
            raise ConfigError(
                f"data.plan_shards={self.plan_shards} must divide "
                f"data.rows={self.rows}: every batch takes as many rows of each"
            )
        packers.choose(self.packer)
        self._check_largest()
        assert self.mixture, "it checks the weights"

    def _check_largest(self) -> None:
        """A square image at the largest resolution must fit, or the config is wrong."""
        if (side := self.resolution.largest) is None:
            return
        if not self.upscale:
            areas = [table.prod(1, dtype=np.int64).max() for table in self.tables]
            side = min(side, max(areas) ** 0.5)
        grid = resolutions.grids(np.ones((2, 2)), np.full(2, float(side)), self.patch)
        # The typical rate, when training begins and after every schedule's end.
        seen = np.array([0, 2**62])
        rate = self._rates(np.full(2, 0.5), grid.prod(1), seen)
        kept = int(resolutions.kept_tokens(grid, rate).max())
        if self.max_side is not None and grid.max() > self.max_side:
            raise TooLarge(
                f"reaches {side:g} px, {grid.max()} patches a side, but "
                f"positions.length={self.max_side}: {self.max_side * self.patch} px, "
                f"{self.max_side**2} patches, are the most; raise it, or lower this"
            )
        if kept > self.tokens:
            raise TooLarge(
                f"reaches {side:g} px, where a square image keeps {kept} tokens, but "
                f"a row has tokens={self.tokens}: raise it, or lower this"
            )

    @functools.cached_property
    def mixture(self) -> Mixture:
        """Which source each position of the stream holds."""
        return Mixture(tuple(map(len, self.tables)), tuple(self.weights))

    @functools.cached_property
    def num_windows(self) -> int | None:
        """Windows of an epoch; None for a mixture, of which each source has epochs."""
        if len(self.tables) > 1:
            return None
        return -(-len(self.tables[0]) // self.window)

    def number(self, epoch: int, window: int) -> int:
        """The number of a window in the stream."""
        return window if self.num_windows is None else epoch * self.num_windows + window

    def label(self, number: int) -> tuple[int, int]:
        """The (epoch, window) of a number; a mixture stays in epoch 0."""
        if self.num_windows is None:
            return 0, number
        return divmod(number, self.num_windows)

    def images_before(self, number: Any) -> Any:
        """The position in the stream at which a window begins; numbers or arrays."""
        if self.num_windows is None:
            longest = max(SMALLEST_WINDOW, self.mixture.longest_window())
            return number * min(self.window, longest)
        # Windows of nearly equal size: a short last one would pack badly.
        epoch, window = number // self.num_windows, number % self.num_windows
        size = len(self.tables[0])
        return epoch * size + window * size // self.num_windows

    def is_over(self, number: int) -> bool:
        """Whether a window comes after the end of the stream."""
        return not self.training and number >= (self.num_windows or 0)

    def plan_window(self, epoch: int, window: int) -> PlannedWindow:
        """Plans one window of an epoch.

        Its rows are shuffled (not in evaluation): some packers leave small images to
        the end, and size must not follow from the place in a run.
        """
        number = self.number(epoch, window)
        start = self.images_before(number)
        images = self._draw(np.arange(start, self.images_before(number + 1)))
        capacity = self.capacity
        lengths = images.lengths[:, : len(capacity)]
        rows = packers.assign_rows(lengths, capacity, self.slots, self.packer)
        if self.fill:
            full = images.grid.prod(1)
            kept = packers.fill_exactly(images.kept, rows, self.tokens, full)
            images = images._replace(kept=kept)
        num_rows = int(rows.max()) + 1
        if self.training:
            keys = draws.key(self.seed, 0, start + np.arange(num_rows), "rows")
            rows = np.argsort(np.argsort(keys))[rows]
        order = np.argsort(rows, kind="stable")
        starts = np.searchsorted(rows[order], np.arange(num_rows + 1))
        return PlannedWindow(PlannedRow(*(field[order] for field in images)), starts)

    @property
    def capacity(self) -> list[int]:
        """What a row has room for: image tokens and, with captions, text tokens."""
        return [self.tokens, self.text_tokens] if self.captions else [self.tokens]

    def _rates(self, u: np.ndarray, tokens: np.ndarray, seen: np.ndarray) -> np.ndarray:
        return self.token_drop(u, tokens, seen) if self.training else np.zeros(len(u))

    def _draw(self, positions: Int64[np.ndarray, " M"]) -> PlannedRow:
        """The images at positions of the stream, with all that is drawn for them."""
        mixture, M = self.mixture, len(positions)
        base, copy = repeat(positions, self.repeats, self.window)
        source, epoch, index = (
            mixture.shuffle(base, self.seed) if self.training else mixture.locate(base)
        )
        epoch = epoch * self.repeats + copy
        size = np.empty((M, 2), np.int64)
        for i, table in enumerate(self.tables):
            size[source == i] = table[index[source == i]]
        ids = source << 40 | index

        def draw(purpose: str) -> Float64[np.ndarray, " M"]:
            return draws.uniform(self.seed, epoch, ids, purpose)

        box = (self.crop if self.training else crops.Whole())(draw, size)
        shape = size * (box[:, 2:] - box[:, :2])
        side = self.resolution(draw("side"), shape)
        grid = resolutions.grids(shape, side, self.patch, self.upscale, self.square)
        rate = self._rates(draw("drop"), grid.prod(1), positions)
        aspect = grid if self.square else shape
        grid, kept, shrunk = resolutions.limit(
            grid, aspect, rate, self.tokens, self.max_side
        )
        jitter, flip = np.ones((M, 3)), np.zeros(M, bool)
        if self.training and self.jitter:
            names = ("brightness", "contrast", "saturation")
            jitter += self.jitter * (2 * np.stack([draw(x) for x in names], 1) - 1)
        if self.training and self.flip:
            flip = draw("flip") < self.flip
        u = draw("caption") if self.training and self.captions else np.zeros(M)
        caption, text = draw_captions(self.captions, source, index, u)
        return PlannedRow(
            source=source,
            index=index,
            size=size,
            box=box,
            grid=grid,
            kept=kept,
            drop_key=draws.key(self.seed, epoch, ids, "kept patches"),
            flip=flip,
            jitter=jitter,
            shrunk=shrunk,
            images_seen=positions,
            caption=caption,
            text=text,
        )

    def fingerprint(self) -> str:
        """Short and hexadecimal; differs if any planned row may differ."""
        digest = hashlib.blake2b(f"plan {PLAN_VERSION}".encode(), digest_size=8)
        # Plans without texts or repeats keep the fingerprint of before there were any.
        without = ["captions", *["text_tokens"] * (not self.captions)]
        without += ["repeats"] * (self.repeats == 1)
        for field in dataclasses.fields(self)[1:]:
            if field.name not in without:
                digest.update(f"{field.name}={getattr(self, field.name)!r};".encode())
        for table in [*self.tables, *self.captions]:
            digest.update(f"{len(table)} images;".encode())
            for start in range(0, len(table), 1 << 20):
                digest.update(table[start : start + (1 << 20)].astype("<u4").tobytes())
        return digest.hexdigest()

    def check_fingerprint(self, fingerprint: str) -> None:
        """Raises ConfigError if the stream is not the one of this fingerprint."""
        if fingerprint != self.fingerprint():
            raise ConfigError(
                f"the checkpoint's stream of images ({fingerprint}) is not that of "
                f"this config and data ({self.fingerprint()}): restore `seed`, the "
                "data section and the files, or begin in a new folder"
            )

    def report(self, windows: int = 1) -> dict[str, Any]:
        """What the first windows of the stream are like, without reading a pixel.

        The entries are those of `summarize`.
        """
        labels = [self.label(i) for i in range(windows) if not self.is_over(i)]
        planned, num = [self.plan_window(*each) for each in labels], len(self.tables)
        return summarize(planned, self.capacity, self.slots, self.packer, num)

    def __reduce__(self):
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        for name in ("tables", "captions"):
            fields[name] = mapped.by_name(fields[name])
        return _rebuild, (fields,)


def _rebuild(fields: dict[str, Any]) -> Plan:
    for name in ("tables", "captions"):
        fields[name] = mapped.map_again(fields[name])
    return Plan(**fields)
