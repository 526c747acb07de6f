"""How libraries of torch name the parameters of a ViT: one table a library.

A table gives for each of our modules theirs, and how their axes lie:

| how | weight | ours |
|---|---|---|
| `patches` | [D 3 p p], flax [p p 3 D], or [D P] | [P D], P = p p 3 channels last |
| `linear` | [out in], flax [in out] | [in out] |
| `heads` | [D D], flax [D H K] | [D H K] |
| `heads 1/3` | [3D D], and the second third of it is meant | [D H K] |
| `merge` | [D D], flax [H K D] | [H K D] |
| `norm` | [D] | [D], named scale |
| `plain` | the name is of a tensor, not of a module | [D] |
| `rows` | the same, [.. D] | [S D] |
| `table` | the same, [.. D] | [1 S D] |
| `pairs` | the same, [2 S] | [S 2] |
| `window` | [out in h w] | [h w in out] |

`{}` is the number of a block. Names: timm 1.0 `vision_transformer.py`, transformers 5
as it saves, open_clip 3 `transformer.py`.
"""

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any

HALF = (0.5, 0.5, 0.5)
IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
CLIP = {
    "mean": (0.48145466, 0.4578275, 0.40821073),
    "std": (0.26862954, 0.26130258, 0.27577711),
}


@dataclasses.dataclass(frozen=True)
class Layout:
    """The names of one library.

    Attributes:
      parts: Our module (or parameter) -> theirs, and how.
      class_token, positions: Names of these tensors; positions of the class token, if
        any, are first in the table. "" where both are parts like the others.
      assumed: What a file of tensors does not say of the model, as attributes of NaViT
        but for `mean`, `std` and `filter`.
      signs: Names that a file of this library has after some prefix.
      flax: Whether kernels lie as flax has them, and names are joined with "/".
      ignored: Patterns of names within the encoder that change nothing in what we do.
      root: Of our parameters; parts that are in HEADS are beside it.
    """

    parts: Mapping[str, tuple[str, str]]
    class_token: str
    positions: str
    assumed: Mapping[str, Any]
    signs: tuple[str, ...]
    flax: bool = False
    ignored: tuple[str, ...] = ()
    root: str = "encoder"


def find_prefix(layout: Layout, names: Collection[str]) -> str | None:
    """What stands before the names of a layout in a file; None if it is another."""
    first, *others = layout.signs
    prefixes = [name.removesuffix(first) for name in names if name.endswith(first)]
    for prefix in sorted(prefixes):
        whole = prefix == "" or prefix[-1] in "./"
        if whole and all(prefix + other in names for other in others):
            return prefix
    return None


def _blocks(prefix: str, parts: Mapping[str, tuple[str, str]]) -> dict[str, Any]:
    return {f"blocks/{k}": (f"{prefix}{v}", how) for k, (v, how) in parts.items()}


def _hugging_face(block: Mapping[str, tuple[str, str]], sign: str, **assumed) -> Layout:
    attention = "attention.attention"
    shared = {
        "attention/query": (f"{attention}.query", "heads"),
        "attention/key": (f"{attention}.key", "heads"),
        "attention/value": (f"{attention}.value", "heads"),
        "attention/out": ("attention.output.dense", "merge"),
    }
    return Layout(
        parts={
            "patch_embedding": ("embeddings.patch_embeddings.projection", "patches"),
            "registers": ("embeddings.register_tokens", "rows"),
            **_blocks("encoder.layer.{}.", {**shared, **block}),
            "norm": ("layernorm", "norm"),
            "head/dense": ("classifier", "linear"),
        },
        class_token="embeddings.cls_token",
        positions="embeddings.position_embeddings",
        assumed={"activation": "gelu", "filter": "bicubic", **assumed},
        signs=(f"encoder.layer.0.{sign}",),
        # The token of masked pre-training, and a layer after the class token that the
        # library's own classifier does not use.
        ignored=(r"embeddings\.mask_token", r"pooler\..*"),
    )


