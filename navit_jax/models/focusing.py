"""The focusing unit: latent tokens look at the image where their boxes are, and move.

SparseFormer (arXiv 2304.03768), section 3, as its code has it.

Shapes: B rows, Q latent tokens a row, S points a token, D width, C channels of a map.

Parameters, by operation:
  attend  norm_1 and attention, as those of `layers.Block`
  mlp     norm_2 and mlp, as those of `layers.Block`
  adjust  adjustment_norm; adjustment_hidden [D D] with deep_adjust; adjustment [D 4]
  sample  grid [S 2]; sampling_norm; sampling [D 2 S]; mixing_norm; down [D rank];
          generator [rank, C C + R S], first the entries of the channels' matrix
          (in, out), then of the points' (out, in); channel_bias [C] and point_bias [R]
          with mixing_bias; mixed [R C, D]
  locate  position_norm; position [D D]
"""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from navit_jax.models import rois as boxes
from navit_jax.models import sampling
from navit_jax.models.choices import pick
from navit_jax.models.dropout import Draws, residual
from navit_jax.models.feature_maps import Maps
from navit_jax.models.layers import Attention, Mlp, gelu, layer_norm
from navit_jax.models.sparseformer_sizes import Shape
from navit_jax.models.stack import REMAT

INIT = nn.initializers.normal(0.02)
ZERO = nn.initializers.zeros
# Attention and MLP are branches 0 and 1 of a block.
SAMPLE, ADJUST = 2, 3
BRANCHES = 4


class View(NamedTuple):
    """What the tokens of a row look at.

    Attributes:
      maps: Of the row's images.
      segment_ids: [B Q] of the tokens: 1.. by image slot, 0 = padding.
    """

    maps: Maps
    segment_ids: Int[Array, "B Q"]


class State(NamedTuple):
    """What a unit changes.

    Attributes:
      tokens: [B Q D]
      rois: [B Q 4] float32
      looked: [B Q 4] float32, the boxes of the points; None before any.
      points: [B Q S 2] float32, those sampled last; None before.
    """

    tokens: Array
    rois: Array
    looked: Array | None = None
    points: Array | None = None


class Unit(nn.Module):
    """One pass over the tokens, by operations in the order of `operations`.

    Attributes:
      operations: Of `OPERATIONS`.
      num_heads: Divides the width.
      shape: Whose `points` are S and `out_points` R; nothing of its blocks is read.
      lookup: As in `sampling.lookup`.
      gradient_clamp: As in `sparseformer.SparseFormer`; 0 for none.
      roi_clamp: Whether corners stay in the image.
      implementation: As in `attention.packed_attention`.
    """

    operations: tuple[str, ...]
    num_heads: int
    shape: Shape
    lookup: str
    gradient_clamp: float | int
    roi_clamp: bool
    implementation: str
    dtype: Any

    @nn.compact
    def __call__(self, state: State, view: View, draws: Draws) -> State:
        """The state after all operations.

        Raises:
          ConfigError: an operation that there is not.
        """
        for name in self.operations:
            state = pick("model.shape", name, OPERATIONS)(self, state, view, draws)
        return state

    def attend(self, state: State, view: View, draws: Draws) -> State:
        """Attention within each image."""
        attention = Attention(
            num_heads=self.num_heads,
            bias_qkv=True,
            bias_out=True,
            qk_norm=False,
            implementation=self.implementation,
            dtype=self.dtype,
            eps=self.shape.eps,
            init=INIT,
            name="attention",
        )
        normed = layer_norm(state.tokens, True, self.dtype, "norm_1", self.shape.eps)
        attended = attention(normed, view.segment_ids, None)
        return self._add(state, attended, 0, draws)

    def transform(self, state: State, view: View, draws: Draws) -> State:
        """Two layers, four times as wide between them."""
        hidden = 4 * state.tokens.shape[-1]
        # CLIP's activation is of its own blocks alone.
        mlp = Mlp(hidden, True, self.dtype, "gelu", INIT, name="mlp")
        normed = layer_norm(state.tokens, True, self.dtype, "norm_2", self.shape.eps)
        return self._add(state, mlp(normed), 1, draws)

    def adjust(self, state: State, view: View, draws: Draws) -> State:
        """Boxes move; the tokens stay."""
        x = unit_norm(state.tokens, "adjustment_norm", self.shape.eps)
        if self.shape.deep_adjust:
            x = nn.Dense(x.shape[-1], kernel_init=INIT, name="adjustment_hidden")(x)
            x = gelu(x)
        logits = nn.Dense(4, use_bias=False, kernel_init=ZERO, name="adjustment")(x)
        if self.shape.drop_adjust:
            logits = residual(logits, ADJUST, draws, 0.0)
        rois = boxes.settle(boxes.adjust(state.rois, logits), self.roi_clamp)
        return state._replace(rois=rois)

    def sample(self, state: State, view: View, draws: Draws) -> State:
        """Reads the maps at points of the boxes, and mixes what is there."""
        B, Q, _ = state.tokens.shape
        S = self.shape.points
        grid = self.param("grid", lambda _: jnp.asarray(boxes.point_grid(S)))
        x = unit_norm(state.tokens, "sampling_norm", self.shape.eps)
        dense = nn.Dense(2 * S, use_bias=False, kernel_init=ZERO, name="sampling")
        offsets = dense(x)
        points = boxes.place_points(state.rois, grid + offsets.reshape(B, Q, S, 2))
        slots = jnp.maximum(view.segment_ids - 1, 0)
        how = self.shape.padding, self.lookup, self.gradient_clamp
        sampled = sampling.lookup(view.maps, slots, points, *how)
        real = (view.segment_ids > 0)[..., None, None]
        sampled = jnp.where(real, sampled, 0).astype(self.dtype)
        mixed = self._mix(state.tokens, sampled)
        state = state._replace(looked=state.rois, points=points)
        return self._add(state, mixed, SAMPLE, draws)

    def locate(self, state: State, view: View, draws: Draws) -> State:
        """Tells each token where its box is."""
        width = state.tokens.shape[-1]
        norm = nn.LayerNorm(
            self.shape.eps, use_fast_variance=False, name="position_norm"
        )
        dense = nn.Dense(width, kernel_init=INIT, dtype=self.dtype, name="position")
        encoded = dense(norm(boxes.encode(state.rois, width)).astype(self.dtype))
        return state._replace(tokens=state.tokens + encoded)

    def _mix(
        self, tokens: Float[Array, "B Q D"], sampled: Float[Array, "B Q S C"]
    ) -> Float[Array, "B Q D"]:
        B, Q, S, C = sampled.shape
        D, R = tokens.shape[-1], self.shape.out_points
        # In one line, as in `layers.Mlp`.
        x = unit_norm(tokens, "mixing_norm", self.shape.eps).astype(self.dtype)
        x = nn.Dense(
            self.shape.find_rank(D), kernel_init=INIT, dtype=self.dtype, name="down"
        )(x.reshape(-1, D))
        channels, points = Generator(C, S, R, self.dtype, name="generator")(x)
        mixed = sampled.reshape(-1, S, C) @ channels
        if self.shape.mixing_bias:
            bias = self.param("channel_bias", ZERO, (C,))
            # The second version has neither this bias nor this activation.
            mixed = gelu(mixed + bias.astype(self.dtype))
        mixed = points @ mixed
        if self.shape.mixing_bias:
            bias = self.param("point_bias", ZERO, (R,))
            mixed += bias.astype(self.dtype)[:, None]
        mixed = gelu(mixed).reshape(-1, R * C)
        dense = nn.Dense(D, kernel_init=INIT, dtype=self.dtype, name="mixed")
        return dense(mixed).reshape(B, Q, D)

    def _add(self, state: State, branch: Array, which: int, draws: Draws) -> State:
        tokens = state.tokens + residual(branch, which, draws, 0.0)
        return state._replace(tokens=tokens)


