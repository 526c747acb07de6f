"""Classification of packed images: one pooled vector an image, one or more labels.

Shapes: B rows, L tokens a row, N image slots a row, C classes, K labels an image.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from navit_jax.batch import PackedBatch
from navit_jax.errors import ConfigError
from navit_jax.losses import classification as losses
from navit_jax.metrics import Mean, fold, hits, masked
from navit_jax.models import mixing
from navit_jax.models.heads import Linear
from navit_jax.tasks.randomness import image_keys

Params = Mapping[str, Any]


class Classifier(nn.Module):
    """An encoder and a linear head on its pooled vectors.

    Attributes:
      encoder: Gives `pooled` [B N D].
      num_classes: C.
      head_bias: Initial value of the head's bias.
    """

    encoder: nn.Module
    num_classes: int
    head_bias: float | int

    @nn.compact
    def __call__(self, batch: PackedBatch, keys: Any = None) -> dict[str, Any]:
        """Returns `tokens` [B L D], `pooled` [B N D] and `logits` [B N C]."""
        out = self.encoder(
            batch.patches, batch.coords, batch.segment_ids, batch.grids, keys
        )
        head = Linear(self.num_classes, bias_init=self.head_bias, name="head")
        return {**out, "logits": head(out["pooled"])}


@dataclasses.dataclass(frozen=True)
class Classification:
    """Sigmoid or softmax cross-entropy over the valid images of the global batch.

    An image without any label (all -1) counts in no loss and no metric.

    Attributes:
      encoder: The packed encoder.
      num_classes: C.
      loss_name: "sigmoid" (multi-label; summed over classes, mean over images) or
        "softmax".
      label_smoothing: Of the softmax.
      head_bias: Initial bias of the head; None is -log(C - 1) for the sigmoid, so that
        training starts at the rate of one label in C, and 0 for the softmax. The JFT
        recipe of the ViT it follows has -10.
      mixup, cutmix: As in `mixing.mix`, in training; 0 mixes nothing.
      erase: Rate of `mixing.erase`, in training.
    """

    encoder: nn.Module
    num_classes: int
    loss_name: str = "sigmoid"
    label_smoothing: float | int = 0.0
    head_bias: float | int | None = None
    mixup: float | int = 0.0
    cutmix: float | int = 0.0
    erase: float | int = 0.0

    def __post_init__(self):
        if self.loss_name not in ("sigmoid", "softmax"):
            raise ConfigError(
                f"config.task.loss_name={self.loss_name!r}: use 'sigmoid' or 'softmax'"
            )
        if self.label_smoothing and self.loss_name == "sigmoid":
            raise ConfigError("config.task.label_smoothing is for loss_name='softmax'")
        if min(self.mixup, self.cutmix) < 0 or not 0 <= self.erase <= 1:
            raise ConfigError(
                f"config.task.mixup={self.mixup}, cutmix={self.cutmix}, erase="
                f"{self.erase}: give 0 or more, and erase a rate up to 1"
            )

    @property
    def model(self) -> Classifier:
        """The module whose parameters are trained."""
        bias = self.head_bias
        if bias is None:
            prior = -math.log(max(self.num_classes - 1, 1))
            bias = prior if self.loss_name == "sigmoid" else 0.0
        return Classifier(self.encoder, self.num_classes, bias)

    def init(self, key: jax.Array, batch: PackedBatch) -> Params:
        """Fresh parameters, as a nested dict."""
        return self.model.init(key, batch)["params"]

    def weights(self, batch: PackedBatch) -> dict[str, jax.Array]:
        """The number of labelled images."""
        return {"images": labelled(batch).sum(dtype=jnp.float32)}

    def loss(
        self,
        params: Params,
        batch: PackedBatch,
        key: jax.Array,
        weights: Mapping[str, jax.Array],
    ) -> tuple[jax.Array, dict[str, Mean]]:
        """Sum of the images' losses over the given number of images.

        Of a mixed image each label counts by its share; the accuracy is by its own.
        """
        keys = image_keys(key, batch.image_ids)
        shown, labels = batch.patches, batch.targets["labels"]
        row = batch.coords, batch.segment_ids, batch.grids, keys
        if self.erase:
            shown = mixing.erase(shown, *row, self.erase)
        partners, shares = None, jnp.float32(1)
        if self.mixup or self.cutmix:
            shown, partners, shares = mixing.mix(shown, *row, self.mixup, self.cutmix)
        batch = dataclasses.replace(batch, patches=shown)
        logits = self._apply(params, batch, keys)["logits"]
        terms = self._means(logits, batch)
        if partners is not None:
            theirs = jnp.take_along_axis(labels, partners[..., None], axis=1)
            own, other = (self._losses(logits, y) for y in (labels, theirs))
            values = shares * own + (1 - shares) * other
            terms["loss"] = masked(values, labelled(batch))
        means = {k: fold(v) for k, v in terms.items()}
        return means["loss"].total / jnp.maximum(weights["images"], 1), means

    def outputs(self, params: Params, batch: PackedBatch) -> dict[str, jax.Array]:
        """What the model gives with nothing dropped, nothing random.

        `tokens` [B L D], `pooled` [B N D], `logits` and `probabilities` [B N C].
        """
        out = self._apply(params, batch)
        sigmoid = self.loss_name == "sigmoid"
        normalise = jax.nn.sigmoid if sigmoid else jax.nn.softmax
        return {**out, "probabilities": normalise(out["logits"].astype(jnp.float32))}

    def metrics(self, params: Params, batch: PackedBatch) -> dict[str, Mean]:
        """Terms [B N] by image: loss, accuracy, confidence, Brier score and NLL.

        Confidence is the probability of the class that is guessed. The Brier score is
        the squared error of all probabilities (Brier 1950); where the loss is smoothed
        the negative log-likelihood is not.
        """
        out, labels = self.outputs(params, batch), batch.targets["labels"]
        logits, probabilities = out["logits"], out["probabilities"]
        targets = losses.multi_hot(labels, self.num_classes)
        nll = losses.sigmoid_loss
        if self.loss_name == "softmax":
            targets /= jnp.maximum(targets.sum(-1, keepdims=True), 1)
            nll = losses.softmax_loss
        extra = {
            "confidence": probabilities.max(-1),
            "brier": jnp.square(probabilities - targets).sum(-1),
            "nll": nll(logits.astype(jnp.float32), labels),
        }
        mask = labelled(batch)
        return self._means(logits, batch) | {
            k: masked(v, mask) for k, v in extra.items()
        }

    def _means(self, logits: jax.Array, batch: PackedBatch) -> dict[str, Mean]:
        mask, right = labelled(batch), hits(logits, batch.targets["labels"])
        losses_ = masked(self._losses(logits, batch.targets["labels"]), mask)
        return {"loss": losses_, "accuracy": masked(right, mask)}

    def _apply(self, params: Params, batch: PackedBatch, keys: Any = None) -> Any:
        return self.model.apply({"params": params}, batch, keys)

    def _losses(self, logits: jax.Array, labels: jax.Array) -> jax.Array:
        logits = logits.astype(jnp.float32)
        if self.loss_name == "sigmoid":
            return losses.sigmoid_loss(logits, labels)
        return losses.softmax_loss(logits, labels, self.label_smoothing)


def labelled(batch: PackedBatch) -> jax.Array:
    """[B N], the slots that hold an image with at least one label."""
    return batch.image_mask & (batch.targets["labels"] >= 0).any(-1)