TIMM = Layout(
    parts={
        "patch_embedding": ("patch_embed.proj", "patches"),
        "registers": ("reg_token", "rows"),
        "pre_norm": ("norm_pre", "norm"),
        **_blocks(
            "blocks.{}.",
            {
                "norm_1": ("norm1", "norm"),
                "attention/query": ("attn.qkv", "heads 0/3"),
                "attention/key": ("attn.qkv", "heads 1/3"),
                "attention/value": ("attn.qkv", "heads 2/3"),
                "attention/query_norm": ("attn.q_norm", "norm"),
                "attention/key_norm": ("attn.k_norm", "norm"),
                "attention/out": ("attn.proj", "merge"),
                "layer_scale_1": ("ls1.gamma", "plain"),
                "norm_2": ("norm2", "norm"),
                "mlp/up": ("mlp.fc1", "linear"),
                "mlp/down": ("mlp.fc2", "linear"),
                "layer_scale_2": ("ls2.gamma", "plain"),
            },
        ),
        "norm": ("norm", "norm"),
        "pool/probe": ("attn_pool.latent", "rows"),
        "pool/query": ("attn_pool.q", "heads"),
        "pool/key": ("attn_pool.kv", "heads 0/2"),
        "pool/value": ("attn_pool.kv", "heads 1/2"),
        "pool/out": ("attn_pool.proj", "merge"),
        "pool/norm": ("attn_pool.norm", "norm"),
        "pool/mlp/up": ("attn_pool.mlp.fc1", "linear"),
        "pool/mlp/down": ("attn_pool.mlp.fc2", "linear"),
        "head/dense": ("head", "linear"),
    },
    class_token="cls_token",
    positions="pos_embed",
    assumed={
        "activation": "gelu",
        "eps": 1e-6,
        "mean": HALF,
        "std": HALF,
        "filter": "bicubic_antialias",
    },
    signs=("blocks.0.attn.qkv.weight",),
    ignored=("mask_token",),
)
# As the authors of DINOv2 name them.
DINOV2 = dataclasses.replace(
    TIMM,
    parts={**TIMM.parts, "registers": ("register_tokens", "rows")},
    assumed={**TIMM.assumed, **IMAGENET, "filter": "bicubic"},
    signs=("blocks.0.ls1.gamma", "mask_token"),
)
HF_VIT = _hugging_face(
    {
        "norm_1": ("layernorm_before", "norm"),
        "norm_2": ("layernorm_after", "norm"),
        "mlp/up": ("intermediate.dense", "linear"),
        "mlp/down": ("output.dense", "linear"),
    },
    "layernorm_before.weight",
    eps=1e-12,
    mean=HALF,
    std=HALF,
)
HF_DINOV2 = _hugging_face(
    {
        "norm_1": ("norm1", "norm"),
        "layer_scale_1": ("layer_scale1.lambda1", "plain"),
        "norm_2": ("norm2", "norm"),
        "mlp/up": ("mlp.fc1", "linear"),
        "mlp/down": ("mlp.fc2", "linear"),
        "layer_scale_2": ("layer_scale2.lambda1", "plain"),
    },
    "layer_scale1.lambda1",
    eps=1e-6,
    **IMAGENET,
)
HF_CLIP = Layout(
    parts={
        "patch_embedding": ("embeddings.patch_embedding", "patches"),
        # Spelt so.
        "pre_norm": ("pre_layrnorm", "norm"),
        **_blocks(
            "encoder.layers.{}.",
            {
                "norm_1": ("layer_norm1", "norm"),
                "attention/query": ("self_attn.q_proj", "heads"),
                "attention/key": ("self_attn.k_proj", "heads"),
                "attention/value": ("self_attn.v_proj", "heads"),
                "attention/out": ("self_attn.out_proj", "merge"),
                "norm_2": ("layer_norm2", "norm"),
                "mlp/up": ("mlp.fc1", "linear"),
                "mlp/down": ("mlp.fc2", "linear"),
            },
        ),
        "norm": ("post_layernorm", "norm"),
        "image_head": ("visual_projection", "linear"),
    },
    class_token="embeddings.class_embedding",
    positions="embeddings.position_embedding.weight",
    assumed={"activation": "quick_gelu", "eps": 1e-5, "filter": "bicubic", **CLIP},
    signs=("embeddings.patch_embedding.weight", "pre_layrnorm.weight"),
    ignored=(r"embeddings\.position_ids",),
)
HF_SIGLIP = dataclasses.replace(
    HF_CLIP,
    parts={
        **HF_CLIP.parts,
        "pool/probe": ("head.probe", "rows"),
        "pool/query": ("head.attention.in_proj_", "heads 0/3"),
        "pool/key": ("head.attention.in_proj_", "heads 1/3"),
        "pool/value": ("head.attention.in_proj_", "heads 2/3"),
        "pool/out": ("head.attention.out_proj", "merge"),
        "pool/norm": ("head.layernorm", "norm"),
        "pool/mlp/up": ("head.mlp.fc1", "linear"),
        "pool/mlp/down": ("head.mlp.fc2", "linear"),
    },
    assumed={
        "activation": "gelu_tanh",
        "eps": 1e-6,
        "mean": HALF,
        "std": HALF,
        # Of SigLIP 2's flexible models; those of one size read their own grid.
        "filter": "antialias",
    },
    signs=("embeddings.patch_embedding.weight", "head.probe"),
)
OPENAI = Layout(
    parts={
        "patch_embedding": ("conv1", "patches"),
        "pre_norm": ("ln_pre", "norm"),
        **_blocks(
            "transformer.resblocks.{}.",
            {
                "norm_1": ("ln_1", "norm"),
                "attention/query": ("attn.in_proj_", "heads 0/3"),
                "attention/key": ("attn.in_proj_", "heads 1/3"),
                "attention/value": ("attn.in_proj_", "heads 2/3"),
                "attention/out": ("attn.out_proj", "merge"),
                "layer_scale_1": ("ls_1.gamma", "plain"),
                "norm_2": ("ln_2", "norm"),
                "mlp/up": ("mlp.c_fc", "linear"),
                "mlp/down": ("mlp.c_proj", "linear"),
                "layer_scale_2": ("ls_2.gamma", "plain"),
            },
        ),
        "norm": ("ln_post", "norm"),
        # A matrix, x @ proj.
        "image_head/kernel": ("proj", "rows"),
    },
    class_token="class_embedding",
    positions="positional_embedding",
    assumed={
        "activation": "quick_gelu",
        "eps": 1e-5,
        "filter": "bicubic_antialias",
        **CLIP,
    },
    signs=("conv1.weight", "ln_pre.weight"),
)
