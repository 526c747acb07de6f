"""What the configs beside a file of weights say of a model, and what is a guess."""

import json
import math

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import scipy.ndimage
from test_weights import DEPTH, PATCH, D, clip, save

from navit_jax import config as config_lib
from navit_jax import paths, weights
from navit_jax.data.patches import patchify
from navit_jax.errors import ConfigError
from navit_jax.models import MODELS
from navit_jax.models.resample import resample
from navit_jax.models.sizes import Spec
from navit_jax.weights import sections
from navit_jax.weights.__main__ import describe
from navit_jax.weights.write import write

OPEN_CLIP = "open_clip_config.json"


def say(folder, name, **config):
    (folder / name).write_text(json.dumps(config))


def written(folder):
    """A ViT in the naming of transformers; its config.json says nothing yet."""
    pytest.importorskip("safetensors", reason="pip install -e .[weights]")
    found = weights.read(save(folder))
    write(folder, found.model, found.params)
    (folder / "config.json").unlink()
    return found


def normalise(x, norm, eps):
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + eps)
    return x * norm["scale"] + norm["bias"]


def plain_vit(params, image, eps, curve, mean, std):
    """The class token of a ViT on a picture of its own grid, in float64."""
    params = jax.tree.map(np.float64, params)
    dense = lambda x, p: x @ p["kernel"] + p["bias"]  # noqa: E731
    patches = patchify(image, PATCH)[0].reshape(-1, 3) / 255
    patches = ((patches - mean) / std).reshape(-1, 3 * PATCH**2)
    table = params["position_embedding"]["table"].reshape(-1, D)
    x = dense(patches, params["patch_embedding"]) + table
    x = np.concatenate([params["class_token"], x])
    for i in range(DEPTH):
        block = jax.tree.map(lambda leaf, i=i: leaf[i], params["blocks"])
        normed, own = normalise(x, block["norm_1"], eps), block["attention"]
        query, key, value = (
            np.einsum("LD,DHK->HLK", normed, own[name]["kernel"])
            + own[name]["bias"][:, None]
            for name in ("query", "key", "value")
        )
        scores = np.exp(query @ key.transpose(0, 2, 1) / query.shape[-1] ** 0.5)
        value = scores / scores.sum(-1, keepdims=True) @ value
        out = np.einsum("HLK,HKD->LD", value, own["out"]["kernel"])
        x = x + out + own["out"]["bias"]
        normed = normalise(x, block["norm_2"], eps)
        x = x + dense(curve(dense(normed, block["mlp"]["up"])), block["mlp"]["down"])
    return normalise(x, params["norm"], eps)[0]


def quick(x):
    return x / (1 + np.exp(-1.702 * x))


def exact(x):
    return x * (1 + np.vectorize(math.erf)(x / 2**0.5)) / 2


def test_activation_eps_mean_and_std_of_a_config_are_those_of_the_model(tmp_path):
    written(tmp_path)
    mean, std = (0.1, 0.2, 0.3), (0.9, 0.8, 0.7)
    say(tmp_path, "preprocessor_config.json", image_mean=mean, image_std=std)
    config = {"hidden_act": "quick_gelu", "layer_norm_eps": 0.5}
    say(tmp_path, "config.json", num_attention_heads=2, **config)
    found = weights.read(tmp_path)
    assert found.assumed == ["positions"]
    image = np.random.default_rng(0).integers(0, 256, (12, 12, 3), np.uint8)
    patches, coords = patchify(image, PATCH)
    row = patches[None], coords[None], np.ones((1, 9), int), np.array([[[3, 3]]])
    model = config_lib.build(found.model, MODELS, "model")
    params = found.params["encoder"]
    leaves = {"params": jax.tree.map(jnp.asarray, params)}
    ours = jax.jit(model.apply)(leaves, *map(jnp.asarray, row))["pooled"][0, 0]
    asked = {"eps": 0.5, "curve": quick, "mean": mean, "std": std}
    np.testing.assert_allclose(ours, plain_vit(params, image, **asked), atol=5e-4)
    other = {"eps": 1e-12, "curve": exact, "mean": (0.5,) * 3, "std": (0.5,) * 3}
    for name, value in other.items():
        changed = plain_vit(params, image, **{**asked, name: value})
        assert abs(changed - ours).max() > 5e-3, name


