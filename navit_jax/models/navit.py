"""NaViT: a vision transformer on rows of patch tokens that each hold several images.

Patch n' Pack (Dehghani et al. 2023), section 2: a pre-LN ViT whose attention stays
within an image, with query-key normalisation, no biases in QKV and layer norms, and
one pooled vector per image, without a CLS token. The plain ViTs of other people are
the same module with other attributes (docs/weights.md).

Shapes: B rows, L tokens a row, N image slots a row, P values a patch, A axes of a
grid, D width, H heads, K head width.

Parameters, float32, a plain nested dict; the blocks are stacked on axis 0 whether or
not they are scanned:

  patch_embedding     kernel [P D], bias [D] (with bias_patch)
  class_token         [1 D] (with class_token)
  registers           [registers D] (with registers)
  position_embedding  by scheme: table, tables, or kernel and bias; none if fixed
  pre_norm            scale [D] (with pre_norm)
  blocks
    norm_1, norm_2    scale [depth D] (bias with bias_ln)
    layer_scale_1, layer_scale_2  [depth D] (with layer_scale)
    attention         query, key, value: kernel [depth D H K] (bias with bias_qkv)
                      query_norm, key_norm: scale [depth K] (with qk_norm)
                      out: kernel [depth H K D], bias [depth D] (with bias_mlp)
    mlp               up: kernel [depth D hidden], down: kernel [depth hidden D];
                      bias with bias_mlp
  norm                scale [D] (this and pre_norm: bias with bias_ln)
  pool                with pooling="map": probe [1 D]; query, key, value, out, norm
                      and mlp as those of a block, not stacked
"""

from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from flax.core import FrozenDict
from jaxtyping import Array, Float, Int, Key, UInt8

from navit_jax import config
from navit_jax.models import sizes
from navit_jax.models.choices import pick
from navit_jax.models.positions import POSITIONS
from navit_jax.models.rope import Rope
from navit_jax.models.stack import DTYPES, encode


def normalise(
    patches: UInt8[Array, "B L P"] | Float[Array, "B L P"],
    mean: Sequence[float | int] = (0.5, 0.5, 0.5),
    std: Sequence[float | int] = (0.5, 0.5, 0.5),
) -> Float[Array, "B L P"]:
    """(pixel / 255 - mean) / std in float32; floats are taken as they are.

    Args:
      mean, std: Of the channels; with .5 uint8 pixels become [-1, 1].
    """
    if patches.dtype != jnp.uint8:
        return patches
    num_pixels = patches.shape[-1] // len(mean)
    # In float64: with .5 it is x / 127.5 - 1 to the bit.
    divisor = np.tile(255 * np.asarray(std, np.float64), num_pixels)
    shift = np.tile(np.asarray(mean, np.float64) / np.asarray(std), num_pixels)
    pixels = patches.astype(jnp.float32) / divisor.astype(np.float32)
    return pixels - shift.astype(np.float32)


