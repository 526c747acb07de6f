"""SparseFormer: a few latent tokens an image, which look where they choose.

SparseFormer (arXiv 2304.03768) and its second version, whose blocks are those of a
pretrained ViT (arXiv 2312.01987), on packed rows: each image has its own map, boxes in
fractions of its own sides and a number of tokens of its own, and attention stays within
it.

Shapes: B rows, L patches a row, N image slots a row, P values a patch, Q latent tokens
a row, T entries of a table, C channels, D width, R repeats.

Parameters, float32, a plain nested dict:

  stem         conv: kernel [7 7 3 C], bias [C]
  tables       rois [T 4]; embedding [T focus_width], T = 1 where it is shared
  focusing     of `focusing.Unit`, at focus_width, used R times
  stages       [R focus_width] (v2)
  transition   kernel [focus_width D], bias [D]; transition_norm (v1)
  refocusing   of `focusing.Unit`, at width D
  glimpses     of `glimpses.Glimpses` (with shape.glimpse)
  class_token  [1 D] (v2)
  blocks       as those of NaViT, stacked on axis 0
  norm         scale and bias [D]; so is pre_norm, before blocks (with pre_norm)
  projection   kernel [D projection] (CLIP)
"""

from collections.abc import Mapping, Sequence
from operator import itemgetter
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.core import FrozenDict
from jaxtyping import Array, Float, Int, Key, UInt8

from navit_jax.models import pooling, special_tokens, stack
from navit_jax.models.choices import pick
from navit_jax.models.device_rows import keep_rows
from navit_jax.models.dropout import Draws, draw
from navit_jax.models.feature_maps import CUTS, Maps, Stem
from navit_jax.models.focusing import BRANCHES, INIT, State, View, build_unit
from navit_jax.models.glimpses import Glimpses, lay_pixels
from navit_jax.models.latents import Tables, allot, by_image, place
from navit_jax.models.layers import layer_norm
from navit_jax.models.sampling import prepare
from navit_jax.models.sizes import Spec
from navit_jax.models.sparseformer_sizes import (
    Shape,
    named,
    num_macs,
    stem_macs,
    token_macs,
)

__all__ = ["SparseFormer", "num_macs", "num_parameters"]


