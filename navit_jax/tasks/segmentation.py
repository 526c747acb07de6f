"""Semantic segmentation of packed images: a class for each part of each patch.

A patch is cut into K = cells^2 parts that are guessed each by itself, from the vector
of its token, or with latent tokens from what `models.readout` makes of them. Loss and
metrics are of pixels all the same, by how many of each class a part has.

Shapes: B rows, L tokens a row, N image slots a row, K parts of a patch, C classes, S
pixels of a patch.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8

from navit_jax.batch import PackedBatch
from navit_jax.data.pixel_classes import UNKNOWN
from navit_jax.errors import ConfigError
from navit_jax.metrics import Mean, fold
from navit_jax.models.choices import pick
from navit_jax.models.heads import Linear
from navit_jax.models.layers import layer_norm
from navit_jax.models.pooling import image_masks
from navit_jax.models.readout import READOUTS, Readout
from navit_jax.tasks.randomness import image_keys

Params = Mapping[str, Any]


class Segmenter(nn.Module):
    """An encoder, a readout if its tokens are latent, and a small decoder.

    The attributes are those of `Segmentation`; `num_outputs` is C.
    """

    encoder: nn.Module
    num_outputs: int
    cells: int
    hidden: int
    readout: str

    @nn.compact
    def __call__(self, batch: PackedBatch, keys: Any = None) -> dict[str, Any]:
        """The outputs of the encoder, and `logits` [B L K C]."""
        row = batch.coords, batch.segment_ids, batch.grids
        encoder: Any = self.encoder
        out = encoder(batch.patches, *row, keys)
        x = out["tokens"]
        if "latent_ids" in out:
            padding = encoder.full_shape.padding
            x = Readout(self.readout, padding, name="readout")(out, *row)
        if self.hidden:
            x = layer_norm(x, True, x.dtype, "norm", 1e-6)
            x = nn.gelu(nn.Dense(self.hidden, dtype=x.dtype, name="hidden")(x))
        C, K = self.num_outputs, self.cells**2
        logits = Linear(K * C, name="head")(x)
        return {**out, "logits": logits.reshape(*x.shape[:2], K, C)}


@dataclasses.dataclass(frozen=True)
class Segmentation:
    """Softmax cross-entropy, the mean over the known pixels of the global batch.

    The batch has the targets `pixel_classes`: config.data.pixel_classes=True.

    Attributes:
      encoder: The packed encoder.
      num_classes: Of the sources.
      background: Whether what is of no class is one, the first; or not known.
      cells: Parts of a patch a side; divides its pixels.
      hidden: Width of the decoder's layer before the last; 0: the head is linear.
      readout: Of latent tokens, as in `readout.Readout`.
    """

    encoder: nn.Module
    num_classes: int
    background: bool = True
    cells: int = 4
    hidden: int = 0
    readout: str = "points"

    def __post_init__(self):
        if self.cells < 1 or self.hidden < 0:
            raise ConfigError(
                f"config.task.cells={self.cells}, hidden={self.hidden}: give at least "
                "1 and 0"
            )
        if self.num_classes >= UNKNOWN:
            raise ConfigError(
                f"config.task.name='segmentation' of {self.num_classes} classes: a "
                f"pixel of 8 bits tells {UNKNOWN - 1} apart"
            )
        pick("task.readout", self.readout, dict.fromkeys(READOUTS))

    @property
    def num_outputs(self) -> int:
        """C: the classes, and the background if it is one."""
        return self.num_classes + self.background

    @property
    def model(self) -> Segmenter:
        """The module whose parameters are trained."""
        encoder: Any = self.encoder
        if hasattr(encoder, "capture"):
            encoder = encoder.clone(capture=True)
        return Segmenter(
            encoder, self.num_outputs, self.cells, self.hidden, self.readout
        )

    def init(self, key: jax.Array, batch: PackedBatch) -> Params:
        """Fresh parameters, as a nested dict."""
        return self.model.init(key, batch)["params"]

    def weights(self, batch: PackedBatch) -> dict[str, jax.Array]:
        """The number of known pixels."""
        return {"pixels": self._count(batch).sum()}

    def loss(
        self,
        params: Params,
        batch: PackedBatch,
        key: jax.Array,
        weights: Mapping[str, jax.Array],
    ) -> tuple[jax.Array, dict[str, Mean]]:
        """Sum of the pixels' losses over the given number of pixels."""
        logits = self._apply(params, batch, image_keys(key, batch.image_ids))["logits"]
        means = {k: fold(v) for k, v in self._means(logits, batch).items()}
        return means["loss"].total / jnp.maximum(weights["pixels"], 1), means

    def outputs(self, params: Params, batch: PackedBatch) -> dict[str, jax.Array]:
        """What the model gives with nothing drawn.

        Of the encoder; `logits` [B L K C]; and `classes` [B L K] int32, numbered as
        `pixel_classes` are. Parts of a patch are in the order of rows, then columns.
        """
        out = self._apply(params, batch)
        if not getattr(self.encoder, "capture", False):
            told = ("rois", "points", "looks")
            out = {k: v for k, v in out.items() if k not in told}
        guess = out["logits"].argmax(-1).astype(jnp.int32) + (not self.background)
        return {**out, "classes": guess}

    def metrics(self, params: Params, batch: PackedBatch) -> dict[str, Mean]:
        """Terms [B L] by patch, of its known pixels: the loss and the accuracy."""
        return self._means(self._apply(params, batch)["logits"], batch)

    def confusion(self, params: Params, batch: PackedBatch) -> dict[str, jax.Array]:
        """Numbers of pixels by image and class, int32 [B N C], of known pixels.

        `hit`: those of the class that are said to be; `said`: all that are said to be;
        `true`: all of the class.
        """
        counts, logits = self._count(batch), self._apply(params, batch)["logits"]
        guess = jax.nn.one_hot(logits.argmax(-1), self.num_outputs, dtype=jnp.float32)
        parts = {
            "hit": counts * guess,
            "said": counts.sum(-1, keepdims=True) * guess,
            "true": counts,
        }
        masks = image_masks(batch.segment_ids, batch.image_mask.shape[1])

        def add(values: Array) -> Array:
            # Whole numbers below 2^24, which float32 has exactly.
            total = jnp.einsum(
                "BNL,BLKC->BNC", masks.astype(jnp.float32), values, precision="highest"
            )
            return jnp.round(total).astype(jnp.int32)

        return {name: add(values) for name, values in parts.items()}

    def _count(self, batch: PackedBatch) -> Float[Array, "B L K C"]:
        """Pixels of each class in each part."""
        classes = batch.targets.get("pixel_classes")
        if classes is None:
            raise ConfigError(
                "config.task.name='segmentation' needs the classes of pixels: give "
                "config.data.pixel_classes=True"
            )
        return count_pixels(classes, self.cells, self.num_outputs, self.background)

    def _means(self, logits: jax.Array, batch: PackedBatch) -> dict[str, Mean]:
        counts = self._count(batch)
        known = counts.sum((-1, -2))
        losses = -(counts * jax.nn.log_softmax(logits)).sum((-1, -2))
        guess = jax.nn.one_hot(logits.argmax(-1), self.num_outputs)
        right = (counts * guess).sum((-1, -2))
        return {
            "loss": Mean(total=losses, weight=known),
            "pixel_accuracy": Mean(total=right, weight=known),
        }

    def _apply(self, params: Params, batch: PackedBatch, keys: Any = None) -> Any:
        return self.model.apply({"params": params}, batch, keys)


def count_pixels(
    classes: UInt8[Array, "B L S"], cells: int, num_outputs: int, background: bool
) -> Float[Array, "B L K C"]:
    """Numbers of pixels of each class in each part of each patch.

    Args:
      classes: As `data.pixel_classes` has them: unknown ones count nowhere.
      cells: Parts of a patch a side.
      num_outputs: C.
      background: Whether class 0 is one of them.

    Raises:
      ConfigError: the parts do not divide the patch.
    """
    B, L, S = classes.shape
    side = round(S**0.5)
    if side % cells:
        raise ConfigError(
            f"config.task.cells={cells} does not divide the side of a patch, {side}"
        )
    part = side // cells
    split = classes.reshape(B, L, cells, part, cells, part)
    split = split.swapaxes(3, 4).reshape(B, L, cells**2, 1, part**2)
    numbers = jnp.arange(num_outputs, dtype=jnp.uint8) + jnp.uint8(not background)
    return (split == numbers[:, None]).sum(-1, dtype=jnp.float32)