@pytest.mark.parametrize(
    "config, said",
    [
        ({"hidden_act": "gelu_new"}, {"activation": "gelu_tanh"}),
        ({"hidden_act": "gelu_pytorch_tanh"}, {"activation": "gelu_tanh"}),
        ({"vision_config": {"layer_norm_eps": 1e-3}}, {"eps": 1e-3}),
        (
            {"architecture": "vit_base_patch16_224",
             "pretrained_cfg": {"std": [1, 2, 3]}},
            {"activation": "gelu", "std": (1, 2, 3)},
        ),
        (
            {"architecture": "vit_base_patch16_clip_quickgelu_224"},
            {"activation": "quick_gelu", "eps": 1e-5},
        ),
        (
            {"architecture": "vit_so400m_patch16_siglip_256"},
            {"activation": "gelu_tanh", "num_heads": 16},
        ),
        ({"model_args": {"act_layer": "gelu_tanh"}}, {"activation": "gelu_tanh"}),
        (
            {"model_cfg": {"quick_gelu": True}, "preprocess_cfg": {"mean": [1, 2, 3]}},
            {"activation": "quick_gelu", "mean": (1, 2, 3)},
        ),
        (
            {"model_cfg": {"vision_cfg": {
                "timm_model_name": "vit_giantopt_patch16_siglip_256"}}},
            {"activation": "gelu_tanh", "num_heads": 16},
        ),
        (
            {"model_cfg": {"vision_cfg": {"norm_kwargs": {"eps": 1e-6},
                                          "act_kwargs": {"approximate": "tanh"}}}},
            {"activation": "gelu_tanh", "eps": 1e-6},
        ),
    ],
)  # fmt: skip
def test_each_library_has_its_own_words(config, said):
    assert sections.read_said(config, "vision_config") == said


def test_what_a_config_says_of_the_pictures_is_not_said_of_the_texts():
    vision = {"timm_model_name": "vit_large_patch16_siglip_512"}
    texts = {"norm_kwargs": {"eps": 1e-6}}
    config = {"model_cfg": {"vision_cfg": vision, "text_cfg": texts}}
    expected = {"activation": "gelu", "eps": 1e-6}
    assert sections.read_said(config, "text_config") == expected


