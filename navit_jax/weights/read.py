"""From a file of a vision transformer to our section `model` and its parameters."""

import dataclasses
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

from navit_jax import paths
from navit_jax.errors import ConfigError
from navit_jax.initialise import Origin
from navit_jax.weights import flax_layouts, layouts, official, texts
from navit_jax.weights.files import Tensors, read_config, read_tensors
from navit_jax.weights.reader import Reader
from navit_jax.weights.sections import check_shapes, infer

# The first whose signs a file has; so the more particular come first.
LAYOUTS: dict[str, layouts.Layout] = {
    "sparseformer": official.SPARSEFORMER,
    "augreg": flax_layouts.AUGREG,
    "big_vision": flax_layouts.BIG_VISION,
    "dinov2": layouts.DINOV2,
    "timm": layouts.TIMM,
    "hf_dinov2": layouts.HF_DINOV2,
    "hf_vit": layouts.HF_VIT,
    "hf_siglip": layouts.HF_SIGLIP,
    "hf_clip": layouts.HF_CLIP,
    "openai_clip": layouts.OPENAI,
}


@dataclasses.dataclass(frozen=True)
class Weights:
    """What a file holds.

    Attributes:
      layout: Of LAYOUTS, or "navit_jax" for our own names.
      model: The section `model` that builds the encoder.
      params: `encoder`, and `head` or `image_head` where the file has one; of CLIP's
        texts `text`, `text_head`, `log_scale`.
      origins: Where each parameter comes from, and what is left over; print it with
        `initialise.format_table`.
      assumed: Attributes of the model that the file does not say.
      text: The section `task.text` that builds CLIP's tower of texts; {} without one.
    """

    layout: str
    model: dict[str, Any]
    params: dict[str, Any]
    origins: list[Origin]
    assumed: list[str]
    text: dict[str, Any]


def read(
    path: str | pathlib.Path,
    grid: Sequence[int] | None = None,
    allow_unused: Sequence[str] = (),
    **replace: Any,
) -> Weights:
    """Reads a file, or a folder as `save_pretrained` writes it.

    Args:
      grid: Rows and columns of the grid of positions; None: as `config.json` beside it
        says, or a square.
      allow_unused: Patterns of tensors of the encoder that may be left over. What is
        outside of it, as a tower of other texts than CLIP's, always may.
      replace: Attributes of the model in place of what is found or assumed, as
        `activation="gelu"`, which then is that of the texts too.

    Raises:
      ConfigError: the file can not be read, or is of no known layout; a tensor of the
        encoder is left over, or missing.
    """
    path = pathlib.Path(path).expanduser()
    tensors = official.rename(_unstack(read_tensors(path)))
    config = read_config(path)
    if OWN in tensors:
        return _take_own(tensors, config, replace, str(path))
    name, prefix = find_layout(tensors, str(path))
    layout = LAYOUTS[name]
    own = config | config.get("vision_config", {}) | replace
    reader = Reader(tensors, layout, prefix, own)
    found = reader.collect(grid)
    if name == "sparseformer":
        model, assumed = official.infer(found, replace)
    else:
        model, assumed = infer(found, layout, config, replace, reader.guessed)
    beside = tensors, config, replace, allow_unused, str(path)
    text, more = texts.take(reader, *beside)
    reader.record_unused()
    reader.refuse_unused(allow_unused, str(path))
    params = {**paths.nest(found), **more}
    check_shapes(model, params["encoder"], str(path))
    return Weights(name, model, params, reader.origins, assumed, text)


# A sign of our own paths, which `write` uses for what transformers has not.
OWN = "encoder/blocks/norm_1/scale"


def _take_own(
    tensors: Tensors, config: Mapping[str, Any], replace: Mapping[str, Any], path: str
) -> Weights:
    if "navit_jax" not in config:
        raise ConfigError(
            f"{path}: the config.json that was written with it is missing"
        )
    model, params = {**config["navit_jax"], **replace}, paths.nest(tensors)
    check_shapes(model, params["encoder"], path)
    shapes = {name: tuple(value.shape) for name, value in tensors.items()}
    origins = [
        Origin(k, "loaded", f"{k} {shape}", shape) for k, shape in shapes.items()
    ]
    return Weights("navit_jax", model, params, origins, [], {})


def find_layout(tensors: Tensors, path: str) -> tuple[str, str]:
    """The layout of a file, and the prefix of all names of its encoder.

    Raises:
      ConfigError: it is none of LAYOUTS.
    """
    for name, layout in LAYOUTS.items():
        prefix = layouts.find_prefix(layout, tensors)
        if prefix is not None:
            return name, prefix
    some = ", ".join(list(tensors)[:5])
    raise ConfigError(
        f"{path}: its names ({some}, ...) are of none of the layouts "
        f"{', '.join(LAYOUTS)}"
    )


def _unstack(tensors: Tensors) -> Tensors:
    """Gives each of the blocks that are stacked on axis 0 a name of its own."""
    pattern = re.compile(r"(.*Transformer/encoderblock)/(.*)")
    flat: Tensors = {}
    for name, value in tensors.items():
        if match := pattern.fullmatch(name):
            for i, each in enumerate(value):
                flat[f"{match[1]}_{i}/{match[2]}"] = each
        else:
            flat[name] = value
    return flat
