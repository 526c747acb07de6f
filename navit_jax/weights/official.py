"""Names of the published SparseFormer checkpoints, in each of their three spellings.

The library's (`sparseformer_*_converted`), those of the first version's training code,
and those of the bootstrapped ones before they were converted.
"""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from navit_jax.models.sparseformer_sizes import CLIP, HALF, SHAPES, Shape
from navit_jax.weights.files import Tensors
from navit_jax.weights.layouts import TIMM, Layout


def _unit(theirs: str, ours: str) -> dict[str, tuple[str, str]]:
    """A focusing unit of the official SparseFormer."""
    names = {
        "norm_1": ("norm1", "norm"),
        "attention/query": ("attn.qkv", "heads 0/3"),
        "attention/key": ("attn.qkv", "heads 1/3"),
        "attention/value": ("attn.qkv", "heads 2/3"),
        "attention/out": ("attn.proj", "merge"),
        "norm_2": ("norm2", "norm"),
        "mlp/up": ("mlp.fc1", "linear"),
        "mlp/down": ("mlp.fc2", "linear"),
        "adjustment_norm": ("roi_adjust_module.0", "norm"),
        "adjustment_hidden": ("roi_adjust_module.hidden", "linear"),
        "adjustment": ("roi_adjust_module.last", "linear"),
        "grid": ("roi_offset_bias", "pairs"),
        "sampling_norm": ("roi_offset_module.0", "norm"),
        "sampling": ("roi_offset_module.1", "linear"),
        "mixing_norm": ("adaptive_mixing.parameter_generator.0", "norm"),
        "down": ("adaptive_mixing.parameter_generator.1", "linear"),
        "generator": ("adaptive_mixing.parameter_generator.2", "linear"),
        "channel_bias": ("adaptive_mixing.m_beta", "plain"),
        "point_bias": ("adaptive_mixing.s_beta", "plain"),
        "mixed": ("adaptive_mixing.out_proj", "linear"),
        "position_norm": ("pe_transition.0", "norm"),
        "position": ("pe_transition.1", "linear"),
    }
    return {f"{ours}/{k}": (f"{theirs}.{v}", how) for k, (v, how) in names.items()}


# After `rename`.
SPARSEFORMER = Layout(
    parts={
        "stem/conv": ("feat_extractor.conv1", "window"),
        "tables/embedding": ("initial_embedding.weight", "rows"),
        "tables/rois": ("initial_roi.weight", "rows"),
        "stages": ("layers.0.stage_embedding.weight", "rows"),
        **_unit("layers.0", "focusing"),
        "transition": ("layers.1.0", "linear"),
        "transition_norm": ("layers.1.1", "norm"),
        **_unit("layers.2", "refocusing"),
        "class_token": ("cls_embedding.weight", "rows"),
        **{k: v for k, v in TIMM.parts.items() if k.startswith("blocks/")},
        "norm": ("norm", "norm"),
        "head/dense": ("proj", "linear"),
    },
    class_token="",
    positions="",
    assumed={},
    signs=("layers.0.adaptive_mixing.out_proj.weight",),
)

# (before, in the library), each part of a name at most once.
SPELLINGS = (
    (r"tuo_proj", "out_proj"),
    (r"^token_roi\.weight", "initial_roi.weight"),
    (r"^token_embedding\.weight", "initial_embedding.weight"),
    (r"^global_embedding", "cls_embedding"),
    (r"\bffn\.0\.", "norm2."),
    (r"\bffn\.1\.", "mlp.fc1."),
    (r"\bffn\.3\.", "mlp.fc2."),
    (r"\bln_attn\.", "norm1."),
    (r"\battn\.in_proj_", "attn.qkv."),
    (r"\battn\.out_proj\.", "attn.proj."),
    (r"^(head\.norm|ln_post)\.", "norm."),
    (r"^(head\.classifier|cls_head)\.", "proj."),
)
SIGN = "adaptive_mixing.out_proj.weight"
# Layers before the plain blocks: the focusing unit, the transition, the second unit.
UNITS = 3