class SparseFormer(nn.Module):
    """The packed encoder with latent tokens; it is called as NaViT is.

    Attributes:
      size: A name of `sparseformer_sizes.SHAPES` and the patch side of the data, e.g.
        "v1_tiny/16". Patches are only how pictures travel.
      shape: Attributes of that name's `Shape` to replace, e.g. {"points": 9}.
      latents: Q, the row's room for latent tokens, class tokens not counted; None is
        what `allot` may need at most.
      counts: Tokens that an image may have; none: as many as the shape's tables have.
        Tables of another number are interpolated.
      allot: Which of `counts` an image gets, as in `latents.allot`: "fixed" the first,
        "drawn" in training any, "budget" by its share of the row's patches.
      maps: "tiles", as many cells as there are patches; "canvas", a square of
        `max_side` patches for each slot.
      max_side: The longest side that the plan lets through, in patches.
      lookup: As in `sampling.lookup`.
      gradient_clamp: Entries of the gradient to a point's coordinate are kept within
        +-gradient_clamp / cells of the map's side; 0 for no clamp. The published code
        has 1 for a loss that is the mean over 128 images: for one over M of them that
        is 128 / M.
      roi_clamp: Whether boxes stay in the image after each move.
      freeze_roi: Whether boxes stay where they start, at no parameters for moves.
      attention, dtype, scan, remat: As in `navit.NaViT`; of units, what is sampled and
        mixed is computed again unless remat="none". Boxes and points are float32.
      drop_path: Rate at which the last block drops a branch of an image.
      capture: Whether to return boxes and points of each stage.
    """

    size: str = "v1_tiny/16"
    shape: Mapping[str, Any] = FrozenDict()
    latents: int | None = None
    counts: Sequence[int] = ()
    allot: str = "fixed"
    maps: str = "tiles"
    max_side: int = 64
    lookup: str = "auto"
    gradient_clamp: float | int = 0.0
    roi_clamp: bool = False
    freeze_roi: bool = False
    attention: str = "auto"
    dtype: str = "float32"
    scan: bool = True
    remat: str = "light"
    drop_path: float | int = 0.0
    capture: bool = False

    # What `stack.build_blocks` reads of a tower, and is the same for all of these.
    bias_qkv = bias_ln = bias_mlp = True
    qk_norm = False
    dropout = 0.0

    def __post_init__(self):
        # A module with a plain dict or list can not be hashed: no key of a jit cache.
        shape = {
            k: tuple(v) if isinstance(v, list) else v for k, v in self.shape.items()
        }
        object.__setattr__(self, "shape", FrozenDict(shape))
        object.__setattr__(self, "counts", tuple(self.counts))
        super().__post_init__()

    @property
    def full_shape(self) -> Shape:
        """The shape, with what replaces parts of it; raises as `named`."""
        return named(self.size, self.shape)[0]

    @property
    def spec(self) -> Spec:
        """The shape of the blocks."""
        return self.full_shape.spec

    @property
    def activation(self) -> str:
        """Of the blocks."""
        return self.full_shape.activation

    @property
    def eps(self) -> float:
        """Of all layer norms."""
        return self.full_shape.eps

    @property
    def layer_scale(self) -> float:
        """Of the blocks."""
        return self.full_shape.layer_scale

    @property
    def allowed(self) -> tuple[int, ...]:
        """The numbers of tokens that an image may have."""
        return tuple(self.counts) or (self.full_shape.latents,)

    def forward_flops(self, tokens: int | float, images: int | float) -> float:
        """FLOPs of a forward pass over pictures, all patches of them together.

        Two a multiply-add; where tokens of an image vary, of the mean of `counts`.
        """
        shape, patch = named(self.size, {**self.shape, "num_classes": 0})
        counts = self.allowed[:1] if self.allot == "fixed" else self.allowed
        each = np.mean([token_macs(shape, count) for count in counts])
        return float(2 * (images * each + tokens * stem_macs(shape, patch, patch)))

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
          patches: uint8 pixels, or floats already normalised; of whole pictures, row
            by row (with maps="canvas" what is missing is 0).
          coords: Indices of each patch in its image's grid.
          segment_ids: 1.. in the order of packing, 0 = padding.
          grids: Patches a side of each image; anything in an empty slot.
          image_keys: Keys of the images for drop path and the draw of their number of
            tokens; None drops nothing, and draws nothing.

        Returns:
          `tokens` [B Q D], 0 at padding, and `pooled` [B N D], 0 in slots without a
          patch; `latent_ids` [B Q], the tokens' segment ids, and `num_latents` [B N];
          with a class token `class`, the same as `pooled`; with a projection
          `projected` [B N projection]. With `capture` also `rois` [B R+1 Q 4], those
          looked at by stage, `points` [B R+1 Q S 2] and `looks`: `latents.by_image`.

        Raises:
          ConfigError: an attribute has no such choice, or there may be no room.
        """
        shape, N = self.full_shape, grids.shape[1]
        dtype = pick("model.dtype", self.dtype, stack.DTYPES)
        counts, num_tokens = self.allowed, pooling.tokens_of_slots(segment_ids, N)
        room = self.latents or N * max(counts)
        chosen = allot(self.allot, counts, room, num_tokens, image_keys)
        num_latents = jnp.where(num_tokens > 0, jnp.array(counts)[chosen], 0)
        ids, inside = place(num_latents, room)
        maps, pictures = self._maps(patches, coords, segment_ids, grids)
        tables = Tables(shape, counts, self.freeze_roi, self.roi_clamp, name="tables")
        tokens, rois = tables(chosen, ids, inside)
        state = State(keep_rows(tokens.astype(dtype)), rois)
        draws = self._draw(image_keys, ids)
        view, seen = View(maps, ids), []
        focus = build_unit(self, "focusing", dtype)
        init, size = nn.initializers.normal(1.0), (shape.repeats, shape.focus_width)
        stages = self.param("stages", init, size) if shape.stages else None
        for repeat in range(shape.repeats):
            if stages is not None:
                tokens = state.tokens + stages[repeat].astype(dtype)
                state = state._replace(tokens=tokens)
            state = focus(state, view, jax.tree.map(itemgetter(repeat), draws))
            seen.append(state)
        dense = nn.Dense(shape.width, kernel_init=INIT, dtype=dtype, name="transition")
        tokens = dense(state.tokens)
        if shape.transition_norm:
            tokens = layer_norm(tokens, True, dtype, "transition_norm", shape.eps)
        state = state._replace(tokens=keep_rows(tokens))
        refocus = build_unit(self, "refocusing", dtype)
        last = jax.tree.map(itemgetter(shape.repeats), draws)
        seen.append(refocus(state, view, last))
        tokens, rois, *_ = seen[-1]
        if shape.glimpse:
            how = shape, self.lookup, self.gradient_clamp, dtype
            tokens = Glimpses(*how, name="glimpses")(tokens, rois, ids, pictures)
        out = self._encode(tokens, ids, N, image_keys, dtype)
        out |= {"latent_ids": ids, "num_latents": num_latents}
        if self.capture:
            rois = jnp.stack([each.looked for each in seen], 1)
            points = jnp.stack([each.points for each in seen], 1)
            looks = by_image(rois, points, num_latents, max(counts))
            out |= {"rois": rois, "points": points, "looks": looks}
        return out

    def _maps(self, *row: Array) -> tuple[Maps, Maps]:
        """Of what the call takes of a row: those of the stem, and of its pixels."""
        (shape, patch), dtype = named(self.size, self.shape), stack.DTYPES[self.dtype]
        cut = pick("model.maps", self.maps, CUTS)
        pixels, maps = cut(*row, patch, self.max_side)
        mean, std = shape.pixel_mean, shape.pixel_std
        stem = Stem(shape.channels, mean, std, dtype, name="stem")
        cells = keep_rows(stem(pixels, maps, patch * row[3]))
        pictures = lay_pixels(pixels, maps, row[3], patch, shape)
        return prepare(maps._replace(cells=cells), self.lookup), pictures

    def _draw(self, keys: Array | None, ids: Array) -> Draws:
        """Of all units and blocks; the rate grows over them, repeats counted."""
        if keys is None or not self.drop_path:
            return {}
        shape, slots = self.full_shape, jnp.maximum(ids - 1, 0)
        depth = shape.repeats + 1 + shape.depth
        return draw(keys, slots, ids[..., None], depth, self.drop_path, 0.0, BRANCHES)

    def _encode(
        self, tokens: Array, ids: Array, num_slots: int, keys: Array | None, dtype: Any
    ) -> dict[str, Array]:
        """The blocks, the last norm, and one vector for each image."""
        shape, rows = self.full_shape, ids
        tokens = jnp.where((ids > 0)[..., None], tokens, 0)
        if shape.class_token:
            init = nn.initializers.normal(1.0)
            own = self.param("class_token", init, (1, shape.width)).astype(dtype)
            tokens, rows, _ = special_tokens.insert(tokens, ids, own, num_slots)
        draws = self._draw(keys, rows)
        draws = jax.tree.map(itemgetter(slice(shape.repeats + 1, None)), draws)
        if shape.pre_norm:
            tokens = layer_norm(tokens, True, dtype, "pre_norm", shape.eps)
        blocks = stack.build_blocks(self, "model", dtype, INIT)
        tokens, _ = blocks(keep_rows(tokens), draws, rows, None)

        masks = pooling.image_masks(ids, num_slots)
        if shape.class_token:
            pooled = special_tokens.first(tokens, rows, num_slots)
            tokens = special_tokens.remove(tokens, ids, 1, num_slots)
        else:
            pooled = pooling.mean_pool(tokens, masks)
        norm = nn.LayerNorm(shape.eps, dtype, use_fast_variance=False, name="norm")
        present = masks.any(-1, keepdims=True)
        out = {
            "tokens": keep_rows(jnp.where((ids > 0)[..., None], norm(tokens), 0)),
            "pooled": keep_rows(jnp.where(present, norm(pooled), 0)),
        }
        if shape.class_token:
            out["class"] = out["pooled"]
        if shape.projection:
            dense = nn.Dense(shape.projection, False, dtype, name="projection")
            out["projected"] = dense(out["pooled"])
        return out


def num_parameters(name: str) -> int:
    """Parameters of a name of `SHAPES`, with its head of classes or projection."""
    model = SparseFormer(f"{name}/16")
    row = [
        jax.ShapeDtypeStruct((1, 4, *last), dtype)
        for last, dtype in (((768,), "uint8"), ((2,), "int32"), ((), "int32"))
    ]
    grids = jax.ShapeDtypeStruct((1, 1, 2), "int32")
    params = jax.eval_shape(model.init, jax.random.key(0), *row, grids)
    shape = model.full_shape
    head = (shape.width + 1) * shape.num_classes
    return head + sum(x.size for x in jax.tree.leaves(params))
