"""From sources to packed batches on the host: numpy only, no worker touches a device.

The chain: planned batches -> this host's rows -> load -> iterate -> worker processes.
grain iterates; the plan (`plan.py`) decides everything else, so the number of threads,
workers and hosts changes no batch.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from absl import logging
from jaxtyping import Integer

from navit_jax import config as config_lib
from navit_jax.batch import BatchInfo, PackedBatch
from navit_jax.data import codec as codecs
from navit_jax.data import crop as crops
from navit_jax.data import rand_augment as rand_augments
from navit_jax.data import resolution as resolutions
from navit_jax.data import teacher_outputs as teachers
from navit_jax.data import token_drop as drops
from navit_jax.data.captions import caption_lengths, leave_out
from navit_jax.data.load import Loader
from navit_jax.data.plan import Plan
from navit_jax.data.records import Source, StoredSource
from navit_jax.data.rows import Batches
from navit_jax.data.sizes import size_table
from navit_jax.data.sources import SOURCES
from navit_jax.data.tokenizer import Tokenizer, open_tokenizer
from navit_jax.data.workers import follow_parent
from navit_jax.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class Stream:
    """Sources, the plan over them, and how their images are loaded.

    Attributes:
      plan: What is planned.
      loader: Reads and packs planned rows.
      threads: Batches that are loaded at once, in each process.
      workers: Processes that load; 0 loads in this one.
      prefetch: Batches kept ready.
    """

    plan: Plan
    loader: Loader
    threads: int
    workers: int
    prefetch: int

    @property
    def class_names(self) -> tuple[str, ...]:
        """Of the sources, which share them; () if they have no labels."""
        return tuple(self.loader.sources[0].class_names)

    @property
    def num_classes(self) -> int:
        """Of the sources; 0 if they have no labels."""
        return len(self.class_names)

    @property
    def tokenizer(self) -> Tokenizer | None:
        """Of the captions that images bring; None if they bring none."""
        return self.loader.tokenizer

    def example(self) -> PackedBatch:
        """A global batch of empty rows: for shapes."""
        return self.loader.pack([[] for _ in range(self.plan.rows)])

    def batches(
        self,
        rows: Integer[np.ndarray, " B"],
        position: Sequence[Sequence[int]] | None = None,
    ) -> Iterator[tuple[PackedBatch, BatchInfo]]:
        """Loads this host's rows of batch after batch; without end in training.

        Args:
          rows: This host's rows of the global batch, ascending.
          position: Where to go on, [epoch, window, row] for each plan shard; None is
            the start.
        """
        import grain

        load = LoadBatch(Batches(self.plan, position), self.loader, rows)
        source: Any = load  # grain types a source by generics that a class needs not
        dataset = grain.MapDataset.source(source).to_iter_dataset(
            grain.ReadOptions(
                num_threads=self.threads, prefetch_buffer_size=self.prefetch
            )
        )
        if self.workers:
            dataset = dataset.mp_prefetch(
                grain.MultiprocessingOptions(num_workers=self.workers),
                worker_init_fn=follow_parent,
            )
        for loaded in dataset:
            yield loaded["batch"], loaded["info"]


@dataclasses.dataclass(frozen=True)
class LoadBatch:
    """Random access to loaded batches: item k is the k-th after the position."""

    batches: Batches
    loader: Loader
    rows: np.ndarray

    def __len__(self) -> int:
        """The number of batches; huge in training."""
        return len(self.batches)

    def __getitem__(self, k: int) -> dict[str, Any]:
        """Batch k of this host's rows, and its BatchInfo."""
        start, stop = int(self.rows[0]), int(self.rows[-1]) + 1
        planned = self.batches.rows(k, start, stop)
        loaded = self.loader.load([planned[row - start] for row in self.rows])
        info = BatchInfo(**self._place(k), **loaded.info)
        return {"batch": self.loader.pack(loaded.images), "info": info}

    def _place(self, k: int) -> dict[str, Any]:
        """Position and images seen of each shard whose first row is here."""
        plan = self.batches.plan
        position: list[list[int] | None] = [None] * plan.plan_shards
        images: list[int | None] = [None] * plan.plan_shards
        for shard in range(plan.plan_shards):
            first = shard * plan.rows // plan.plan_shards
            if first in self.rows:
                position[shard] = self.batches.position(k, first, first + 1)[shard]
                images[shard] = self.batches.images_seen(k, first, first + 1)
        return {"position": position, "images_seen": images}


def open_sources(
    sections: Mapping[str, Any],
) -> tuple[list[StoredSource], list[float | int]]:
    """The sources of `config.data.sources`, and their weights (1 if none is given)."""
    if not sections:
        raise ConfigError("config.data.sources is empty: name at least one source")
    sources: list[StoredSource] = []
    weights: list[float | int] = []
    for name, section in sections.items():
        arguments = {k: v for k, v in section.items() if k != "weight"}
        where = f"data.sources.{name}"
        sources.append(config_lib.build(arguments, SOURCES, where))
        weights.append(section.get("weight", 1.0))
    for source in sources[1:]:
        check_classes(source, sources[0].class_names)
    return sources, weights


