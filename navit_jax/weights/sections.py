"""The section `model` of a config that a file of weights asks for."""

import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from navit_jax import config as config_lib
from navit_jax import paths
from navit_jax.errors import ConfigError
from navit_jax.models import MODELS, patch_size
from navit_jax.models.choices import pick
from navit_jax.models.layers import ACTIVATIONS
from navit_jax.models.sizes import SIZES, Spec
from navit_jax.weights.layouts import CLIP, Layout

# As transformers names them.
NAMES = {
    "gelu": "gelu",
    "quick_gelu": "quick_gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu_tanh": "gelu_tanh",
}
# What timm's names say: of `vision_transformer.py`, the last that applies.
ARCHITECTURES: tuple[tuple[str, dict[str, Any]], ...] = (
    (r"^vit_", {"activation": "gelu"}),
    (r"_clip_", {"eps": 1e-5}),
    (r"_quickgelu_", {"activation": "quick_gelu"}),
    (
        r"_(so400m|giantopt)_patch16_siglip|_patch32_siglip"
        r"|_large_patch16_siglip(_gap)?_512",
        {"activation": "gelu_tanh"},
    ),
    (r"_(huge|giant|gigantic|so400m|giantopt)_|_base_patch16_gap_", {"num_heads": 16}),
    (r"_giant_.*(dinov2|tips)", {"num_heads": 24}),
)
# Those of timm's and open_clip's giants that `models.sizes` does not name.
GIANTS = (
    Spec(1664, 48, 16, 8192),
    Spec(1536, 40, 16, 6144),
    Spec(1792, 56, 16, 15360),
)


def find_heads(config: Mapping[str, Any], width: int) -> int | None:
    """The number of heads that a config says; None: it does not.

    Args:
      config: What is beside the file, the section of the tower at the root.
    """
    for name in ("num_heads", "num_attention_heads"):
        if config.get(name):
            return int(config[name])
    vision = config.get("model_cfg", {}).get("vision_cfg", {})
    if "width" in vision and not vision.get("timm_model_name"):
        # open_clip's own default.
        return width // vision.get("head_width", 64)
    return _read_architecture(config).get("num_heads")


