"""What we write, we read again to the bit, whatever the model is."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_sparseformer import SMALL
from test_weights import clip

import navit_jax
from navit_jax import config as config_lib
from navit_jax import paths, weights
from navit_jax.errors import ConfigError
from navit_jax.models import MODELS, patch_size
from navit_jax.weights.write import write

pytest.importorskip("safetensors", reason="pip install -e .[weights]")

OURS = {
    "name": "navit", "size": "S/4", "width": 16, "depth": 2, "num_heads": 2, "mlp": 32,
    "positions": {"name": "factorized", "length": 8},
}  # fmt: skip
PLAIN = {
    **OURS, "positions": {"name": "learned_1d", "side": 3}, "pooling": "class",
    "bias_qkv": True, "bias_ln": True, "class_token": True, "qk_norm": False,
}  # fmt: skip
OBLONG = {"name": "learned_1d", "side": 2, "columns": 3}
CLIP = {**PLAIN, "pre_norm": True, "bias_patch": False, "activation": "quick_gelu"}
MAP = {**PLAIN, "class_token": False, "pooling": "map"}
HEAD = {"dense": {"kernel": np.ones((16, 5)), "bias": np.zeros(5)}}
PROJECTION = {"kernel": np.ones((16, 6))}
SPARSE = {
    "name": "sparseformer", "max_side": 8,
    "shape": {**SMALL, "pixel_mean": (0.1, 0.2, 0.3)},
}  # fmt: skip
MODEL = {
    "a ViT": (PLAIN, {"head": HEAD}, "vit"),
    "a ViT of another grid": ({**PLAIN, "positions": OBLONG}, {}, "vit"),
    "without biases of qkv": ({**PLAIN, "bias_qkv": False}, {}, "vit"),
    "DINOv2": ({**PLAIN, "layer_scale": 1.0}, {"head": HEAD}, "dinov2"),
    "with registers": (
        {**PLAIN, "layer_scale": 1.0, "registers": 3}, {}, "dinov2_with_registers",
    ),
    "CLIP": (CLIP, {"image_head": PROJECTION}, "clip_vision_model"),
    "CLIP's encoder": (CLIP, {}, "clip_vision_model"),
    "an attention pool": (MAP, {}, "siglip_vision_model"),
    # What transformers has not.
    "CLIP of another grid": ({**CLIP, "positions": OBLONG}, {}, ""),
    "CLIP with layer scale": ({**CLIP, "layer_scale": 1.0}, {}, ""),
    "a pool with a head": (MAP, {"head": HEAD}, ""),
    "a ViT with registers": ({**PLAIN, "registers": 3}, {}, ""),
    "a ViT without class token": ({**MAP, "pooling": "mean"}, {}, ""),
    "positions of another kind": (
        {**PLAIN, "positions": {"name": "learned_2d", "length": 3}}, {}, "",
    ),
    "NaViT": (OURS, {"head": HEAD}, ""),
    "SparseFormer v1": ({**SPARSE, "size": "v1_micro/2"}, {"head": HEAD}, ""),
    "SparseFormer v2": ({**SPARSE, "size": "v2_micro/2"}, {}, ""),
}  # fmt: skip


def draw(model):
    """Random parameters of an encoder; nothing is compiled."""
    module = config_lib.build(model, MODELS, "model")
    ones = jnp.ones((1, 1), int)
    patches = jnp.zeros((1, 1, 3 * patch_size(model["size"]) ** 2), jnp.uint8)
    pair = ones[..., None].repeat(2, -1)
    shapes = jax.eval_shape(module.init, jax.random.key(0), patches, pair, ones, pair)
    random = np.random.default_rng(0)
    return jax.tree.map(
        lambda x: random.normal(size=x.shape).astype("f4"), shapes["params"]
    )


@pytest.mark.parametrize("model, heads, kind", MODEL.values(), ids=MODEL)
def test_a_model_is_read_as_it_was_written(model, heads, kind, tmp_path):
    params = {"encoder": draw(model), **heads}
    assert write(tmp_path, model, params) == kind
    found = weights.read(tmp_path)
    assert found.model == json.loads(json.dumps(model))
    assert not found.assumed
    assert {origin.how for origin in found.origins} == {"loaded"}
    before, after = paths.flatten(params), paths.flatten(found.params)
    assert set(before) == set(after)
    for name, leaf in before.items():
        np.testing.assert_array_equal(after[name], leaf, err_msg=name)
    described = json.loads((tmp_path / "config.json").read_text())
    assert described.get("model_type", "") == kind


def test_a_clip_of_openai_is_written_and_read_again(tmp_path):
    clip(tmp_path / "clip.npz")
    before = weights.read(tmp_path / "clip.npz")
    images = {name: before.params[name] for name in ("encoder", "image_head")}
    write(tmp_path / "out", before.model, images)
    after = weights.read(tmp_path / "out")
    assert (after.layout, after.model) == ("hf_clip", before.model)
    jax.tree.map(np.testing.assert_array_equal, after.params, images)


@pytest.mark.parametrize("name", ["SparseFormer v2", "CLIP of another grid", "NaViT"])
def test_load_opens_what_only_we_read(name, tmp_path):
    model, heads, _ = MODEL[name]
    write(tmp_path, model, {"encoder": draw(model), **heads})
    (found,) = navit_jax.load(tmp_path).embed([np.zeros((8, 12, 3), np.uint8)])
    assert found.shape == (16,)
    assert np.isfinite(found).all()


def test_our_own_names_need_their_config(tmp_path):
    write(tmp_path, OURS, {"encoder": draw(OURS)})
    assert weights.read(tmp_path, attention="dense").model["attention"] == "dense"
    with pytest.raises(
        ConfigError, match=r"mlp/up/kernel: the model has \(2, 16, 48\)"
    ):
        weights.read(tmp_path, mlp=48)
    (tmp_path / "config.json").unlink()
    with pytest.raises(ConfigError, match=r"config\.json .* is missing"):
        weights.read(tmp_path)
