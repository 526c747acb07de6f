"""A tower of texts: packed captions, several to a row, with the changes of NaViT.

Patch n' Pack (Dehghani et al. 2023) gives texts the masks and pooling of images, and 24
tokens at most; of the tower's width, depth and positions it says nothing.

Shapes: B rows, T text tokens a row, N slots a row, V ids of the vocabulary, S places of
a text, D width. Parameters are those of `models/navit.py` but for

  token_embedding     embedding [V D]
  position_embedding  tables [1 S D]
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int, Key

from navit_jax.errors import ConfigError
from navit_jax.models import sizes
from navit_jax.models.choices import pick
from navit_jax.models.device_rows import free_axes, row_axes
from navit_jax.models.positions import Factorized
from navit_jax.models.stack import DTYPES, encode


class TextTower(nn.Module):
    """The packed encoder of texts: each token sees its own text, no other one.

    Attributes:
      vocab_size: V.
      length: S, the most tokens of a text.
      size: A name of `sizes.SIZES`, e.g. "B".
      pooling: "map", "mean" or "last", the token that ends a text.
      causal: Whether a token sees only itself and those before it (CLIP); computed by
        `dense` attention.

    All others are those of `navit.NaViT`.
    """

    vocab_size: int
    length: int
    size: str = "B"
    width: int | None = None
    depth: int | None = None
    num_heads: int | None = None
    mlp: int | None = None
    pooling: str = "map"
    bias_qkv: bool = False
    bias_ln: bool = False
    bias_mlp: bool = True
    qk_norm: bool = True
    activation: str = "gelu_tanh"
    eps: float = 1e-6
    layer_scale: float | int = 0.0
    attention: str = "auto"
    dtype: str = "float32"
    scan: bool = True
    remat: str = "light"
    drop_path: float = 0.0
    dropout: float = 0.0
    causal: bool = False

    @property
    def spec(self) -> sizes.Spec:
        """The shape of the tower, with what replaces it.

        Raises:
          ConfigError: an unknown name, or a width that its heads do not divide.
        """
        spec = sizes.named(self.size, "task.text.size")
        return sizes.replace(spec, self, "task.text")

    @nn.compact
    def __call__(
        self,
        tokens: Int[Array, "B T"],
        coords: Int[Array, "B T 1"],
        segment_ids: Int[Array, "B T"],
        num_slots: int,
        keys: Key[Array, "B N"] | None = None,
    ) -> dict[str, Float[Array, "B _ D"]]:
        """Encodes and pools the texts of each row.

        Args:
          tokens: Ids; of one that is not in the vocabulary the result is NaN.
          coords: Place of each token in its text.
          segment_ids: Number of its slot, from 1; 0 = padding.
          num_slots: N.
          keys: Of each slot, for drop path and dropout; None drops nothing.

        Returns:
          `tokens` [B T D], 0 at padding; `pooled` [B N D], 0 in slots without a text.

        Raises:
          ConfigError: an attribute has no such choice, or widths that do not divide.
        """
        if self.pooling == "none":
            raise ConfigError(
                "config.task.text.pooling='none': use 'map', 'mean' or 'last'"
            )
        spec, dtype = self.spec, pick("task.text.dtype", self.dtype, DTYPES)
        embed = nn.Embed(
            self.vocab_size,
            spec.width,
            embedding_init=nn.initializers.normal(0.02),
            name="token_embedding",
        )
        place = Factorized(spec.width, self.length, name="position_embedding")
        embedded = look_up(embed.embedding, tokens) + place(
            coords, jnp.zeros_like(coords)
        )
        # Padding may hold any id, and one that is not there would be NaN.
        embedded = jnp.where((segment_ids > 0)[..., None], embedded, 0).astype(dtype)
        row = embedded, coords, segment_ids, num_slots, keys
        return encode(self, "task.text", *row, causal=self.causal)


def look_up(
    table: Float[Array, "V D"], tokens: Int[Array, "B T"]
) -> Float[Array, "B T D"]:
    """The entries of the tokens, each device for its rows; NaN for one there is not.

    Left to itself, XLA gathers the gradients of all tokens on all devices where the
    table is larger than they are.
    """
    take = functools.partial(jnp.take, axis=0)
    if rows := row_axes(len(tokens)):
        take = jax.shard_map(
            take,
            in_specs=(P(), P(rows)),
            out_specs=P(rows),
            axis_names=set(free_axes()),
        )
    return take(table, tokens)
