"""SparseFormers by name, as their papers' code has them, and what one costs.

arXiv 2304.03768 (v1) and 2312.01987 (v2). The micro ones are for a CPU, and
`v2_vit_s14` has the blocks of a ViT-S/14 of DINOv2's shape: these are ours.
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from navit_jax.config import nearest
from navit_jax.errors import ConfigError
from navit_jax.models.sizes import Spec

IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
HALF = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)
CLIP = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


class Shape(NamedTuple):
    """A SparseFormer.

    Attributes:
      latents: Tokens of an image, entries of the learned tables.
      shared: Whether all tokens have one embedding, and differ by their boxes.
      channels: Of the maps.
      points: That a token samples.
      focus_width, focus_heads: Of the focusing unit.
      repeats: Times that it runs.
      focus, refocus: Operations of the focusing unit, and of the one at full width.
      stages: Whether each repeat has an embedding of its own.
      width, depth, num_heads, mlp: Of the blocks at full width.
      transition_norm: Whether tokens are normalised when they get that width.
      class_token: Whether blocks see one, which then is what is pooled; without it the
        mean of the tokens is, and normalised.
      mixing_bias: Whether mixing has biases before its activations.
      deep_adjust: Whether boxes are moved by two layers rather than one.
      drop_adjust: Whether drop path drops moves of boxes.
      padding: As in `sampling.lookup`.
      rank: Of what generates a token's mixing matrices; 0 is a quarter of the width.
      out_points: Points of a token after mixing.
      activation, eps, layer_scale: As in `layers.Block`, of the blocks.
      pre_norm: Whether tokens are normalised before the blocks (CLIP).
      projection: Width of the projection of what is pooled; 0 for none.
      glimpse: Points a side that each token reads of the picture in its last box, as a
        patch of the ViT that its blocks are from: `glimpses.Glimpses`; 0 for none. With
        it boxes start side by side.
      glimpse_pool: Pixels a side whose mean is one point's.
      table: Entries a side of that ViT's table of positions.
      num_classes: Of the head that the name's parameters are counted with.
      pixel_mean, pixel_std: As in `navit.normalise`.
    """

    latents: int
    shared: bool
    channels: int
    points: int
    focus_width: int
    focus_heads: int
    repeats: int
    focus: tuple[str, ...]
    refocus: tuple[str, ...]
    stages: bool
    width: int
    depth: int
    num_heads: int
    mlp: int
    transition_norm: bool
    class_token: bool
    mixing_bias: bool
    deep_adjust: bool
    drop_adjust: bool
    padding: str
    rank: int
    out_points: int
    activation: str
    eps: float
    layer_scale: float = 0.0
    pre_norm: bool = False
    projection: int = 0
    glimpse: int = 0
    glimpse_pool: int = 1
    table: int = 37
    num_classes: int = 0
    pixel_mean: tuple[float, ...] = IMAGENET[0]
    pixel_std: tuple[float, ...] = IMAGENET[1]

    @property
    def spec(self) -> Spec:
        """The shape of the blocks."""
        return Spec(self.width, self.depth, self.num_heads, self.mlp)

    def find_rank(self, width: int) -> int:
        """The rank of what generates mixing matrices in a unit of a width."""
        return self.rank or width // 4


def _v1(
    latents: int, focus_width: int, width: int, depth: int, **changes: Any
) -> Shape:
    operations = ("attend", "adjust", "sample", "mlp")
    shape = Shape(
        latents=latents,
        shared=False,
        channels=96,
        points=36,
        focus_width=focus_width,
        # A quirk that released weights depend on: 64 heads at any width.
        focus_heads=64,
        repeats=4,
        focus=operations,
        refocus=operations,
        stages=False,
        width=width,
        # The first of the cortex is the unit that looks again.
        depth=depth - 1,
        num_heads=64,
        mlp=4 * width,
        transition_norm=True,
        class_token=False,
        mixing_bias=True,
        deep_adjust=False,
        drop_adjust=True,
        padding="zeros",
        rank=0,
        out_points=36,
        activation="gelu",
        eps=1e-6,
        num_classes=1000,
    )
    return shape._replace(**changes)


def _v2(
    latents: int, width: int, depth: int, pixels: tuple[Any, Any], **changes: Any
) -> Shape:
    shape = Shape(
        latents=latents,
        shared=True,
        channels=64,
        points=16,
        focus_width=width // 2,
        focus_heads=width // 128,
        repeats=4,
        focus=("sample", "locate", "attend", "mlp", "adjust"),
        refocus=("sample", "locate"),
        stages=True,
        width=width,
        depth=depth,
        num_heads=width // 64,
        mlp=4 * width,
        transition_norm=False,
        class_token=True,
        mixing_bias=False,
        deep_adjust=True,
        drop_adjust=False,
        padding="border",
        rank=128,
        out_points=32,
        activation="gelu_tanh",
        eps=1e-6,
        pixel_mean=pixels[0],
        pixel_std=pixels[1],
    )
    return shape._replace(**changes)


AUGREG = {"num_classes": 1000}
# OpenAI's, which their blocks are from.
CLIPS = {"activation": "quick_gelu", "eps": 1e-5}
MICRO = {"channels": 32, "focus_heads": 2, "num_heads": 4, "rank": 16}
SHAPES = {
    "v1_tiny": _v1(49, 256, 512, 8),
    "v1_small": _v1(64, 320, 640, 8),
    "v1_base": _v1(81, 384, 768, 10),
    "v2_augreg_b": _v2(48, 768, 8, HALF, **AUGREG),
    "v2_augreg_l": _v2(48, 1024, 16, HALF, **AUGREG),
    "v2_clip_b": _v2(48, 768, 8, CLIP, **CLIPS, projection=512),
    "v2_clip_l": _v2(63, 1024, 16, CLIP, **CLIPS, projection=768),
    "v2_vit_s14": _v2(48, 384, 8, IMAGENET, activation="gelu", layer_scale=1.0),
    "v1_micro": _v1(16, 64, 128, 3, **MICRO, points=16, out_points=16, num_classes=0),
    "v2_micro": _v2(16, 128, 3, HALF, **MICRO, points=9),
}


def named(size: str, changes: Mapping[str, Any]) -> tuple[Shape, int]:
    """The shape and the patch side that a size like "v1_tiny/16" names.

    Args:
      changes: Attributes of the shape to replace.

    Raises:
      ConfigError: no such name, no whole side, or no such attribute.
    """
    name, _, side = size.partition("/")
    if not side.isdecimal() or int(side) < 1:
        raise ConfigError(
            f"config.model.size={size!r}: write a name and the patch side of the data,"
            " as 'v1_tiny/16'"
        )
    if name not in SHAPES:
        raise ConfigError(f"config.model.size={size!r}: {nearest(name, SHAPES)}")
    for key in changes:
        if key not in Shape._fields:
            hint = nearest(key, Shape._fields)
            raise ConfigError(f"config.model.shape.{key} is unknown; {hint}")
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in changes.items()}
    shape = SHAPES[name]._replace(**values)
    if shape.latents < 1:
        raise ConfigError(
            f"config.model.shape.latents={shape.latents}: an image has one at least"
        )
    for width, heads in (
        ("focus_width", "focus_heads"),
        ("width", "num_heads"),
    ):
        if getattr(shape, width) % getattr(shape, heads):
            raise ConfigError(
                f"config.model.shape.{heads}={getattr(shape, heads)} does not divide "
                f"{width}={getattr(shape, width)}"
            )
    return shape, int(side)


def stem_macs(shape: Shape, h: int, w: int) -> int:
    """Multiply-adds of the convolution of a picture of h x w pixels."""
    return math.ceil(h / 2) * math.ceil(w / 2) * 7 * 7 * 3 * shape.channels


def token_macs(shape: Shape, count: int | float) -> int | float:
    """Multiply-adds of all but the convolution, of an image with so many tokens.

    Of matrix products; not of bilinear lookups, 4 C a point, and other elementwise
    work.
    """
    total = 0
    for width, operations, times in (
        (shape.focus_width, shape.focus, shape.repeats),
        (shape.width, shape.refocus, 1),
    ):
        total += (
            times
            * count
            * sum(_operation(shape, name, width, count) for name in operations)
        )
    total += count * (shape.focus_width + 3 * shape.glimpse**2) * shape.width
    tokens = count + shape.class_token
    D = shape.width
    block = 4 * D * D + 2 * D * shape.mlp + 2 * tokens * D
    total += shape.depth * tokens * block
    return total + D * (shape.num_classes + shape.projection)


def _operation(shape: Shape, name: str, width: int, count: int | float) -> int | float:
    C, S, R = shape.channels, shape.points, shape.out_points
    rank = shape.find_rank(width)
    mixing = rank * (width + C * C + R * S) + S * C * C + R * S * C + R * C * width
    return {
        "attend": 4 * width**2 + 2 * count * width,
        "mlp": 8 * width**2,
        "adjust": width * (width * shape.deep_adjust + 4),
        "sample": 2 * S * width + mixing,
        "locate": width**2,
    }[name]


def num_macs(name: str, side: int = 224, count: int | None = None) -> tuple[int, int]:
    """Multiply-adds of one forward pass of a name, with the stem and without.

    Args:
      side: Pixels of a square picture; only the stem's cost depends on it.
      count: Latent tokens, the class token not counted; None: as many as the name has.

    Raises:
      ConfigError: there is no such name.
    """
    shape = named(f"{name}/16", {})[0]
    tokens = int(token_macs(shape, shape.latents if count is None else count))
    return tokens + stem_macs(shape, side, side), tokens