def guess_heads(width: int, depth: int, hidden: int) -> int:
    """The heads of the named size with this shape; else of 64 each."""
    for spec in (*SIZES.values(), *GIANTS):
        if (spec.width, spec.depth, spec.mlp) == (width, depth, hidden):
            return spec.num_heads
    return max(width // 64, 1)


def infer(
    found: Mapping[str, np.ndarray],
    layout: Layout,
    config: Mapping[str, Any],
    replace: Mapping[str, Any],
    guessed: bool,
) -> tuple[dict[str, Any], list[str]]:
    """The section, and which of its attributes are assumed.

    Args:
      found: The parameters by our paths.
      config: What is beside the file.
      replace: Attributes that are given.
      guessed: Whether the number of heads is.
    """
    if "navit_jax" in config:
        return {**config["navit_jax"], **replace}, []
    encoder = {k.removeprefix("encoder/"): v for k, v in found.items()}
    said = read_said(config, "vision_config")
    values = dict(layout.assumed)
    if "norm_pre" in str(layout.parts) and "pre_norm/scale" in encoder:
        # timm's CLIP.
        values |= {"eps": 1e-5, **CLIP}
    if "registers" in encoder and values["filter"] == "bicubic":
        # transformers and the authors smooth for DINOv2 with registers, and only there.
        values["filter"] = "bicubic_antialias"
    assumed = [name for name in values if name not in said]
    values |= said
    rows, columns, _ = encoder["position_embedding/table"].shape
    section: dict[str, Any] = {
        "name": "navit",
        **_size(encoder),
        "positions": {
            "name": "learned_1d",
            "side": rows,
            **({"columns": columns} if rows != columns else {}),
            "length": max(64, rows, columns),
            "filter": values["filter"],
        },
        "pooling": "mean",
        "bias_qkv": "blocks/attention/query/bias" in encoder,
        "bias_ln": "blocks/norm_1/bias" in encoder,
        "bias_mlp": "blocks/mlp/up/bias" in encoder,
        "bias_patch": "patch_embedding/bias" in encoder,
        "class_token": "class_token" in encoder,
        "registers": len(encoder.get("registers", ())),
        "pre_norm": "pre_norm/scale" in encoder,
        "qk_norm": "blocks/attention/query_norm/scale" in encoder,
        "activation": values["activation"],
        "eps": values["eps"],
        "layer_scale": 1.0 if "blocks/layer_scale_1" in encoder else 0.0,
        "pixel_mean": list(values["mean"]),
        "pixel_std": list(values["std"]),
    }
    if "pool/probe" in encoder:
        section["pooling"] = "map"
    elif section["class_token"]:
        section["pooling"] = "class"
    names = {"mean": "pixel_mean", "std": "pixel_std", "filter": "positions"}
    assumed = [names.get(name, name) for name in assumed]
    if guessed:
        section["num_heads"] = encoder["blocks/attention/query/kernel"].shape[-2]
        assumed.insert(0, "num_heads")
    return {**section, **replace}, [name for name in assumed if name not in replace]


def check_shapes(
    model: Mapping[str, Any], encoder: Mapping[str, Any], path: str
) -> None:
    """Compares parameters with those that the section asks for.

    Raises:
      ConfigError: one is missing, of another shape, or unknown to the model.
    """
    module = config_lib.build(model, MODELS, "model")
    P = 3 * patch_size(model["size"]) ** 2
    zeros = jnp.zeros((1, 1), jnp.int32)
    wanted = jax.eval_shape(
        module.init,
        jax.random.key(0),
        jnp.zeros((1, 1, P), jnp.uint8),
        zeros[..., None].repeat(2, -1),
        zeros + 1,
        zeros[..., None].repeat(2, -1) + 1,
    )["params"]
    compare_shapes(wanted, encoder, path)


def compare_shapes(wanted: Any, found: Any, path: str) -> None:
    """Raises ConfigError if a parameter found is not as wanted, see `check_shapes`."""
    asked = {name: leaf.shape for name, leaf in paths.flatten(wanted).items()}
    given = {name: leaf.shape for name, leaf in paths.flatten(found).items()}
    wrong = [
        f"{name}: the model has {asked.get(name, 'none')}, the file "
        f"{given.get(name, 'none')}"
        for name in sorted(asked.keys() | given.keys())
        if asked.get(name) != given.get(name)
    ]
    if wrong:
        raise ConfigError(
            f"{path} is of a model that is not ours:\n" + "\n".join(wrong)
        )


def _size(encoder: Mapping[str, np.ndarray]) -> dict[str, Any]:
    side = round((len(encoder["patch_embedding/kernel"]) / 3) ** 0.5)
    depth, width, num_heads, _ = encoder["blocks/attention/query/kernel"].shape
    spec = Spec(width, depth, num_heads, encoder["blocks/mlp/up/kernel"].shape[-1])
    for name, each in SIZES.items():
        if each == spec:
            return {"size": f"{name}/{side}"}
    return {"size": f"S/{side}", **spec._asdict()}


def read_said(config: Mapping[str, Any], part: str) -> dict[str, Any]:
    """What the configs of transformers, timm and open_clip say.

    Args:
      part: The section of transformers' config that says it of this tower.
    """
    opened = config.get("model_cfg", {})
    tower = opened.get(part.replace("config", "cfg"), {})
    images = part == "vision_config"
    config = {**config, **config.get(part, {})}
    said: dict[str, Any] = {}
    if act := config.get("hidden_act"):
        said["activation"] = pick("hidden_act", act, NAMES)
    if "layer_norm_eps" in config:
        said["eps"] = config["layer_norm_eps"]
    if config.get("model_type") == "siglip_vision_model":
        said["filter"] = "bicubic"
    if opened:
        said["activation"] = "quick_gelu" if opened.get("quick_gelu") else "gelu"
        if tower.get("act_kwargs", {}).get("approximate") == "tanh":
            said["activation"] = "gelu_tanh"
        if "eps" in tower.get("norm_kwargs", {}):
            said["eps"] = tower["norm_kwargs"]["eps"]
    if images:
        said |= _read_architecture(config)
    pictures = config.get("pretrained_cfg") or config.get("preprocess_cfg") or config
    for ours in ("mean", "std"):
        for theirs in (f"image_{ours}", ours):
            if theirs in pictures:
                said[ours] = tuple(pictures[theirs])
    assert said.get("activation", "gelu") in ACTIVATIONS
    return said


def _read_architecture(config: Mapping[str, Any]) -> dict[str, Any]:
    """What timm's name of a model says, and what a config of timm has in its place."""
    vision = config.get("model_cfg", {}).get("vision_cfg", {})
    name = str(vision.get("timm_model_name") or config.get("architecture", ""))
    said: dict[str, Any] = {}
    for pattern, attributes in ARCHITECTURES:
        if name.startswith("vit_") and re.search(pattern, name):
            said |= attributes
    given = config.get("model_args", {})
    if isinstance(given.get("act_layer"), str):
        said["activation"] = pick("model_args.act_layer", given["act_layer"], NAMES)
    return said | {k: v for k, v in given.items() if k == "num_heads"}
