"""Writes our parameters as safetensors, in the naming of transformers where it can.

Names and axes are those of its `ViTModel`, `Dinov2Model`, `Dinov2WithRegistersModel`,
`CLIPVisionModelWithProjection` and `SiglipVisionModel`. A model with other parts than
all of these has, as a SparseFormer, keeps our own paths.
"""

import dataclasses
import json
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from navit_jax import config as config_lib
from navit_jax import paths
from navit_jax.models import MODELS, patch_size
from navit_jax.weights.axes import to_torch
from navit_jax.weights.layouts import HF_CLIP, HF_DINOV2, HF_SIGLIP, HF_VIT, Layout
from navit_jax.weights.reader import HEADS, LEAVES

ACTIVATIONS = {"gelu_tanh": "gelu_pytorch_tanh"}
TABLE = "position_embedding/table"


@dataclasses.dataclass(frozen=True)
class Kind:
    """A model of transformers.

    Attributes:
      layout: Its names.
      prefix: Before those of the encoder.
      lacks, may: Patterns of the layout's parameters, by our paths, that it has not,
        and that it need not have.
      square: Whether its grid of positions must be.
    """

    layout: Layout
    prefix: str = ""
    lacks: str = ""
    may: str = ""
    square: bool = False


VIT = r"head/.*|.*/(query|key|value)/bias"
# By `model_type`.
KINDS = {
    "vit": Kind(HF_VIT, lacks="registers", may=VIT),
    "dinov2": Kind(HF_DINOV2, lacks="registers", may=VIT),
    "dinov2_with_registers": Kind(HF_DINOV2, may=VIT),
    "clip_vision_model": Kind(
        HF_CLIP, "vision_model.", ".*(embedding|head)/bias", "image_head/.*", True
    ),
    "siglip_vision_model": Kind(
        HF_SIGLIP, "vision_model.", "pre_norm/.*|image_head/.*|class_token", "", True
    ),
}  # fmt: skip


def write(
    folder: pathlib.Path, model: Mapping[str, Any], params: Mapping[str, Any]
) -> str:
    """Writes `model.safetensors` and `config.json`, which `read` reads again.

    Args:
      model: The section `model` of the config.
      params: `encoder`, and a head.

    Returns:
      The kind of model that transformers reads it as; "" if it does not.
    """
    import safetensors.numpy

    leaves = {k: np.asarray(v, np.float32) for k, v in paths.flatten(params).items()}
    name, tensors = find_kind(model, leaves), leaves
    described: dict[str, Any] = {}
    if name:
        tensors = name_tensors(KINDS[name], leaves)
        described = describe(name, model, leaves)
    tensors = {k: np.ascontiguousarray(value) for k, value in tensors.items()}
    described["navit_jax"] = dict(model)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "model.safetensors"
    # Not by its `save_file`, whose files nobody else may read.
    path.write_bytes(safetensors.numpy.save(tensors, {"format": "pt"}))
    (folder / "config.json").write_text(json.dumps(described, indent=2) + "\n")
    return name


def find_kind(model: Mapping[str, Any], leaves: Mapping[str, np.ndarray]) -> str:
    """The kind of KINDS that has just these parameters; "" if there is none."""
    table = leaves.get(f"encoder/{TABLE}")
    if table is None or model.get("positions", {}).get("name") != "learned_1d":
        return ""
    given = {name.removeprefix("encoder/") for name in leaves} - {TABLE}
    for name, kind in KINDS.items():
        asked = {"class_token"}
        for module, (_, how) in kind.layout.parts.items():
            suffixes = LEAVES.get(how, LEAVES["module"])
            asked |= {f"{module}/{leaf}".rstrip("/") for leaf in suffixes}
        asked = {each for each in asked if not re.fullmatch(kind.lacks, each)}
        needed = {each for each in asked if not re.fullmatch(kind.may, each)}
        square = table.shape[0] == table.shape[1] or not kind.square
        if needed <= given <= asked and square:
            return name
    return ""


def name_tensors(kind: Kind, leaves: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Our parameters by the names of a kind, with its axes."""
    layout, parts = kind.layout, kind.layout.parts
    tensors: dict[str, np.ndarray] = {}
    fused: dict[str, dict[str, np.ndarray]] = {}
    for path, value in leaves.items():
        ours = path.removeprefix("encoder/")
        module, _, last = ours.rpartition("/")
        if ours == "class_token":
            name = kind.prefix + layout.class_token
            tensors[name] = value[0] if kind.prefix else value[None]
            continue
        if ours == TABLE:
            table = value.reshape(-1, value.shape[-1])
            if "encoder/class_token" in leaves:
                # What the class token's place has was added to the token itself.
                table = np.concatenate([np.zeros_like(table[:1]), table])
            name = kind.prefix + layout.positions
            tensors[name] = table if kind.prefix else table[None]
            continue
        theirs, how = parts.get(ours, parts.get(module, ("", "")))
        how, _, part = how.partition(" ")
        suffix = {"bias": "bias"}.get(last, "weight")
        name = theirs
        if how not in ("plain", "rows"):
            name += suffix if theirs.endswith("_") else f".{suffix}"
        if module.split("/")[0] not in HEADS:
            name = kind.prefix + name
        if part:
            fused.setdefault(name, {})[part] = to_torch(value, how, last == "kernel")
            continue
        for i, array in enumerate(value if "{}" in name else [value]):
            tensors[name.format(i)] = to_torch(array, how, last == "kernel")
    for name, thirds in fused.items():
        tensors[name] = np.concatenate([thirds[part] for part in sorted(thirds)])
    return tensors


def describe(
    name: str, model: Mapping[str, Any], leaves: Mapping[str, np.ndarray]
) -> dict[str, Any]:
    """What transformers reads of `config.json`."""
    encoder = config_lib.build(model, MODELS, "model")
    spec, side = encoder.spec, patch_size(model["size"])
    ratio = spec.mlp / spec.width
    rows, columns, _ = leaves[f"encoder/{TABLE}"].shape
    described = {
        "model_type": name,
        "hidden_size": spec.width,
        "num_hidden_layers": spec.depth,
        "num_attention_heads": spec.num_heads,
        "intermediate_size": spec.mlp,
        # transformers takes no 4.0.
        "mlp_ratio": ratio if spec.mlp % spec.width else int(ratio),
        "patch_size": side,
        "image_size": rows * side if rows == columns else [rows * side, columns * side],
        "hidden_act": ACTIVATIONS.get(encoder.activation, encoder.activation),
        "layer_norm_eps": encoder.eps,
        "qkv_bias": encoder.bias_qkv,
    }
    if encoder.registers:
        described["num_register_tokens"] = encoder.registers
    if "image_head/kernel" in leaves:
        described["projection_dim"] = leaves["image_head/kernel"].shape[-1]
    return described
