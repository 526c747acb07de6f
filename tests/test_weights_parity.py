"""Our NaViT against the libraries whose files it reads, on seeded random weights."""

import functools
import json
import re
import sys
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from captioned import pack_texts
from test_weights import command

from navit_jax import config as config_lib
from navit_jax import weights
from navit_jax.data.patches import patchify
from navit_jax.models import MODELS, TextTower
from navit_jax.weights import sections
from navit_jax.weights.files import read_tensors
from navit_jax.weights.write import write

pytest.importorskip("safetensors", reason="pip install -e .[weights]")

PATCH = 8
SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
# The libraries compute in float32, and so do we: sums of other orders.
TOLERANCE = 1e-4
# Mean and std of pixels as the libraries document them.
PIXELS = {
    "half": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "clip": (
        (0.48145466, 0.4578275, 0.40821073),
        (0.26862954, 0.26130258, 0.27577711),
    ),
}


def library(name):
    pytest.importorskip("torch", reason="pip install -e .[parity]")
    return pytest.importorskip(name, reason="pip install -e .[parity]")


def scatter(model, seed=0):
    """A torch model whose every parameter is random, ready to be asked.

    What is embedded is so small that eps counts in the first layer norm.
    """
    import torch

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
        for name, parameter in model.named_parameters():
            if re.search("embed|_token|conv1", name):
                parameter *= 0.003
    return model.eval()


def picture(rows, columns, seed=0):
    shape = (rows * PATCH, columns * PATCH, 3)
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def as_torch(image, pixels="half"):
    """[1 3 h w], normalised as their library does it, whatever we have found."""
    import torch

    mean, std = map(np.array, PIXELS[pixels])
    return torch.tensor(((image / 255 - mean) / std).transpose(2, 0, 1)[None]).float()


