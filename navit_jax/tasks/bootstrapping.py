"""Bootstrapping: a student learns a frozen teacher's final representation.

Bootstrapping SparseFormers from Vision Foundation Models (arXiv 2312.01987): images
alone, no labels and no texts. The last blocks of the student start as those of its
teacher, and may stay so. How far apart the two vectors of an image are is one of
`losses.alignment.LOSSES`.

Shapes: B rows, L tokens a row, N image slots a row, D width, C outputs of the head.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.core import FrozenDict
from jaxtyping import Array, Float

from navit_jax import config
from navit_jax.batch import PackedBatch
from navit_jax.errors import ConfigError
from navit_jax.losses.alignment import LOSSES, cosine
from navit_jax.metrics import Mean, fold, hits, masked
from navit_jax.models import MODELS, patch_size
from navit_jax.models.choices import pick
from navit_jax.models.pair import REPRESENTATIONS, Pair, Vectors
from navit_jax.models.text import TextTower
from navit_jax.models.two_towers import TwoTowers, normalise
from navit_jax.tasks.randomness import image_keys

Params = Mapping[str, Any]
# What no step changes: the teacher, and the head of its that both share.
FROZEN = ("teacher/.*", "head/.*")
# Nor does one change the teacher's tower of texts.
FROZEN_TEXTS = ("text/.*", "text_head/.*", "log_scale")
# Where CLIP's scale ends, of weights that do not say.
LOG_SCALE = math.log(100)


@dataclasses.dataclass(frozen=True)
class Bootstrapping:
    """The mean, over the valid images of the global batch, of what keeps two apart.

    Attributes:
      encoder: The student.
      teacher: A section like `model`; the patch of its size is that of the student,
        unless `teacher_side` is given. Its parameters are the subtree `teacher`.
      teacher_side: Images are resized to squares of it for the teacher, in pixels; 0
        packs them for the teacher as for the student.
      representation: Of the student, one of `REPRESENTATIONS`.
      target: Of the teacher; "" is the same.
      head_width: Outputs of the teacher's head, classes or a projection, which the
        student shares; 0: there is none.
      align: "representation", before the head, or "head", after it.
      loss_name: One of `losses.alignment.LOSSES`.
      text: Arguments of `text.TextTower`, of the teacher's texts, by which `zero_shot`
        judges a student that is aligned after the projection; None: there are none. Its
        parameters are `text`, `text_head` and `log_scale`. Training reads no text.
      vocab_size, text_length: As in `contrastive.Contrastive`.
      inherit: Rules (path of the student, path of the teacher), as of
        `initialise.load_params`, of what the student takes over from the teacher when a
        run begins: ("tail/(.*)", r"blocks/\\1[4:]") takes all blocks but the first 4.
    """

    encoder: nn.Module
    teacher: Mapping[str, Any]
    teacher_side: int = 0
    representation: str = "pooled"
    target: str = ""
    head_width: int = 0
    align: str = "representation"
    loss_name: str = "cosine"
    inherit: Sequence[Any] = ()
    text: Mapping[str, Any] | None = None
    vocab_size: int = 0
    text_length: int = 0

    def __post_init__(self):
        object.__setattr__(self, "teacher", FrozenDict(self.teacher))
        pick("task.loss_name", self.loss_name, LOSSES)
        for field in ("representation", "target"):
            name = getattr(self, field) or self.representation
            pick(f"task.{field}", name, REPRESENTATIONS)
        if self.align not in ("representation", "head"):
            raise ConfigError(
                f"config.task.align={self.align!r}: use 'representation' or 'head'"
            )
        if not self.head_width and (self.align == "head" or self.loss_name == "kl"):
            raise ConfigError(
                f"config.task.align={self.align!r}, loss_name={self.loss_name!r} need "
                "the teacher's head: give config.task.head_width"
            )
        if self.loss_name == "kl" and self.align != "head":
            raise ConfigError(
                "config.task.loss_name='kl' compares logits: use align='head'"
            )
        if self.text is not None and self.align != "head":
            raise ConfigError(
                "config.task.text: texts are compared with what is after the teacher's "
                "projection: use align='head'"
            )
        side, patch = self.teacher_side, patch_size(self.teacher["size"])
        if side < 0 or side % patch:
            raise ConfigError(
                f"config.task.teacher_side={side}: give a multiple of the teacher's "
                f"patch, {patch}, or 0 for the grids of the student"
            )
        if side and self.encoder.max_side is None:
            raise ConfigError(
                "config.task.teacher_side needs the longest side of a grid: give "
                "config.model.positions a length"
            )
        if not side and hasattr(self.encoder, "size"):
            own = patch_size(self.encoder.size)
            if own != patch:
                raise ConfigError(
                    f"config.task.teacher.size has patches of {patch}, the student of "
                    f"{own}: they read one batch, unless task.teacher_side is given"
                )

    @property
    def teacher_model(self) -> nn.Module:
        """The teacher as a module."""
        return config.build(self.teacher, MODELS, "task.teacher")

    @property
    def model(self) -> Pair:
        """The module whose parameters the run has."""
        return Pair(
            self.encoder,
            self.teacher_model,
            patch_size(self.teacher["size"]),
            self.teacher_side,
            self.representation,
            self.target or self.representation,
            self.head_width,
            self.align,
        )

    @property
    def frozen(self) -> tuple[str, ...]:
        """Patterns of the parameters that no config trains."""
        texts = FROZEN_TEXTS if self.text is not None else ()
        return (FROZEN if self.head_width else FROZEN[:1]) + texts

    def init(self, key: jax.Array, batch: PackedBatch) -> Params:
        """Fresh parameters, as a nested dict; see `inherit`."""
        params = self.model.init(key, batch)["params"]
        if self.text is None:
            return params
        one = jnp.ones((1, 1), jnp.int32)
        row = one, one[..., None], one, 1
        return {**params, **self.texts.init(key, *row, method="embed_text")["params"]}

    def weights(self, batch: PackedBatch) -> dict[str, jax.Array]:
        """The number of images."""
        return {"images": batch.image_mask.sum(dtype=jnp.float32)}

    def loss(
        self,
        params: Params,
        batch: PackedBatch,
        key: jax.Array,
        weights: Mapping[str, jax.Array],
    ) -> tuple[jax.Array, dict[str, Mean]]:
        """Sum of the images' losses over the given number of images."""
        out = self._apply(params, batch, image_keys(key, batch.image_ids))
        means = {k: fold(v) for k, v in self._means(out, batch).items()}
        return means["loss"].total / jnp.maximum(weights["images"], 1), means

    def outputs(self, params: Params, batch: PackedBatch) -> dict[str, jax.Array]:
        """What the student gives with nothing drawn; no teacher is run.

        With a head also `logits` [B N C], with texts `image` [B N C], of length 1.
        """
        out = self._apply(params, batch, method="student")
        return (
            {**out, "image": normalise(out["student"])}
            if self.text is not None
            else out
        )

    @property
    def width(self) -> int:
        """Of what is compared with texts."""
        return self.head_width

    @property
    def texts(self) -> TwoTowers:
        """The tower of texts and its projection as a module."""
        given = {"vocab_size": self.vocab_size, "length": self.text_length}
        tower = config.call(TextTower, self.text or {}, "task.text", **given)
        return TwoTowers(self.encoder, tower, self.width, {"log_scale": LOG_SCALE})

    @property
    def embed_text(self) -> Callable[..., Vectors]:
        """As `contrastive.Contrastive.embed_text`; a task without texts has none."""
        if self.text is None:
            raise AttributeError("embed_text")

        def embed(params: Params, *row: Any, num_slots: int) -> Vectors:
            read: Any = self.texts.apply
            return read({"params": params}, *row, num_slots, method="embed_text")

        return embed

    def probabilities(
        self, params: Params, cosines: Float[Array, "M C"]
    ) -> Float[Array, "M C"]:
        """Softmax over these texts at the teacher's own temperature."""
        return jax.nn.softmax(jnp.exp(params["log_scale"]) * cosines)

    def metrics(self, params: Params, batch: PackedBatch) -> dict[str, Mean]:
        """Terms [B N] by image: the loss and the cosine of the two vectors.

        And, of images with labels, the accuracy of the student under the teacher's
        head, unless that is what is aligned, as a projection is.
        """
        return self._means(self._apply(params, batch), batch)

    def vectors(self, params: Params, batch: PackedBatch) -> dict[str, Vectors]:
        """`student` and `teacher` [B N D], what is aligned."""
        out = self._apply(params, batch)
        return {name: out[name] for name in ("student", "teacher")}

    def vectors_of_teacher(self, params: Params, batch: PackedBatch) -> Vectors:
        """What is aligned of the teacher alone."""
        return self._apply(params, batch, method="teach")

    def about(self) -> dict[str, Any]:
        """What the vectors of the teacher depend on, its parameters aside."""
        return {
            "teacher": FrozenDict(self.teacher).unfreeze(),
            "teacher_side": self.teacher_side,
            "target": self.target or self.representation,
            "align": self.align,
        }

    def _means(self, out: Mapping[str, Any], batch: PackedBatch) -> dict[str, Mean]:
        student, teacher = out["student"], out["teacher"]
        if student.shape != teacher.shape:
            raise ConfigError(
                f"the student's vectors have width {student.shape[-1]}, the teacher's "
                f"{teacher.shape[-1]}: choose config.model and config.task.teacher of "
                "one width, or representations that are alike"
            )
        # An empty slot has vectors of 0, and its gradient must be one of 0 as well.
        there = batch.image_mask[..., None]
        student, teacher = (jnp.where(there, v, 1.0) for v in (student, teacher))
        values = {
            "loss": LOSSES[self.loss_name](student, teacher),
            "cosine": 1 - cosine(student, teacher),
        }
        terms = {name: masked(v, batch.image_mask) for name, v in values.items()}
        labels = batch.targets.get("labels", jnp.zeros((0, 0, 0)))
        if self.head_width and self.align != "head" and labels.shape[-1]:
            there = batch.image_mask & (labels >= 0).any(-1)
            terms["accuracy"] = masked(hits(out["logits"], labels), there)
        return terms

    def _apply(self, params: Params, batch: PackedBatch, *args: Any, **how: Any) -> Any:
        return self.model.apply({"params": params}, batch, *args, **how)


def longest_side(task: Mapping[str, Any], own: int | None) -> int | None:
    """The most patches a side that a task's models read; None: any.

    Args:
      task: The section; a teacher in it reads the grids of the student, or squares.
      own: Of the encoder.
    """
    if not (teacher := task.get("teacher")) or task.get("teacher_side"):
        return own
    sides = own, config.build(teacher, MODELS, "task.teacher").max_side
    return min((side for side in sides if side is not None), default=None)
