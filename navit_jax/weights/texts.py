"""CLIP's tower of texts, as Hugging Face, OpenAI and open_clip name it.

Its parameters are those of `models.two_towers`: `text`, `text_head` and `log_scale`.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from navit_jax import config as config_lib
from navit_jax import paths
from navit_jax.models import TextTower
from navit_jax.models.sizes import SIZES, Spec
from navit_jax.weights.layouts import HF_CLIP, OPENAI, Layout, find_prefix
from navit_jax.weights.reader import Reader
from navit_jax.weights.sections import compare_shapes, read_said

ROOTS = ("text", "text_head", "log_scale")
# How open_clip calls it that the vector is that of the token that ends a text.
ENDS = ("argmax", "eos")


def _layout(
    images: Layout,
    before: str,
    names: Mapping[str, tuple[str, str]],
    projection: str,
    ignored: tuple[str, ...],
) -> Layout:
    """The blocks of a layout of images with `before` before them, and other names."""
    blocks = {
        ours: (before + theirs, how)
        for ours, (theirs, how) in images.parts.items()
        if ours.startswith("blocks/")
    }
    first = blocks["blocks/norm_1"][0].format(0) + ".weight"
    return Layout(
        parts={**blocks, **names},
        class_token="",
        positions="",
        assumed={k: images.assumed[k] for k in ("activation", "eps")},
        signs=(names["token_embedding/embedding"][0], first, projection),
        ignored=ignored,
        root="text",
    )


HF = _layout(
    HF_CLIP,
    "text_model.",
    {
        "token_embedding/embedding": (
            "text_model.embeddings.token_embedding.weight",
            "rows",
        ),
        "position_embedding/tables": (
            "text_model.embeddings.position_embedding.weight",
            "table",
        ),
        "norm": ("text_model.final_layer_norm", "norm"),
        "text_head": ("text_projection", "linear"),
    },
    "text_projection.weight",
    (
        r"text_model\.embeddings\.position_ids",
        r"(vision_model|visual_projection)\..*",
    ),
)
OPENAI_TEXT = _layout(
    OPENAI,
    "",
    {
        "token_embedding/embedding": ("token_embedding.weight", "rows"),
        "position_embedding/tables": ("positional_embedding", "table"),
        "norm": ("ln_final", "norm"),
        # A matrix, x @ text_projection.
        "text_head/kernel": ("text_projection", "rows"),
    },
    "text_projection",
    # What OpenAI's own files have beside the tensors, and the tower of images.
    (r"attn_mask|input_resolution|context_length|vocab_size|logit_bias", r"visual\..*"),
)


def take(
    reader: Reader,
    names: Collection[str],
    config: Mapping[str, Any],
    replace: Mapping[str, Any],
    allowed: Sequence[str],
    path: str,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The section `task.text`, and `text`, `text_head`, `log_scale`; or two empty ones.

    Towers of other names, as SigLIP's, are left aside, and those of open_clip whose
    tokens see what is after them, or whose vector is not the token that ends a text.

    Args:
      reader: Of the tower of images.
      names: Of all tensors.
      config: What is beside the file.
      replace: Attributes of the tower of images; both have the same kind of GELU, eps.

    Raises:
      ConfigError: a tensor of the tower is left over, or missing.
    """
    said = config.get("model_cfg", {}).get("text_cfg", {})
    other = said.get("no_causal_mask") or said.get("pool_type", "argmax") not in ENDS
    prefixes = [(each, find_prefix(each, names)) for each in (HF, OPENAI_TEXT)]
    found = [(each, prefix) for each, prefix in prefixes if prefix is not None]
    if other or not found:
        return {}, {}
    layout, prefix = found[0]
    own = config.get("text_config", {})
    texts = reader.beside(layout, prefix, {"num_heads": said.get("heads"), **own})
    leaves = texts.collect()
    for name in {prefix + "logit_scale", "logit_scale"} & {*names}:
        texts.take_scalar(leaves, "log_scale", name)
    texts.refuse_unused(allowed, path)
    values = {**layout.assumed, **read_said(config, "text_config"), **replace}
    section = _infer(leaves, values)
    _check(section, leaves, path)
    return section, paths.nest(leaves)


def _infer(
    leaves: Mapping[str, np.ndarray], values: Mapping[str, Any]
) -> dict[str, Any]:
    depth, width, num_heads, _ = leaves["text/blocks/attention/query/kernel"].shape
    spec = Spec(width, depth, num_heads, leaves["text/blocks/mlp/up/kernel"].shape[-1])
    named = [{"size": name} for name, each in SIZES.items() if each == spec]
    return {
        **(named[0] if named else {"size": "S", **spec._asdict()}),
        "pooling": "last",
        "causal": True,
        "bias_qkv": True,
        "bias_ln": True,
        "qk_norm": False,
        "activation": values["activation"],
        "eps": values["eps"],
    }


def _check(
    section: Mapping[str, Any], leaves: Mapping[str, np.ndarray], path: str
) -> None:
    tree = paths.nest(dict(leaves))["text"]
    tower = config_lib.call(
        TextTower,
        section,
        "task.text",
        vocab_size=len(tree["token_embedding"]["embedding"]),
        length=tree["position_embedding"]["tables"].shape[1],
    )
    one = jnp.ones((1, 1), jnp.int32)
    init = lambda key: tower.init(key, one, one[..., None], one, 1)  # noqa: E731
    compare_shapes(jax.eval_shape(init, jax.random.key(0))["params"], tree, path)