OPERATIONS = {
    "attend": Unit.attend,
    "adjust": Unit.adjust,
    "sample": Unit.sample,
    "locate": Unit.locate,
    "mlp": Unit.transform,
}


def unit_norm(x: Float[Array, "B Q D"], name: str, eps: float) -> Float[Array, "B Q D"]:
    """A layer norm in float32, of vectors that start at a length of 1."""
    norm = nn.LayerNorm(
        eps,
        jnp.float32,
        scale_init=nn.initializers.constant(x.shape[-1] ** -0.5),
        use_fast_variance=False,
        name=name,
    )
    return norm(x)


class Generator(nn.Module):
    """Matrices of channels and of points for each vector, as a dense layer has them.

    Its kernel is cut rather than what it makes, which is far larger.
    """

    channels: int
    points: int
    out_points: int
    dtype: Any

    @nn.compact
    def __call__(
        self, x: Float[Array, "N K"]
    ) -> tuple[Float[Array, "N C C"], Float[Array, "N R S"]]:
        """[C C], then [R S], of each vector."""
        C, S, R = self.channels, self.points, self.out_points
        size = C * C + R * S
        kernel = self.param("kernel", ZERO, (x.shape[-1], size))
        bias = self.param("bias", self._two_matrices, (size,))
        kernel, bias = kernel.astype(self.dtype), bias.astype(self.dtype)
        channels = x @ kernel[:, : C * C] + bias[: C * C]
        points = x @ kernel[:, C * C :] + bias[C * C :]
        return channels.reshape(-1, C, C), points.reshape(-1, R, S)

    def _two_matrices(self, key: Any, shape: Any) -> Array:
        """Xavier-uniform each."""
        keys, draw = jax.random.split(key), nn.initializers.xavier_uniform()
        sizes = (self.channels, self.channels), (self.points, self.out_points)
        parts = [draw(k, size) for k, size in zip(keys, sizes, strict=True)]
        return jnp.concatenate([part.ravel() for part in parts]).reshape(shape)


def build_unit(tower: Any, name: str, dtype: Any) -> nn.Module:
    """The unit "focusing" or "refocusing" of a `sparseformer.SparseFormer`."""
    shape, unit = tower.full_shape, Unit
    policy = pick("model.remat", tower.remat, REMAT)
    if policy is not None:
        unit = nn.remat(Unit, policy=policy)
    again = name == "refocusing"
    operations = shape.refocus if again else shape.focus
    if tower.freeze_roi:
        operations = tuple(each for each in operations if each != "adjust")
    return unit(
        operations=operations,
        num_heads=shape.num_heads if again else shape.focus_heads,
        shape=shape,
        lookup=tower.lookup,
        gradient_clamp=tower.gradient_clamp,
        roi_clamp=tower.roi_clamp,
        implementation=tower.attention,
        dtype=dtype,
        name=name,
    )
