"""Two towers, of images and of texts, that embed both in one space.

Shapes: B rows, T text tokens a row, N slots a row, D width of a tower, E shared width.
"""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from navit_jax.batch import PackedBatch


class TwoTowers(nn.Module):
    """A tower of images and one of texts, a linear map of each to a shared width.

    Attributes:
      encoder: Gives `pooled` [B N D] of images.
      text: Gives `pooled` [B N D] of texts, of another width if it likes.
      width: E.
      numbers: Scalar parameters by name, and where they start.
    """

    encoder: nn.Module
    text: nn.Module
    width: int
    numbers: Mapping[str, float | int]

    def setup(self):
        """Names the parameters."""
        self.image_head = nn.Dense(self.width, use_bias=False, dtype="float32")
        self.text_head = nn.Dense(self.width, use_bias=False, dtype="float32")
        for name, start in self.numbers.items():
            self.param(name, nn.initializers.constant(start), ())

    def __call__(self, batch: PackedBatch) -> None:
        """Touches all that has parameters, to make them."""
        self.embed_image(batch)
        self.embed_text(*texts(batch), batch.image_mask.shape[1])

    def embed_image(self, batch: PackedBatch, keys: Any = None) -> dict[str, Any]:
        """What the encoder gives, and `image` [B N E] of length 1."""
        out = self.encoder(
            batch.patches, batch.coords, batch.segment_ids, batch.grids, keys
        )
        return {**out, "image": normalise(self.image_head(out["pooled"]))}

    def embed_text(self, *arguments: Any) -> Float[Array, "B N E"]:
        """Of length 1; arguments as of `text.TextTower`."""
        return normalise(self.text_head(self.text(*arguments)["pooled"]))


def texts(batch: PackedBatch) -> tuple[Array, Array, Array]:
    """Tokens [B T], their places [B T 1] and segment ids [B T] of a batch."""
    names = "text_tokens", "text_coords", "text_segment_ids"
    tokens, coords, segment_ids = (batch.targets[name] for name in names)
    return tokens, coords, segment_ids


def normalise(x: Float[Array, "B N E"]) -> Float[Array, "B N E"]:
    """Of length 1; zeros stay zeros, with a gradient that is finite."""
    squares = jnp.square(x).sum(-1, keepdims=True)
    return x * jax.lax.rsqrt(jnp.maximum(squares, 1e-12))