def rename(tensors: Tensors) -> Tensors:
    """The tensors of a SparseFormer by the names of `SPARSEFORMER`.

    Files of anything else come back as they are.
    """
    if not any(SIGN in _spell(name) for name in tensors):
        return tensors
    found = {_spell(name): value for name, value in tensors.items()}
    centres = found.pop("token_roi_cc.weight", None)
    if centres is not None:
        half = found.pop("token_roi_wh.weight") / 2
        corners = np.concatenate([centres - half, centres + half], 1)
        found["initial_roi.weight"] = corners
        # Of a box of the class token, which looks at nothing.
        found.pop("global_roi.weight", None)
    renamed = {_number(name, found): value for name, value in found.items()}
    if not _first_version(renamed) and STAGES not in renamed:
        # The public converter leaves it out; a random one would be worse than none.
        width = renamed["initial_embedding.weight"].shape[-1]
        renamed[STAGES] = np.zeros((4, width), np.float32)
    return renamed


STAGES = "layers.0.stage_embedding.weight"


def num_heads(tensors: Tensors) -> int:
    """64 of a first version; else 0, of 64 each."""
    return 64 if _first_version(tensors) else 0


def infer(
    found: Mapping[str, np.ndarray], replace: Mapping[str, Any]
) -> tuple[dict[str, Any], list[str]]:
    """The section `model`, and what of it is assumed.

    That of the published name that differs in the fewest attributes.
    """
    encoder = {k.removeprefix("encoder/"): v for k, v in found.items()}
    first = "focusing/channel_bias" in encoder
    said: dict[str, Any] = {
        "latents": len(encoder["tables/rois"]),
        "shared": len(encoder["tables/embedding"]) == 1,
        "channels": encoder["stem/conv/kernel"].shape[-1],
        "points": len(encoder["focusing/grid"]),
        "focus_width": encoder["tables/embedding"].shape[-1],
        "focus_heads": encoder["focusing/attention/query/kernel"].shape[-2],
        "width": len(encoder["norm/scale"]),
        "depth": len(encoder["blocks/norm_1/scale"]),
        "num_heads": encoder["blocks/attention/query/kernel"].shape[-2],
        "mlp": encoder["blocks/mlp/up/kernel"].shape[-1],
        "mixing_bias": first,
        "transition_norm": "transition_norm/scale" in encoder,
        "class_token": "class_token" in encoder,
        "deep_adjust": "focusing/adjustment_hidden/kernel" in encoder,
        "projection": encoder.get("projection/kernel", np.zeros((0, 0))).shape[-1],
    }
    mixing = encoder["focusing/generator/kernel"].shape[-1] - said["channels"] ** 2
    said["out_points"] = mixing // said["points"]
    # 0: a quarter of each unit's width.
    said["rank"] = 0 if first else len(encoder["focusing/generator/kernel"])
    if not first:
        # As the library runs them: every layer norm of torch's default, exact GELU.
        said["eps"] = 1e-5
        said["activation"] = "quick_gelu" if said["projection"] else "gelu"
        said["repeats"] = len(encoder["stages"])
        pixels = CLIP if said["projection"] else HALF
        said |= {"pixel_mean": pixels[0], "pixel_std": pixels[1]}
    changes = {name: _changes(shape, said) for name, shape in SHAPES.items()}
    name = min(changes, key=lambda each: len(changes[each]))
    section = {"name": "sparseformer", "size": f"{name}/16", **replace}
    if changes[name]:
        section["shape"] = {**changes[name], **dict(replace.get("shape", {}))}
    return section, []


def _changes(shape: Shape, said: Mapping[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in said.items() if getattr(shape, k) != v}


def _first_version(tensors: Tensors) -> bool:
    return "layers.0.adaptive_mixing.m_beta" in tensors


def _spell(name: str) -> str:
    name = re.sub(r"^(model|module)\.", "", name)
    for pattern, replacement in SPELLINGS:
        name = re.sub(pattern, replacement, name)
    return name


def _number(name: str, tensors: Tensors) -> str:
    """Gives plain blocks their own number, and the layers that move boxes a name."""
    if match := re.match(r"layers\.(\d+)\.(.*)", name):
        layer, rest = int(match[1]), match[2]
        if layer >= UNITS:
            return f"blocks.{layer - UNITS}.{rest}"
    moves = "roi_adjust_module"
    if f"{moves}.3." in name or f"{moves}.1." in name:
        deep = name.replace(f"{moves}.1.", f"{moves}.3.").removesuffix("bias")
        deep = deep.removesuffix("weight") + "weight" in tensors
        hidden = deep and f"{moves}.1." in name
        last = "hidden" if hidden else "last"
        return re.sub(rf"{moves}\.[13]\.", f"{moves}.{last}.", name)
    return name
