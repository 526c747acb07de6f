"""Predicts the pixels of masked patches: a task with one target a token.

Masked patches stay in the row, with the encoder's mean colour (0 after normalisation)
as content and their own position; the loss is the squared error of their pixels (He et
al. 2022, "Masked autoencoders", section 3, whose encoder sees only the unmasked ones),
which are in [-1, 1] whatever the encoder's own mean and deviation are.

Shapes: B rows, L tokens a row, N image slots a row, P values a patch.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, Key

from navit_jax.batch import PackedBatch
from navit_jax.errors import ConfigError
from navit_jax.metrics import Mean, fold
from navit_jax.metrics import masked as masked_terms
from navit_jax.models.heads import Linear
from navit_jax.models.navit import normalise
from navit_jax.models.pooling import tokens_of_slots
from navit_jax.tasks.randomness import image_keys

Params = Mapping[str, Any]


def num_masked(num_tokens: Int[Array, "*S"], share: float | int) -> Int[Array, "*S"]:
    """The number of masked patches of an image: a share, rounded, at least one."""
    rounded = jnp.round(share * num_tokens).astype(jnp.int32)
    return jnp.where(num_tokens > 0, jnp.maximum(rounded, 1), 0)


def choose_masked(
    keys: Key[Array, "B N"],
    segment_ids: Int[Array, "B L"],
    coords: Int[Array, "B L A"],
    share: float | int,
) -> Bool[Array, "B L"]:
    """Marks a random share of each image's patches.

    Patches are ranked within their image by a draw from the image's key and the
    patch's place in its grid, so the choice is the same wherever the image is packed.
    """
    counts = num_masked(tokens_of_slots(segment_ids, keys.shape[1]), share)

    def row(keys, segments, coords, counts):
        slots = jnp.maximum(segments - 1, 0)

        def draw(slot, coord):
            key = keys[slot]
            for c in coord:
                key = jax.random.fold_in(key, c)
            return jax.random.uniform(key)

        draws = jax.vmap(draw)(slots, coords)
        order = jnp.lexsort((draws, segments))
        starts = jnp.searchsorted(segments[order], segments)
        places = jnp.zeros_like(order).at[order].set(jnp.arange(len(order)))
        return (segments > 0) & (places - starts < counts[slots])

    return jax.vmap(row)(keys, segment_ids, coords, counts)


class Reconstructor(nn.Module):
    """An encoder and a linear map of each token to the pixels of its patch.

    Attributes:
      encoder: Has `pixel_mean` and `pixel_std`, by which it sees pixels.
    """

    encoder: Any

    @nn.compact
    def __call__(
        self, batch: PackedBatch, masked: Bool[Array, "B L"], keys: Any = None
    ) -> dict[str, Any]:
        """`pixels` [B L P] in [-1, 1], the masked ones never seen; the encoder's."""
        encoder = self.encoder
        own = normalise(batch.patches, encoder.pixel_mean, encoder.pixel_std)
        pixels = jnp.where(masked[..., None], 0.0, own)
        out = encoder(pixels, batch.coords, batch.segment_ids, batch.grids, keys)
        predicted = Linear(pixels.shape[-1], name="head")(out["tokens"])
        return {**out, "pixels": predicted.astype(jnp.float32)}


@dataclasses.dataclass(frozen=True)
class MaskedPatches:
    """Mean squared error of the masked patches' pixels, over all of the global batch.

    Attributes:
      encoder: The packed encoder.
      share: Share of an image's patches that is masked.
    """

    encoder: nn.Module
    share: float | int = 0.75

    def __post_init__(self):
        if not 0 < self.share <= 1:
            raise ConfigError(f"config.task.share={self.share}: give a share in (0, 1]")

    @property
    def model(self) -> Reconstructor:
        """The module whose parameters are trained."""
        return Reconstructor(self.encoder)

    def init(self, key: jax.Array, batch: PackedBatch) -> Params:
        """Fresh parameters, as a nested dict."""
        masked = jnp.zeros(batch.segment_ids.shape, bool)
        return self.model.init(key, batch, masked)["params"]

    def weights(self, batch: PackedBatch) -> dict[str, jax.Array]:
        """The number of patches that will be masked."""
        counts = tokens_of_slots(batch.segment_ids, batch.image_mask.shape[1])
        return {"patches": num_masked(counts, self.share).sum(dtype=jnp.float32)}

    def loss(
        self,
        params: Params,
        batch: PackedBatch,
        key: jax.Array,
        weights: Mapping[str, jax.Array],
    ) -> tuple[jax.Array, dict[str, Mean]]:
        """Sum of the masked patches' errors over the given number of patches."""
        keys = image_keys(jax.random.fold_in(key, 1), batch.image_ids)
        mean = fold(self._error(params, batch, key, keys))
        return mean.total / jnp.maximum(weights["patches"], 1), {"loss": mean}

    def outputs(self, params: Params, batch: PackedBatch) -> dict[str, jax.Array]:
        """`pixels` [B L P] in [-1, 1] and `tokens` [B L D], with nothing masked."""
        return self._apply(params, batch, jnp.zeros(batch.segment_ids.shape, bool))

    def metrics(self, params: Params, batch: PackedBatch) -> dict[str, Mean]:
        """The error [B L] of patches under one fixed choice, for evaluation."""
        return {"loss": self._error(params, batch, jax.random.key(0))}

    def _error(
        self, params: Params, batch: PackedBatch, key: jax.Array, model_keys: Any = None
    ) -> Mean:
        keys = image_keys(key, batch.image_ids)
        masked = choose_masked(keys, batch.segment_ids, batch.coords, self.share)
        pixels = self._apply(params, batch, masked, model_keys)["pixels"]
        errors = jnp.square(pixels - normalise(batch.patches)).mean(-1)
        return masked_terms(errors, masked)

    def _apply(
        self, params: Params, batch: PackedBatch, masked: Any, keys: Any = None
    ) -> Any:
        return self.model.apply({"params": params}, batch, masked, keys)
