"""A student and its teacher side by side, and the vectors of each by name.

Shapes: B rows, N image slots a row, D width.
"""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from navit_jax.batch import PackedBatch
from navit_jax.errors import ConfigError
from navit_jax.models.heads import Linear
from navit_jax.models.pooling import image_masks, mean_pool
from navit_jax.models.resized import resize

Vectors = Float[Array, "B N D"]


class Pair(nn.Module):
    """A student and its teacher, each with the head of the teacher if it has one.

    The attributes are those of `tasks.Bootstrapping`.
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