class NaViT(nn.Module):
    """The packed encoder.

    Attributes:
      size: As in `sizes.spec`, e.g. "B/16".
      width, depth, num_heads, mlp: Replace what `size` says.
      positions: `name` and arguments of one of `positions.POSITIONS`.
      pooling: "map" (attention pooling), "mean", "class" (the class token) or "none".
      bias_qkv, bias_ln: Biases of query, key and value, and of layer norms.
      bias_mlp: Biases of MLPs and of the projections after attention.
      bias_patch: Bias of the patch embedding.
      class_token: Whether each image has one; it has no position of its own.
      registers: Further learned tokens of each image (Darcet et al. 2023).
      pre_norm: Whether tokens are normalised before the first block too (CLIP).
      qk_norm: Whether queries and keys are layer-normalised per head.
      activation: Of the blocks' MLPs, one of `layers.ACTIVATIONS`.
      eps: Added to variances in layer norms.
      layer_scale: As in `layers.Block`.
      pixel_mean, pixel_std: As in `normalise`.
      attention: As in `attention.packed_attention`.
      dtype: Of activations, "float32" or "bfloat16". Parameters, positions, softmax
        and the statistics of layer norms are float32 in both.
      scan: One compiled block run `depth` times; False compiles each. The parameters
        are the same.
      remat: What the backward pass keeps of a block, one of `stack.REMAT`: "light"
        keeps the results of matrix products and of attention, and computes norms and
        activations again (and the L x L weights of `dense`), which is faster where
        memory is slow; "none" keeps everything, "full" nothing.
      drop_path: Rate at which the last block drops a branch of an image.
      dropout: Rate at which entries of a residual branch are dropped.
    """

    size: str = "B/16"
    width: int | None = None
    depth: int | None = None
    num_heads: int | None = None
    mlp: int | None = None
    positions: Mapping[str, Any] = FrozenDict(name="factorized")
    pooling: str = "map"
    bias_qkv: bool = False
    bias_ln: bool = False
    bias_mlp: bool = True
    bias_patch: bool = True
    class_token: bool = False
    registers: int = 0
    pre_norm: bool = False
    qk_norm: bool = True
    activation: str = "gelu_tanh"
    eps: float = 1e-6
    layer_scale: float | int = 0.0
    pixel_mean: Sequence[float | int] = (0.5, 0.5, 0.5)
    pixel_std: Sequence[float | int] = (0.5, 0.5, 0.5)
    attention: str = "auto"
    dtype: str = "float32"
    scan: bool = True
    remat: str = "light"
    drop_path: float = 0.0
    dropout: float = 0.0

    def __post_init__(self):
        # A module with a plain dict or list can not be hashed: no key of a jit cache.
        object.__setattr__(self, "positions", FrozenDict(self.positions))
        for name in ("pixel_mean", "pixel_std"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        super().__post_init__()

    @property
    def spec(self) -> sizes.Spec:
        """The shape of the encoder, with what replaces it.

        Raises:
          ConfigError: a width that its heads do not divide.
        """
        return sizes.replace(sizes.spec(self.size), self, "model")

    @property
    def max_side(self) -> int:
        """The most patches a side of a grid that the positions know."""
        where = "model.positions"
        unused = config.build(self.positions, POSITIONS, where, width=1, parent=None)
        return unused.length

    @nn.compact
    def __call__(
        self,
        patches: UInt8[Array, "B L P"] | Float[Array, "B L P"],
        coords: Int[Array, "B L A"],
        segment_ids: Int[Array, "B L"],
        grids: Int[Array, "B N A"],
        image_keys: Key[Array, "B N"] | None = None,
    ) -> dict[str, Array]:
        """Encodes and pools the images of each row.

        Args:
          patches: uint8 pixels, or floats already normalised.
          coords: Indices of each patch in its image's grid, before any was dropped.
          segment_ids: 1.. in the order of packing, 0 = padding.
          grids: Patches a side of each image; anything in an empty slot.
          image_keys: Keys of the images for drop path and dropout; None drops nothing.

        Returns:
          `tokens` [B L D], 0 at padding; `pooled` [B N D], 0 in slots without a token,
          absent with pooling="none"; `class` [B N D] with a class token, which like
          registers is not in `tokens`, nor in what "mean" and "map" pool.

        Raises:
          ConfigError: an attribute has no such choice, or widths that do not divide.
        """
        spec, dtype = self.spec, pick("model.dtype", self.dtype, DTYPES)
        N, real = grids.shape[1], (segment_ids > 0)[..., None]
        slots = jnp.maximum(segment_ids - 1, 0)
        token_grids = jnp.take_along_axis(grids, slots[..., None], axis=1)

        # Zeroed rather than trusted: 0 x NaN of a padded patch would spoil gradients.
        pixels = normalise(patches, self.pixel_mean, self.pixel_std)
        pixels = jnp.where(real, pixels, 0)
        embed = nn.Dense(
            spec.width, self.bias_patch, dtype=dtype, name="patch_embedding"
        )
        tokens = embed(pixels)
        rotary = POSITIONS.get(self.positions.get("name", "")) is Rope
        positions = config.build(
            self.positions,
            POSITIONS,
            "model.positions",
            width=spec.width // spec.num_heads // 2 if rotary else spec.width,
            name="position_embedding",
        )(coords, token_grids)
        if not rotary:
            tokens = (tokens + positions).astype(dtype)

        angles = positions if rotary else None
        special = self._special(spec.width)
        row = tokens, coords, segment_ids, N, image_keys, angles
        return encode(self, "model", *row, special, self.pre_norm)

    def _special(self, width: int) -> dict[str, Float[Array, "_ D"]]:
        sizes = {"class_token": int(self.class_token), "registers": self.registers}
        init = nn.initializers.normal(0.02)
        return {
            name.removesuffix("_token"): self.param(name, init, (size, width))
            for name, size in sizes.items()
            if size
        }
