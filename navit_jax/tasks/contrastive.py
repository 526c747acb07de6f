"""Contrastive learning of images and texts: two packed towers, one loss over all pairs.

A slot is a pair if it holds an image and tokens of a text are numbered by it. Of the
batch it reads `text_tokens` [B T], `text_coords` [B T 1] and `text_segment_ids` [B T]
among the targets; ids are those of the image slots.

Shapes: B rows, L image tokens and T text tokens a row, N slots a row, D width of a
tower, E width shared by both.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from navit_jax import config
from navit_jax.batch import PackedBatch
from navit_jax.errors import ConfigError
from navit_jax.losses import contrastive as losses
from navit_jax.metrics import Mean, fold, masked
from navit_jax.models.device_rows import free_axes, row_axes
from navit_jax.models.pooling import tokens_of_slots
from navit_jax.models.text import TextTower
from navit_jax.models.two_towers import TwoTowers, texts
from navit_jax.tasks.randomness import image_keys

Params = Mapping[str, Any]
Embeddings = dict[str, Float[Array, "B N E"]]
# Where temperature and bias start, and the largest scale: CLIP's and SigLIP's.
SOFTMAX = {"scale": 1 / 0.07, "max_scale": 100.0, "bias": 0.0}
SIGMOID = {"scale": 10.0, "max_scale": math.inf, "bias": -10.0}


@dataclasses.dataclass(frozen=True)
class Contrastive:
    """Softmax or sigmoid loss over the image-text pairs of the global batch.

    Neither temperature nor the shared width is given in the paper. The temperature is
    learned, as its logarithm; where none is said it starts and ends as in CLIP (1 /
    0.07, at most 100) and in SigLIP (10, no end, with a bias that starts at -10). Past
    the largest scale it counts as that, and only a gradient that leads back changes it.

    Attributes:
      encoder: The packed encoder of images.
      vocab_size: Ids of the tokenizer.
      text_length: The most tokens of a text.
      text: Arguments of `text.TextTower`.
      loss_name: "softmax" (each text against all images and each image against all
        texts) or "sigmoid" (each combination a question of its own).
      width: E.
      scale: The inverse temperature at the start.
      max_scale: Its largest value.
      bias: What is added to the sigmoid's logits at the start.
      chunk, dtype, grad_dtype: As in `losses.contrastive.softmax_loss`.
    """

    encoder: nn.Module
    vocab_size: int
    text_length: int
    text: Mapping[str, Any]
    loss_name: str = "softmax"
    width: int = 512
    scale: float | int | None = None
    max_scale: float | int | None = None
    bias: float | int | None = None
    chunk: int = 256
    dtype: str = "float32"
    grad_dtype: str = "float32"

    def __post_init__(self):
        if self.loss_name not in ("softmax", "sigmoid"):
            raise ConfigError(
                f"config.task.loss_name={self.loss_name!r}: use 'softmax' or 'sigmoid'"
            )
        if self.bias is not None and self.loss_name == "softmax":
            raise ConfigError("config.task.bias is for loss_name='sigmoid'")
        for name in ("width", "chunk", "scale", "max_scale"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ConfigError(f"config.task.{name}={value}: give more than 0")
        for name in ("dtype", "grad_dtype"):
            if getattr(self, name) not in ("float32", "bfloat16"):
                raise ConfigError(
                    f"config.task.{name}={getattr(self, name)!r}: use 'float32' or "
                    "'bfloat16'"
                )

    def _start(self, name: str) -> float | int:
        defaults = SOFTMAX if self.loss_name == "softmax" else SIGMOID
        value = getattr(self, name)
        return defaults[name] if value is None else value

    @property
    def model(self) -> TwoTowers:
        """The module whose parameters are trained."""
        tower = config.call(
            TextTower,
            self.text,
            "task.text",
            vocab_size=self.vocab_size,
            length=self.text_length,
        )
        numbers = {"log_scale": math.log(self._start("scale"))}
        if self.loss_name == "sigmoid":
            numbers["bias"] = self._start("bias")
        return TwoTowers(self.encoder, tower, self.width, numbers)

    def init(self, key: jax.Array, batch: PackedBatch) -> Params:
        """Fresh parameters, as a nested dict."""
        return self.model.init(key, batch)["params"]

    def weights(self, batch: PackedBatch) -> dict[str, jax.Array]:
        """The number of pairs."""
        return {"pairs": pairs(batch).sum(dtype=jnp.float32)}

    def loss(
        self,
        params: Params,
        batch: PackedBatch,
        key: jax.Array,
        weights: Mapping[str, jax.Array],
    ) -> tuple[jax.Array, dict[str, Mean]]:
        """The mean over the pairs of this batch, which must be the whole one.

        It is no sum of losses of parts, so `weights` has no say; see `couple`.
        """
        del weights
        return self.couple(params, self.embed(params, batch, key), batch)

    def embed(
        self, params: Params, batch: PackedBatch, key: jax.Array | None = None
    ) -> Embeddings:
        """`image` and `text` [B N E], float32 of length 1; 0 in slots without.

        Args:
          key: Of the step, for drop path and dropout; None drops nothing.
        """
        image_draws = text_draws = None
        if key is not None:
            image_draws = image_keys(key, batch.image_ids)
            text_draws = image_keys(jax.random.fold_in(key, 1), batch.image_ids)
        image = self._apply(params, "embed_image", batch, image_draws)["image"]
        N = batch.image_mask.shape[1]
        text = self._apply(params, "embed_text", *texts(batch), N, text_draws)
        return {"image": image, "text": text}

    def couple(
        self, params: Params, embeddings: Embeddings, batch: PackedBatch
    ) -> tuple[jax.Array, dict[str, Mean]]:
        """The loss of the embeddings of a whole batch, over all its pairs."""
        mask, numbers = pairs(batch), self._numbers(params)
        image, text = embeddings["image"], embeddings["text"]
        loss = self._over_devices(image, text, mask, *numbers)
        count = mask.sum(dtype=jnp.float32)
        means = {
            "loss": Mean(total=loss * count, weight=count),
            "similarity": fold(masked((image * text).sum(-1), mask)),
            "scale": Mean(total=numbers[0] * count, weight=count),
        }
        return loss, jax.lax.stop_gradient(means)

    def _over_devices(
        self,
        image: Float[Array, "B N E"],
        text: Float[Array, "B N E"],
        mask: Bool[Array, "B N"],
        *numbers: Float[Array, ""],
    ) -> Float[Array, ""]:
        """The loss, each device with its rows; of all rows at once without a mesh."""
        axes = row_axes(len(mask))
        loss = functools.partial(
            losses.softmax_loss if self.loss_name == "softmax" else losses.sigmoid_loss,
            axis_name=axes,
            chunk=self.chunk,
            dtype=self.dtype,
            grad_dtype=self.grad_dtype,
        )

        def flat(image: Array, text: Array, mask: Array, *numbers: Array) -> Array:
            E = image.shape[-1]
            return loss(
                image.reshape(-1, E), text.reshape(-1, E), mask.reshape(-1), *numbers
            )

        if axes:
            specs = (P(axes),) * 3 + (P(),) * len(numbers)
            ours = set(free_axes())
            flat = jax.shard_map(flat, in_specs=specs, out_specs=P(), axis_names=ours)
        return flat(image, text, mask, *numbers)

    def _numbers(self, params: Params) -> list[Float[Array, ""]]:
        """The inverse temperature, and the sigmoid's bias."""
        most = math.log(self._start("max_scale"))
        numbers = [jnp.exp(losses.clamp(params["log_scale"], most))]
        return [*numbers, params["bias"]] if self.loss_name == "sigmoid" else numbers

    def embed_text(
        self,
        params: Params,
        tokens: Int[Array, "B T"],
        coords: Int[Array, "B T 1"],
        segment_ids: Int[Array, "B T"],
        num_slots: int,
    ) -> Float[Array, "B N E"]:
        """Texts without images, several to a row: float32 of length 1, 0 without one.

        Args:
          num_slots: N.
        """
        return self._apply(params, "embed_text", tokens, coords, segment_ids, num_slots)

    def probabilities(
        self, params: Params, cosines: Float[Array, "M C"]
    ) -> Float[Array, "M C"]:
        """Whether a text belongs to an image, from the cosines of images and texts.

        Of a softmax among these texts, of the sigmoid each by itself.
        """
        scale, *bias = self._numbers(params)
        logits = scale * cosines + sum(bias)
        sigmoid = self.loss_name == "sigmoid"
        return jax.nn.sigmoid(logits) if sigmoid else jax.nn.softmax(logits)

    def outputs(self, params: Params, batch: PackedBatch) -> dict[str, jax.Array]:
        """What the towers give with nothing dropped.

        Of images `tokens` [B L D], `pooled` [B N D] and `image` [B N E], of length 1;
        `text` [B N E] if the batch has texts.
        """
        out = self._apply(params, "embed_image", batch)
        if "text_tokens" not in batch.targets:
            return out
        N = batch.image_mask.shape[1]
        return {**out, "text": self.embed_text(params, *texts(batch), N)}

    def metrics(self, params: Params, batch: PackedBatch) -> dict[str, Mean]:
        """Terms [B N] by pair: its loss among the pairs of its row, its cosine."""
        found, mask = self.embed(params, batch), pairs(batch)
        scale, *bias = self._numbers(params)
        cosines = jnp.einsum(
            "BNE,BME->BNM", found["image"], found["text"], precision="highest"
        )
        logits = scale * cosines + sum(bias)
        own = jnp.eye(mask.shape[1], dtype=bool)
        if self.loss_name == "sigmoid":
            terms = jax.nn.softplus(jnp.where(own, -logits, logits))
            values = jnp.where(mask[:, None], terms, 0).sum(2)
        else:
            both = mask[:, :, None] & mask[:, None]
            logits = jnp.where(both | own, logits, losses.NEVER)
            chances = sum(jax.nn.log_softmax(logits, axis) for axis in (1, 2))
            values = -jnp.diagonal(jnp.asarray(chances), axis1=1, axis2=2) / 2
        similarity = jnp.diagonal(cosines, axis1=1, axis2=2)
        return {"loss": masked(values, mask), "similarity": masked(similarity, mask)}

    def _apply(self, params: Params, method: str, *arguments: Any) -> Any:
        return self.model.apply({"params": params}, *arguments, method=method)


def pairs(batch: PackedBatch) -> Bool[Array, "B N"]:
    """The slots that hold an image and a text."""
    segments = batch.targets["text_segment_ids"]
    return batch.image_mask & (tokens_of_slots(segments, batch.image_mask.shape[1]) > 0)
