"""Layers of the encoder: QK-normalised packed attention, MLP, pre-LN block.

Shapes: B rows, L tokens a row, D width, H heads, K head width, W pairs of a head.
"""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from navit_jax.models.attention import packed_attention
from navit_jax.models.choices import pick
from navit_jax.models.dropout import Draws, residual
from navit_jax.models.rope import rotate


def gelu(x: Float[Array, "*S"]) -> Float[Array, "*S"]:
    """Exact GELU in float32, by erf: erfc takes a CPU longer."""
    wide = x.astype(jnp.float32)
    return (wide * (0.5 + 0.5 * jax.lax.erf(wide * 0.5**0.5))).astype(x.dtype)


ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "gelu_tanh": functools.partial(nn.gelu, approximate=True),
    "gelu": gelu,
    # OpenAI's CLIP.
    "quick_gelu": lambda x: x * nn.sigmoid(1.702 * x),
}
XAVIER = nn.initializers.xavier_uniform()


def layer_norm(
    x: Float[Array, "B L *S D"], bias: bool, dtype: Any, name: str, eps: float = 1e-6
) -> Float[Array, "B L *S D"]:
    """Normalises over D, with float32 statistics, by two passes."""
    norm = nn.LayerNorm(eps, dtype, use_bias=bias, use_fast_variance=False, name=name)
    # In one line: with B = 1 apart, XLA sums the gradient of the scale 50 times slower
    # on a CPU, and steps of one long row take 10 % more.
    return norm(x.reshape(-1, *x.shape[2:])).reshape(x.shape)


def project_heads(
    num_heads: int,
    head_width: int,
    bias: bool,
    dtype: Any,
    name: str,
    init: Any = XAVIER,
) -> nn.DenseGeneral:
    """A projection [... D] -> [... H K]."""
    return nn.DenseGeneral(
        (num_heads, head_width),
        use_bias=bias,
        kernel_init=init,
        dtype=dtype,
        name=name,
    )


def merge_heads(
    width: int, bias: bool, dtype: Any, name: str, init: Any = XAVIER
) -> nn.DenseGeneral:
    """A projection [... H K] -> [... D]."""
    return nn.DenseGeneral(
        width,
        axis=(-2, -1),
        use_bias=bias,
        kernel_init=init,
        dtype=dtype,
        name=name,
    )


class Mlp(nn.Module):
    """Two layers with a GELU between them.

    Attributes:
      hidden: Width between the layers.
      activation: One of `ACTIVATIONS`.
      init: Of the kernels.
    """

    hidden: int
    bias: bool
    dtype: Any
    activation: str = "gelu_tanh"
    init: Any = XAVIER

    @nn.compact
    def __call__(self, tokens: Float[Array, "*S D"]) -> Float[Array, "*S D"]:
        """Each vector by itself."""

        def dense(width: int, name: str) -> nn.Dense:
            return nn.Dense(
                width,
                use_bias=self.bias,
                kernel_init=self.init,
                dtype=self.dtype,
                name=name,
            )

        # In one line: of rows, XLA transposes what the kernels' gradients are summed
        # over, on a CPU a tenth of the step.
        line = tokens.reshape(-1, tokens.shape[-1])
        hidden = checkpoint_name(dense(self.hidden, "up")(line), "hidden")
        hidden = pick("model.activation", self.activation, ACTIVATIONS)(hidden)
        return dense(tokens.shape[-1], "down")(hidden).reshape(tokens.shape)


class Attention(nn.Module):
    """Multi-head attention within each image of a packed row.

    Queries and keys are normalised per head, over K, without bias (ViT-22B, section 2),
    before they are rotated.

    Attributes:
      implementation, causal: As in `attention.packed_attention`.
    """

    num_heads: int
    bias_qkv: bool
    bias_out: bool
    qk_norm: bool
    implementation: str
    dtype: Any
    eps: float = 1e-6
    init: Any = XAVIER
    causal: bool = False

    @nn.compact
    def __call__(
        self,
        tokens: Float[Array, "B L D"],
        segment_ids: Int[Array, "B L"],
        angles: Float[Array, "B L W"] | None,
    ) -> Float[Array, "B L D"]:
        """Attends; `angles` None means no rotary positions."""
        D = tokens.shape[-1]

        def heads(name: str) -> Float[Array, "B L H K"]:
            layer = project_heads(
                self.num_heads,
                D // self.num_heads,
                self.bias_qkv,
                self.dtype,
                name,
                self.init,
            )
            return checkpoint_name(layer(tokens), "projected")

        query, key, value = heads("query"), heads("key"), heads("value")
        if self.qk_norm:
            query = layer_norm(query, False, self.dtype, "query_norm", self.eps)
            key = layer_norm(key, False, self.dtype, "key_norm", self.eps)
        if angles is not None:
            query, key = rotate(query, angles), rotate(key, angles)
        attended = packed_attention(
            query, key, value, segment_ids, self.implementation, causal=self.causal
        )
        return merge_heads(D, self.bias_out, self.dtype, "out", self.init)(attended)


class Block(nn.Module):
    """A pre-LN block: x + attention(LN x), then x + MLP(LN x).

    Attributes:
      hidden: Width of the MLP between its layers.
      dropout: Rate at which entries of a branch are dropped.
      layer_scale: What factors of the entries of a branch start at (CaiT, section
        2.1); 0 has no such parameters.
      init: Of the kernels.
      causal: As in `attention.packed_attention`.
    """

    num_heads: int
    hidden: int
    bias_qkv: bool
    bias_ln: bool
    bias_mlp: bool
    qk_norm: bool
    implementation: str
    dropout: float
    dtype: Any
    activation: str = "gelu_tanh"
    eps: float = 1e-6
    layer_scale: float | int = 0.0
    init: Any = XAVIER
    causal: bool = False

    @nn.compact
    def __call__(
        self,
        tokens: Float[Array, "B L D"],
        draws: Draws,
        segment_ids: Int[Array, "B L"],
        angles: Float[Array, "B L W"] | None,
    ) -> tuple[Float[Array, "B L D"], None]:
        """The tokens after the block, and nothing to stack."""
        attention = Attention(
            num_heads=self.num_heads,
            bias_qkv=self.bias_qkv,
            bias_out=self.bias_mlp,
            qk_norm=self.qk_norm,
            implementation=self.implementation,
            dtype=self.dtype,
            eps=self.eps,
            init=self.init,
            causal=self.causal,
            name="attention",
        )
        mlp = Mlp(
            self.hidden,
            self.bias_mlp,
            self.dtype,
            self.activation,
            self.init,
            name="mlp",
        )
        normed = layer_norm(tokens, self.bias_ln, self.dtype, "norm_1", self.eps)
        attended = self._scale(attention(normed, segment_ids, angles), "layer_scale_1")
        tokens = tokens + residual(attended, 0, draws, self.dropout)
        tokens = checkpoint_name(tokens, "between")
        normed = layer_norm(tokens, self.bias_ln, self.dtype, "norm_2", self.eps)
        mixed = self._scale(mlp(normed), "layer_scale_2")
        return tokens + residual(mixed, 1, draws, self.dropout), None

    def _scale(self, x: Float[Array, "B L D"], name: str) -> Float[Array, "B L D"]:
        if not self.layer_scale:
            return x
        init = nn.initializers.constant(self.layer_scale)
        return x * self.param(name, init, x.shape[-1:]).astype(x.dtype)
