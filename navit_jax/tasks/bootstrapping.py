"""Bootstrapping: a student learns a frozen teacher's final representation.

Bootstrapping SparseFormers from Vision Foundation Models (arXiv 2312.01987): images
alone, no labels and no texts. The last blocks of the student start as those of its
teacher, and may stay so. How far apart the two vectors of an image are is one of
`losses.alignment.LOSSES`.

Shapes: B rows, L tokens a row, N image slots a row, D width, C outputs of the head.
"""

import dataclasses
from collections.abc import Mapping, Sequence
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
from navit_jax.models.heads import Linear
from navit_jax.models.pooling import image_masks, mean_pool
from navit_jax.models.resized import resize
from navit_jax.tasks.randomness import image_keys

Params = Mapping[str, Any]
Vectors = Float[Array, "B N D"]
# What no step changes: the teacher, and the head of its that both share.
FROZEN = ("teacher/.*", "head/.*")


class Pair(nn.Module):
    """A student and its teacher, each with the head of the teacher if it has one.

    The attributes are those of `Bootstrapping`.
    """

    encoder: nn.Module
    teacher: nn.Module
    teacher_patch: int
    teacher_side: int
    representation: str
    target: str
    head_width: int
    align: str

    def setup(self):
        """Names the parts as the parameters have them."""
        if self.head_width:
            self.head = Linear(self.head_width)

    def __call__(self, batch: PackedBatch, keys: Any = None) -> dict[str, Any]:
        """`student` and `teacher` [B N D]: what is aligned; and the student's outputs.

        The teacher does not run if the batch brings its vectors.
        """
        student = self.student(batch, keys)
        return {**student, "teacher": self.teach(batch)}

    def student(self, batch: PackedBatch, keys: Any = None) -> dict[str, Any]:
        """The student's own outputs, and what is aligned as `student` [B N D]."""
        out = self.encoder(
            batch.patches, batch.coords, batch.segment_ids, batch.grids, keys
        )
        N = batch.grids.shape[1]
        found = represent(out, self.representation, batch.segment_ids, N)
        if self.head_width:
            out["logits"] = self.head(found)
        aligned = out["logits"] if self.align == "head" else found
        return {**out, "student": aligned.astype(jnp.float32)}

    def teach(self, batch: PackedBatch) -> Vectors:
        """What is aligned of the teacher, and leads no gradient anywhere."""
        cached = batch.targets.get("teacher")
        if cached is not None and not self.is_initializing():
            return cached
        B, N = batch.grids.shape[:2]
        arrays = batch.patches, batch.coords, batch.segment_ids, batch.grids
        if self.teacher_side:
            longest = self.encoder.max_side
            sides = self.teacher_side, self.teacher_patch, longest
            arrays = resize(*arrays, *sides)
        out = self.teacher(*arrays)
        found = represent(out, self.target, arrays[2], arrays[3].shape[1])
        found = found.reshape(B, N, -1)
        aligned = self.head(found) if self.align == "head" else found
        return jax.lax.stop_gradient(aligned.astype(jnp.float32))


def represent(
    out: Mapping[str, Any], name: str, segment_ids: jax.Array, num_slots: int
) -> Vectors:
    """The vector of each image by name, one of `REPRESENTATIONS`, from the outputs.

    Args:
      segment_ids: Of the tokens, unless they are latent ones and bring their own.
    """
    missing = [key for key in REPRESENTATIONS[name] if key != "mean" and key not in out]
    if missing:
        raise ConfigError(
            f"config.task: the representation {name!r} needs the output "
            f"{missing[0]!r}, and the model gives {', '.join(sorted(out))}: choose "
            "another pooling, or another representation"
        )
    segment_ids = out.get("latent_ids", segment_ids)
    parts = {
        "mean": lambda: mean_pool(out["tokens"], image_masks(segment_ids, num_slots))
    }
    vectors = [
        parts[key]() if key in parts else out[key] for key in REPRESENTATIONS[name]
    ]
    return jnp.concatenate(vectors, -1)


# Which outputs make a representation; "mean" is that of an image's tokens.
REPRESENTATIONS = {
    "pooled": ("pooled",),
    "class": ("class",),
    "mean": ("mean",),
    "both": ("pooled", "mean"),
}


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
        return FROZEN if self.head_width else FROZEN[:1]

    def init(self, key: jax.Array, batch: PackedBatch) -> Params:
        """Fresh parameters, as a nested dict; see `inherit`."""
        return self.model.init(key, batch)["params"]

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

        With a head also `logits` [B N C].
        """
        return self._apply(params, batch, method="student")

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