def encode(found, *images):
    """What our model gives for pictures packed in one row."""
    parts = [patchify(image, PATCH) for image in images]
    ids = np.repeat(np.arange(len(parts)) + 1, [len(part[0]) for part in parts])
    grids = [[side // PATCH for side in image.shape[:2]] for image in images]
    patches, coords = (np.concatenate(each)[None] for each in zip(*parts, strict=True))
    model = config_lib.build(found.model, MODELS, "model")
    row = patches, coords, ids[None], np.array([grids])
    params = jax.tree.map(jnp.asarray, found.params["encoder"])
    out = jax.jit(model.apply)({"params": params}, *map(jnp.asarray, row))
    return {name: np.asarray(value[0]) for name, value in out.items()}


# Ids that end in the highest; one fills all places, as after truncation.
TEXTS = [[1, 7, 39], [1, 39], [1, *range(9, 19), 39], [1, 30, 2, 4, 39]]


def padded():
    """[4 12], after the end any ids but the highest, as nothing may look at them."""
    import torch

    return torch.tensor([ids + [5] * (12 - len(ids)) for ids in TEXTS])


def embed_texts(found):
    """What our tower gives for the texts packed in two rows, projected."""
    leaves = pack_texts([TEXTS[:2], TEXTS[2:]])
    tower = TextTower(vocab_size=40, length=12, **found.text)
    row = (
        jnp.asarray(leaves[f"text_{n}"]) for n in ("tokens", "coords", "segment_ids")
    )
    out = jax.jit(lambda p, *row: tower.apply({"params": p}, *row, 2))(
        found.params["text"], *row
    )
    return (out["pooled"] @ found.params["text_head"]["kernel"]).reshape(4, -1)


def save(model, folder, prefix="", **more):
    """The tensors of a torch model in a file of that folder."""
    import safetensors.torch

    state = {f"{prefix}{k}": v.contiguous() for k, v in model.state_dict().items()}
    path = folder / "model.safetensors"
    safetensors.torch.save_file({**state, **more}, path)
    return path


def numpy(tensor):
    return tensor.detach().numpy()


def compare(found, expected):
    for name, value in expected.items():
        np.testing.assert_allclose(
            found[name], value, atol=TOLERANCE, rtol=TOLERANCE, err_msg=name
        )


TIMM = {
    "plain": {},
    "scaled, with registers": {"init_values": 0.5, "reg_tokens": 3},
    "registers without positions": {"reg_tokens": 3, "no_embed_class": True},
    "clip": {"pre_norm": True, "class_token": True},
    "map pool": {"class_token": False, "global_pool": "map"},
    "mean": {"class_token": False, "global_pool": "avg", "fc_norm": False},
}


@pytest.mark.parametrize("arguments", TIMM.values(), ids=TIMM)
def test_timm_on_a_grid_that_is_not_square(arguments, tmp_path):
    library("timm")
    import torch
    from timm.layers import QuickGELU
    from timm.models.vision_transformer import VisionTransformer

    arguments = dict(arguments)
    quick, pool = "pre_norm" in arguments, arguments.get("global_pool", "token")
    if quick:
        norm = functools.partial(torch.nn.LayerNorm, eps=1e-5)
        arguments |= {"act_layer": QuickGELU, "norm_layer": norm}
    model = VisionTransformer(
        img_size=(2 * PATCH, 4 * PATCH), patch_size=PATCH, embed_dim=32, depth=2,
        num_heads=2, num_classes=0 if pool != "token" else 5, **arguments,
    )  # fmt: skip
    path = save(scatter(model), tmp_path)
    replace = {"activation": "quick_gelu"} if quick else {}
    found = weights.read(path, grid=(2, 4), num_heads=2, **replace)
    image = picture(2, 4)
    features = model.forward_features(as_torch(image, "clip" if quick else "half"))
    tokens = numpy(features[0, model.num_prefix_tokens :])
    expected = {"tokens": tokens}
    expected["pooled"] = numpy(model.forward_head(features, pre_logits=True))
    compare(encode(found, image), expected)
    if pool == "token":
        head = found.params["head"]["dense"]
        logits = expected["pooled"] @ head["kernel"] + head["bias"]
        np.testing.assert_allclose(
            logits, numpy(model.forward_head(features)), atol=TOLERANCE
        )


def test_timm_resamples_its_positions_as_we_do(tmp_path):
    library("timm")
    from timm.models.vision_transformer import VisionTransformer

    model = VisionTransformer(
        img_size=4 * PATCH, patch_size=PATCH, embed_dim=32, depth=1, num_heads=2,
        num_classes=0, dynamic_img_size=True,
    )  # fmt: skip
    found = weights.read(save(scatter(model), tmp_path), num_heads=2)
    for sides in [(3, 7), (2, 3), (4, 4)]:
        image = picture(*sides)
        expected = numpy(model.forward_features(as_torch(image)))[0, 1:]
        compare(encode(found, image), {"tokens": expected})


@pytest.mark.parametrize("kind", ["vit", "dinov2", "dinov2_with_registers"])
def test_transformers_vit_and_dinov2_on_pictures_of_any_shape(kind, tmp_path):
    transformers = library("transformers")
    arguments = {**SMALL, "image_size": 4 * PATCH, "patch_size": PATCH}
    if kind == "vit":
        config = transformers.ViTConfig(**arguments, intermediate_size=48)
        model = transformers.ViTModel(config)
    elif kind == "dinov2":
        config = transformers.Dinov2Config(**arguments, mlp_ratio=2)
        model = transformers.Dinov2Model(config)
    else:
        config = transformers.Dinov2WithRegistersConfig(
            **arguments, mlp_ratio=2, num_register_tokens=3
        )
        model = transformers.Dinov2WithRegistersModel(config)
    scatter(model).save_pretrained(tmp_path)
    found = weights.read(tmp_path)
    more = {"interpolate_pos_encoding": True} if kind == "vit" else {}
    skip = 4 if "registers" in kind else 1
    for sides in [(4, 4), (3, 6), (5, 2)]:
        image = picture(*sides)
        inputs = as_torch(image, "half" if kind == "vit" else "imagenet")
        hidden = numpy(model(inputs, **more).last_hidden_state)[0]
        expected = {"tokens": hidden[skip:], "pooled": hidden[:1]}
        compare(encode(found, image), expected)


def test_transformers_clip_with_its_projection(tmp_path):
    transformers = library("transformers")
    config = transformers.CLIPVisionConfig(
        **SMALL, intermediate_size=48, image_size=4 * PATCH, patch_size=PATCH,
        projection_dim=16,
    )  # fmt: skip
    model = scatter(transformers.CLIPVisionModelWithProjection(config))
    model.save_pretrained(tmp_path)
    found = weights.read(tmp_path)
    assert found.model["activation"] == "quick_gelu"
    assert found.model["pre_norm"]
    for sides in [(4, 4), (3, 5)]:
        image = picture(*sides)
        out = model(as_torch(image, "clip"), interpolate_pos_encoding=True)
        ours = encode(found, image)
        projected = ours["pooled"] @ found.params["image_head"]["kernel"]
        compare({"image": projected}, {"image": numpy(out.image_embeds)})


def test_transformers_clip_with_its_texts(tmp_path):
    transformers = library("transformers")
    shape = {**SMALL, "intermediate_size": 48}
    config = transformers.CLIPConfig(
        text_config={
            **shape, "vocab_size": 40, "max_position_embeddings": 12,
            "projection_dim": 16, "eos_token_id": 39,
        },
        vision_config={**shape, "image_size": 4 * PATCH, "patch_size": PATCH},
        projection_dim=16,
    )  # fmt: skip
    scatter(transformers.CLIPModel(config)).save_pretrained(tmp_path)
    found = weights.read(tmp_path)
    assert not [origin for origin in found.origins if origin.how == "unused"]
    model = transformers.CLIPTextModelWithProjection.from_pretrained(tmp_path).eval()
    expected = numpy(model(padded()).text_embeds)
    np.testing.assert_allclose(embed_texts(found), expected, atol=TOLERANCE)
    whole = transformers.CLIPModel.from_pretrained(tmp_path)
    np.testing.assert_array_equal(found.params["log_scale"], numpy(whole.logit_scale))


def test_transformers_siglip_2_on_pictures_of_their_own_shape(tmp_path):
    transformers = library("transformers")
    import torch

    config = transformers.Siglip2VisionConfig(
        **SMALL, intermediate_size=48, patch_size=PATCH, num_patches=16
    )
    model = scatter(transformers.Siglip2VisionModel(config))
    model.save_pretrained(tmp_path)
    found = weights.read(tmp_path)
    for sides in [(2, 6), (4, 4), (7, 5)]:
        image = picture(*sides)
        patches = torch.tensor(patchify(image, PATCH)[0] / 127.5 - 1)[None].float()
        mask = torch.ones(patches.shape[:2], dtype=torch.int32)
        out = model(patches, mask, torch.tensor([sides]))
        expected = {"tokens": numpy(out.last_hidden_state)[0]}
        expected["pooled"] = numpy(out.pooler_output)
        compare(encode(found, image), expected)


def test_transformers_siglip_of_one_size(tmp_path):
    transformers = library("transformers")
    config = transformers.SiglipVisionConfig(
        **SMALL, intermediate_size=48, image_size=4 * PATCH, patch_size=PATCH
    )
    model = scatter(transformers.SiglipVisionModel(config))
    model.save_pretrained(tmp_path)
    found, image = weights.read(tmp_path), picture(3, 6)
    out = model(as_torch(image), interpolate_pos_encoding=True)
    expected = {"tokens": numpy(out.last_hidden_state)[0]}
    expected["pooled"] = numpy(out.pooler_output)
    compare(encode(found, image), expected)


@pytest.mark.parametrize("quick", [True, False])
def test_open_clip_with_its_projection(quick, tmp_path):
    open_clip = library("open_clip")
    vision = {"layers": 2, "width": 64, "patch_size": PATCH, "head_width": 32}
    vision |= {"image_size": (2 * PATCH, 4 * PATCH)}
    text = {"layers": 2, "width": 32, "heads": 2, "vocab_size": 40}
    text["context_length"] = 12
    model = scatter(open_clip.CLIP(16, vision, text, quick_gelu=quick))
    path = save(model, tmp_path)
    said = {"vision_cfg": vision, "text_cfg": text, "quick_gelu": quick}
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": said}))
    found, image = weights.read(path, grid=(2, 4)), picture(2, 4)
    assert found.model["activation"] == ("quick_gelu" if quick else "gelu")
    ours = encode(found, image)
    projected = ours["pooled"] @ found.params["image_head"]["kernel"]
    expected = numpy(model.encode_image(as_torch(image, "clip")))
    compare({"image": projected}, {"image": expected})
    expected = numpy(model.encode_text(padded()))
    np.testing.assert_allclose(embed_texts(found), expected, atol=TOLERANCE)
    assert not [origin for origin in found.origins if origin.how == "unused"]
    assert found.text["activation"] == found.model["activation"]


def test_open_clip_resamples_its_positions_as_we_do(tmp_path):
    open_clip = library("open_clip")
    vision = {"layers": 1, "width": 64, "patch_size": PATCH, "head_width": 32}
    text = {"layers": 1, "width": 32, "heads": 2, "vocab_size": 40}
    build = lambda *size: open_clip.CLIP(  # noqa: E731
        16, {**vision, "image_size": size}, text, quick_gelu=True
    )
    model = scatter(build(4 * PATCH, 4 * PATCH))
    found = weights.read(save(model, tmp_path), num_heads=2)
    for sides in [(3, 7), (2, 3)]:
        state, other = model.state_dict(), build(*(side * PATCH for side in sides))
        open_clip.model.resize_pos_embed(state, other)
        other.load_state_dict(state)
        image = picture(*sides)
        expected = numpy(other.eval().encode_image(as_torch(image, "clip")))
        projected = encode(found, image)["pooled"]
        projected = projected @ found.params["image_head"]["kernel"]
        compare({"image": projected}, {"image": expected})


def test_pixels_are_as_the_libraries_document_them():
    timm, open_clip = library("timm"), library("open_clip")
    from transformers import image_utils

    for name, pixels in [
        ("vit_base_patch16_224.augreg_in21k", "half"),
        ("vit_base_patch16_siglip_224.webli", "half"),
        ("vit_small_patch14_dinov2.lvd142m", "imagenet"),
        ("vit_base_patch32_clip_224.openai", "clip"),
    ]:
        said = timm.get_pretrained_cfg(name)
        assert (said.mean, said.std) == PIXELS[pixels], name
    constants = open_clip.constants
    assert PIXELS["clip"] == (
        constants.OPENAI_DATASET_MEAN, constants.OPENAI_DATASET_STD
    )  # fmt: skip
    for name, pixels in [("IMAGENET_STANDARD", "half"), ("OPENAI_CLIP", "clip"),
                         ("IMAGENET_DEFAULT", "imagenet")]:  # fmt: skip
        for i, what in enumerate(("MEAN", "STD")):
            said = getattr(image_utils, f"{name}_{what}")
            assert tuple(said) == PIXELS[pixels][i]


def test_the_names_of_timm_say_heads_activation_and_eps():
    library("timm")
    from timm.models import vision_transformer

    make = "_create_vision_transformer"
    with mock.patch.object(vision_transformer, make, lambda name, **given: given):
        built = {
            name: getattr(vision_transformer, name)()
            for name in dir(vision_transformer)
            if re.match("vit_.*patch.*_[0-9]+$", name)
        }
    assert len(built) > 100
    for name, given in built.items():
        said = sections.read_said({"architecture": name}, "vision_config")
        heads, width = given.get("num_heads", 12), given.get("embed_dim", 768)
        found = sections.find_heads({"architecture": name}, width)
        mlp = int(width * given.get("mlp_ratio", 4))
        guess = sections.guess_heads(width, given.get("depth", 12), mlp)
        assert (found or guess) == heads, name
        activation = given.get("act_layer", "gelu")
        if isinstance(
            activation, str
        ):  # others are of gated blocks, which end in an error
            assert said["activation"] == activation, name
        norm = given.get("norm_layer")
        if not isinstance(norm, type):
            eps = norm.keywords["eps"] if norm else 1e-6
            assert said.get("eps", 1e-6) == eps, name


@pytest.mark.parametrize("kind", ["dinov2", "clip", "siglip"])
def test_what_we_write_is_what_transformers_reads(kind, tmp_path):
    transformers = library("transformers")
    name, more, pixels = {
        "dinov2": ("Dinov2", {"mlp_ratio": 2}, "imagenet"),
        "clip": ("CLIPVision", {"projection_dim": 16}, "clip"),
        "siglip": ("SiglipVision", {}, "half"),
    }[kind]
    arguments = {**SMALL, "image_size": 4 * PATCH, "patch_size": PATCH, **more}
    if kind != "dinov2":
        arguments["intermediate_size"] = 48
    suffix = "ModelWithProjection" if kind == "clip" else "Model"
    config = getattr(transformers, f"{name}Config")(**arguments)
    library_model = getattr(transformers, name + suffix)
    model = scatter(library_model(config))
    model.save_pretrained(tmp_path / "theirs")
    found = weights.read(tmp_path / "theirs")
    write(tmp_path / "ours", found.model, found.params)
    again, loading = library_model.from_pretrained(
        tmp_path / "ours", output_loading_info=True
    )
    assert set(loading["missing_keys"]) <= {"embeddings.mask_token"}
    assert not loading["unexpected_keys"]
    inputs = as_torch(picture(4, 4), pixels)
    for expected, out in zip(model(inputs)[:2], again.eval()(inputs)[:2], strict=True):
        np.testing.assert_allclose(numpy(out), numpy(expected), atol=TOLERANCE)


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
@pytest.mark.parametrize("kind", ["scripted", "wrapped", "shared"])
def test_the_command_for_a_pickle_makes_a_file_that_is_read(kind, tmp_path):
    library("torch")
    import torch

    path, kernel = tmp_path / "it's.pt", torch.arange(6.0).reshape(2, 3)
    expected = {"a.weight": kernel.T, "b.weight": kernel.T, "c.weight": kernel[:, 0]}
    if kind == "scripted":
        module = torch.nn.Module()
        for name, value in expected.items():
            part = torch.nn.Module()
            part.register_buffer("weight", value)
            module.add_module(name[0], part)
        torch.jit.save(torch.jit.script(module), str(path))
    elif kind == "wrapped":
        torch.save({"model": expected, "epoch": 3, "optimizer": {}}, path)
    else:
        shared = {f"module.{name}": value for name, value in expected.items()}
        torch.save({"state_dict": shared}, path)
    _, _, program, *arguments = command(path)
    with mock.patch.object(sys, "argv", ["-c", *arguments]):
        exec(program, {})
    found = read_tensors(path.with_suffix(".safetensors"))
    assert set(found) == set(expected)
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], numpy(value))


def test_several_pictures_packed_are_each_as_alone(tmp_path):
    library("transformers")
    import transformers

    config = transformers.Dinov2WithRegistersConfig(
        **SMALL, image_size=4 * PATCH, patch_size=PATCH, mlp_ratio=2
    )
    model = scatter(transformers.Dinov2WithRegistersModel(config))
    model.save_pretrained(tmp_path)
    found = weights.read(tmp_path)
    images = [picture(2, 5, 1), picture(4, 4, 2), picture(6, 1, 3)]
    ours = encode(found, *images)
    inputs = [as_torch(image, "imagenet") for image in images]
    alone = [numpy(model(each).last_hidden_state)[0] for each in inputs]
    tokens = np.concatenate([each[5:] for each in alone])
    pooled = np.stack([each[0] for each in alone])
    compare(ours, {"tokens": tokens, "pooled": pooled})
