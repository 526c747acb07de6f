"""Writes our parameters as safetensors in the naming of transformers.

Names and axes are those of its `Dinov2Model`, `Dinov2WithRegistersModel` and `ViTModel`
where the model has the parts of those; what they have not keeps our path, with dots.
"""

import json
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from navit_jax import config as config_lib
from navit_jax import paths
from navit_jax.models import MODELS, patch_size
from navit_jax.weights.axes import to_torch
from navit_jax.weights.layouts import HF_DINOV2, HF_VIT, Layout

ACTIVATIONS = {"gelu_tanh": "gelu_pytorch_tanh"}


def write(
    folder: pathlib.Path, model: Mapping[str, Any], params: Mapping[str, Any]
) -> None:
    """Writes `model.safetensors` and `config.json`, which `read` reads again.

    Args:
      model: The section `model` of the config.
      params: `encoder`, and a head.
    """
    import safetensors.numpy

    layout = HF_DINOV2 if model.get("layer_scale") else HF_VIT
    tensors = name_tensors(layout, params)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "model.safetensors"
    safetensors.numpy.save_file(tensors, str(path), {"format": "pt"})
    described = describe(model, params)
    (folder / "config.json").write_text(json.dumps(described, indent=2) + "\n")


def name_tensors(layout: Layout, params: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The tensors of our parameters by the names of a layout of torch."""
    tensors: dict[str, np.ndarray] = {}
    parts = layout.parts
    for path, leaf in paths.flatten(params).items():
        value = np.asarray(leaf, np.float32)
        ours = path.removeprefix("encoder/")
        module, _, last = ours.rpartition("/")
        theirs, how = parts.get(ours, parts.get(module, ("", "")))
        if ours == "class_token":
            tensors[layout.class_token] = value[None]
        elif ours == "position_embedding/table":
            table = value.reshape(1, -1, value.shape[-1])
            if "class_token" in params["encoder"]:
                # What the class token's place has was added to the token itself.
                table = np.concatenate([np.zeros_like(table[:, :1]), table], 1)
            tensors[layout.positions] = table
        elif not theirs:
            tensors[ours.replace("/", ".")] = value
        else:
            suffix = {"kernel": ".weight", "scale": ".weight", "bias": ".bias"}
            name = theirs + (
                suffix.get(last, "") if how not in ("plain", "rows") else ""
            )
            each = value if "{}" in name else [value]
            for i, array in enumerate(each):
                tensors[name.format(i)] = to_torch(array, how, last == "kernel")
    return {name: np.ascontiguousarray(value) for name, value in tensors.items()}


def describe(model: Mapping[str, Any], params: Mapping[str, Any]) -> dict[str, Any]:
    """`config.json`: what transformers reads, and our section as it is."""
    encoder = config_lib.build(model, MODELS, "model")
    spec, side = encoder.spec, patch_size(model["size"])
    scaled, registers = encoder.layer_scale, encoder.registers
    ratio = spec.mlp / spec.width
    kind = "vit" if not scaled else "dinov2"
    described = {
        "model_type": f"{kind}_with_registers" if registers else kind,
        "hidden_size": spec.width,
        "num_hidden_layers": spec.depth,
        "num_attention_heads": spec.num_heads,
        "intermediate_size": spec.mlp,
        # transformers takes no 4.0.
        "mlp_ratio": ratio if spec.mlp % spec.width else int(ratio),
        "patch_size": side,
        "hidden_act": ACTIVATIONS.get(encoder.activation, encoder.activation),
        "layer_norm_eps": encoder.eps,
        "qkv_bias": encoder.bias_qkv,
        "navit_jax": dict(model),
    }
    if registers:
        described["num_register_tokens"] = registers
    table = params["encoder"].get("position_embedding", {}).get("table")
    if table is not None and table.ndim == 3:
        described["image_size"] = [each * side for each in table.shape[:2]]
        if table.shape[0] == table.shape[1]:
            described["image_size"] = table.shape[0] * side
    return described