def test_the_width_of_heads_is_as_open_clip_says(tmp_path):
    clip(tmp_path / "a.npz", 128)
    found = weights.read(tmp_path / "a.npz")
    assert found.model["num_heads"] == 2
    assert found.assumed[0] == "num_heads"
    assert "num_heads = 2 (--set num_heads=...)" in describe(found)
    for vision, heads in [({"width": 128, "head_width": 32}, 4), ({"width": 128}, 2)]:
        say(tmp_path, OPEN_CLIP, model_cfg={"vision_cfg": vision, "text_cfg": {}})
        found = weights.read(tmp_path / "a.npz")
        query = found.params["encoder"]["blocks"]["attention"]["query"]["kernel"]
        assert query.shape == (1, 128, heads, 128 // heads)
        assert config_lib.build(found.model, MODELS, "model").spec.num_heads == heads
        assert "num_heads" not in found.assumed
    found = weights.read(tmp_path / "a.npz", num_heads=8)
    assert config_lib.build(found.model, MODELS, "model").spec.num_heads == 8


def test_heads_that_do_not_divide_the_width_are_asked_for(tmp_path):
    clip(tmp_path / "a.npz", 208)
    message = r"3 heads \(a guess\) do not divide the width 208.*--set num_heads="
    with pytest.raises(ConfigError, match=message):
        weights.read(tmp_path / "a.npz")
    with pytest.raises(ConfigError, match=r"^5 heads do not divide the width 208"):
        weights.read(tmp_path / "a.npz", num_heads=5)
    said = {"vision_cfg": {"width": 208, "head_width": 104}, "text_cfg": {"heads": 4}}
    say(tmp_path, OPEN_CLIP, model_cfg=said)
    query = weights.read(tmp_path / "a.npz").params["encoder"]["blocks"]["attention"]
    assert query["query"]["kernel"].shape == (1, 208, 2, 104)


@pytest.mark.parametrize(
    "shape, name, heads",
    [
        ((1664, 48, 8192), "vit_gigantic_patch14_clip_224", 16),
        ((1536, 40, 6144), "vit_giantopt_patch16_siglip_256", 16),
        ((1408, 40, 6144), "vit_giant_patch14_clip_224", 16),
        ((1280, 32, 5120), "vit_huge_patch14_224", 16),
        ((1152, 27, 4304), "vit_so400m_patch14_siglip_224", 16),
        ((640, 12, 2560), "vit_betwixt_patch16_reg4_gap_256", 10),
    ],
)
def test_giants_do_not_have_heads_of_64(shape, name, heads):
    assert sections.guess_heads(*shape) == heads
    assert sections.find_heads({"architecture": name}, shape[0]) in (heads, None)
    assert heads != 16 or sections.find_heads({"architecture": name}, shape[0])


def test_texts_have_heads_of_64_whatever_pictures_of_that_shape_have(
    tmp_path, monkeypatch
):
    clip(tmp_path / "a.npz", 128)
    monkeypatch.setattr(sections, "GIANTS", (Spec(128, 1, 8, 256),))
    found = weights.read(tmp_path / "a.npz")
    assert found.model["num_heads"] == 8
    assert found.text["num_heads"] == 2


def test_a_folder_of_several_files_is_read_whole(tmp_path):
    found = written(tmp_path)
    import safetensors.numpy

    tensors = safetensors.numpy.load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    files = {name: f"model-{i % 2}.safetensors" for i, name in enumerate(tensors)}
    for file in set(files.values()):
        part = {name: tensors[name] for name in tensors if files[name] == file}
        safetensors.numpy.save_file(part, tmp_path / file)
    say(tmp_path, "model.safetensors.index.json", weight_map=files)
    again = weights.read(tmp_path, num_heads=2)
    jax.tree.map(np.testing.assert_array_equal, again.params, found.params)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_half_precision_becomes_float32(dtype, tmp_path):
    found = written(tmp_path)
    import safetensors.numpy

    path = tmp_path / "model.safetensors"
    tensors = safetensors.numpy.load_file(path)
    halves = {name: value.astype(dtype) for name, value in tensors.items()}
    safetensors.numpy.save_file(halves, path)
    again = paths.flatten(weights.read(tmp_path, num_heads=2).params)
    for name, leaf in paths.flatten(found.params).items():
        assert again[name].dtype == np.float32
        np.testing.assert_array_equal(again[name], leaf.astype(dtype).astype("f4"))


@pytest.mark.parametrize("width, between", [(2 * D, False), (D, True)])
def test_a_head_on_other_vectors_is_left_aside(width, between, tmp_path):
    more = {"head/kernel": np.ones((width, 5)), "head/bias": np.ones(5)}
    if between:
        more["pre_logits/kernel"] = np.ones((D, D))
    found = weights.read(save(tmp_path, **more))
    assert set(found.params) == {"encoder"}
    assert {o.name for o in found.origins if o.how == "unused"} == set(more)


def test_pictures_that_are_not_square_have_rows_first(tmp_path):
    name = "Transformer/posembed_input/pos_embedding"
    table = np.random.default_rng(0).normal(size=(1, 7, D)).astype(np.float32)
    path = save(tmp_path, **{name: table})
    say(tmp_path, "config.json", image_size=[2 * PATCH, 3 * PATCH], patch_size=PATCH)
    found = weights.read(path)
    assert found.model["positions"]["side"] == 2
    assert found.model["positions"]["columns"] == 3
    grid = found.params["encoder"]["position_embedding"]["table"]
    np.testing.assert_array_equal(grid[1, 2], table[0, 1 + 3 + 2])


@pytest.mark.parametrize("grid", [(3, 3), (7, 4), (2, 11), (1, 1)])
def test_npz_files_resample_positions_as_vit_jax_does(grid, tmp_path):
    found = weights.read(save(tmp_path))
    table = found.params["encoder"]["position_embedding"]["table"]
    coords = np.stack(np.indices(grid), -1).reshape(1, -1, 2)
    grids = np.broadcast_to(np.array(grid), coords.shape)
    how = found.model["positions"]["filter"]
    ours = resample(*map(jnp.asarray, (table, coords, grids)), how)
    factors = (grid[0] / 3, grid[1] / 3, 1)
    expected = scipy.ndimage.zoom(table.astype(np.float64), factors, order=1)
    np.testing.assert_allclose(ours[0], expected.reshape(-1, D), atol=1e-5)
