"""Sizes of vision transformers by one string, `"B/16"`: a name and a patch side.

The shapes are those of ViT and of the scaling papers after it (Zhai et al. 2022;
Alabdulmohsin et al. 2023); the NaViT paper itself uses B/32, B/16, L/16 and L/14. A
tower of texts has the name alone, `"B"`.
"""

from typing import Any, NamedTuple

from navit_jax.config import nearest
from navit_jax.errors import ConfigError


class Spec(NamedTuple):
    """The shape of an encoder.

    Attributes:
      width: D.
      depth: Number of blocks.
      num_heads: H.
      mlp: Hidden width of a block's MLP.
    """

    width: int
    depth: int
    num_heads: int
    mlp: int


SIZES = {
    "Ti": Spec(192, 12, 3, 768),
    "S": Spec(384, 12, 6, 1536),
    "M": Spec(512, 12, 8, 2048),
    "B": Spec(768, 12, 12, 3072),
    "L": Spec(1024, 24, 16, 4096),
    "So400m": Spec(1152, 27, 16, 4304),
    "H": Spec(1280, 32, 16, 5120),
    "g": Spec(1408, 40, 16, 6144),
}


def spec(size: str) -> Spec:
    """The shape that a size like `"B/16"` names.

    Raises:
      ConfigError: the name is not in `SIZES`, or the patch side is no whole number.
    """
    name, _ = _split(size)
    if name not in SIZES:
        raise ConfigError(f"config.model.size={size!r}: {nearest(name, SIZES)}")
    return SIZES[name]


def patch_size(size: str) -> int:
    """The side of a patch in pixels, 16 for `"B/16"`, whatever the name.

    Raises:
      ConfigError: it is no whole number.
    """
    return _split(size)[1]


def named(name: str, where: str) -> Spec:
    """The shape that a name like `"B"` stands for.

    Args:
      where: The field of the config that has it, for messages.

    Raises:
      ConfigError: the name is not in `SIZES`.
    """
    if name not in SIZES:
        raise ConfigError(f"config.{where}={name!r}: {nearest(name, SIZES)}")
    return SIZES[name]


def replace(spec: Spec, tower: Any, where: str) -> Spec:
    """The shape, with what the attributes of a tower say in place of it.

    Args:
      where: The section of the config that the tower is of, for messages.

    Raises:
      ConfigError: a width that its heads do not divide.
    """
    replaced = {name: getattr(tower, name) for name in Spec._fields}
    spec = spec._replace(**{k: v for k, v in replaced.items() if v is not None})
    if spec.width % (2 * spec.num_heads):
        raise ConfigError(
            f"config.{where}.num_heads={spec.num_heads}: the width {spec.width} must"
            " divide into heads of an even width"
        )
    return spec


def _split(size: str) -> tuple[str, int]:
    name, _, side = size.partition("/")
    if not side.isdecimal() or int(side) < 1:
        raise ConfigError(
            f"config.model.size={size!r}: write a name and a patch side, as 'B/16'"
        )
    return name, int(side)