def check_classes(source: Source, class_names: Sequence[str]) -> None:
    """Raises ConfigError if a source has other classes than those, by number.

    Classes without names are known by their number alone.
    """
    own, wanted = list(source.class_names), list(class_names)
    if own != wanted:
        raise ConfigError(
            f"source {source.name} has {len(own)} classes {own[:4]}..., the others "
            f"{len(wanted)}: {wanted[:4]}...; sources that are trained on or judged "
            "together must share their classes, in one order"
        )


def open_text(section: Mapping[str, Any]) -> tuple[int, Tokenizer]:
    """T and the tokenizer of section `data.text`.

    Raises:
      ConfigError: `tokens` is missing, or less than the longest text may have.
    """
    where = "data.text"
    arguments = {k: v for k, v in section.items() if k not in ("tokens", "captions")}
    tokenizer = config_lib.call(open_tokenizer, arguments, where)
    tokens = section.get("tokens")
    if not isinstance(tokens, int) or tokens < tokenizer.length:
        raise ConfigError(
            f"config.{where}.tokens={tokens}: give the text tokens of a row, at least "
            f"one text's, {where}.length={tokenizer.length}; `python -m navit_jax.plan "
            "--packing` recommends a number"
        )
    return tokens, tokenizer


def open_stream(
    *,
    sources: Mapping[str, Any],
    rows: int,
    tokens: int,
    slots: int,
    resolution: Mapping[str, Any],
    seed: int,
    patch: int,
    max_side: int | None,
    training: bool = True,
    token_drop: Mapping[str, Any] | None = None,
    crop: Mapping[str, Any] | None = None,
    upscale: bool = True,
    square: bool = False,
    fill: bool = False,
    flip: float | int = 0.0,
    jitter: float | int = 0.0,
    rand_augment: str = "",
    repeats: int = 1,
    window: int = 16_384,
    plan_shards: int = 1,
    packer: str = "auto",
    num_labels: int = 1,
    pixel_classes: bool = False,
    teacher: str = "",
    text: Mapping[str, Any] | None = None,
    codec: str = "auto",
    threads: int = 2,
    workers: int = 0,
    prefetch: int = 4,
) -> Stream:
    """Opens section `data` of a config: sources, size tables, plan, loader.

    Args:
      sources: By any name, a section each with `name`, its arguments, and `weight`.
      rows: Rows of the global batch.
      tokens: L, tokens a row.
      slots: N, images a row at most.
      resolution, token_drop, crop: Sections of the laws of `resolution.py`,
        `token_drop.py` and `crop.py`.
      seed: Of order and draws.
      patch: Side of a patch in pixels.
      max_side: Longest side the position table has, in patches.
      training: Whether to shuffle, drop and augment, without end.
      num_labels: The most labels an image may have.
      pixel_classes: Whether images bring their pixels' classes, where these are known.
      teacher: A folder of `navit_jax.teach`, whose vectors whole images bring.
      rand_augment: A law of `rand_augment.build`, in training; "" for none.
      text: For images that bring a caption: `tokens`, T of a row, and the arguments of
        `tokenizer.open_tokenizer`. Images without a caption of use are left out;
        with `captions=False` none brings one, and only evaluation reads texts.
      codec: What decodes and resizes; see `codec.choose`. Pixels depend on it.
      threads, workers, prefetch: As in `Stream`.

    The others are those of `plan.Plan`.
    """
    codecs.choose(codec)
    opened, weights = open_sources(sources)
    text = None if text and not text.get("captions", True) else text
    text_tokens, tokenizer = open_text(text) if text else (0, None)
    captions = []
    if tokenizer:
        pairs = [(source, caption_lengths(source, tokenizer)) for source in opened]
        opened, captions = zip(*(leave_out(*pair) for pair in pairs), strict=True)
    given = teachers.open_outputs(teacher, sources, opened, crop)
    images = sum(map(len, opened))
    if training and images < rows:
        logging.warning(
            "data.rows=%d: a batch has more rows than there are images, %d, and shows "
            "some several times; lower it, or check the sources", rows, images,
        )  # fmt: skip
    build, none = config_lib.build, {"name": "none"}
    rand_augments.check(rand_augment, pixel_classes)
    plan = Plan(
        tables=[size_table(source) for source in opened],
        weights=weights,
        seed=seed,
        patch=patch,
        tokens=tokens,
        slots=slots,
        rows=rows,
        resolution=build(resolution, resolutions.LAWS, "data.resolution"),
        token_drop=build(token_drop or none, drops.LAWS, "data.token_drop"),
        crop=build(crop or none, crops.LAWS, "data.crop"),
        repeats=repeats if training else 1,
        window=window,
        plan_shards=plan_shards,
        packer=packer,
        upscale=upscale,
        square=square,
        fill=fill,
        flip=flip,
        jitter=jitter,
        max_side=max_side,
        training=training,
        captions=captions,
        text_tokens=text_tokens,
    )
    loader = Loader(
        tuple(opened),
        tuple(sources),
        patch,
        tokens,
        slots,
        num_labels,
        codec,
        tokenizer,
        text_tokens,
        pixel_classes,
        given,
        rand_augment if training else "",
    )
    return Stream(plan, loader, threads, workers, prefetch)
