"""Our NaViT against the libraries whose files it reads, on seeded random weights."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from captioned import pack_texts

from navit_jax import config as config_lib
from navit_jax import weights
from navit_jax.data.patches import patchify
from navit_jax.models import MODELS, TextTower
from navit_jax.weights.write import write

pytest.importorskip("safetensors", reason="pip install -e .[weights]")

PATCH = 8
SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
# The libraries compute in float32, and so do we: sums of other orders.
TOLERANCE = 1e-4


def library(name):
    pytest.importorskip("torch", reason="pip install -e .[parity]")
    return pytest.importorskip(name, reason="pip install -e .[parity]")


def scatter(model, seed=0):
    """A torch model whose every parameter is random, ready to be asked."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def picture(rows, columns, seed=0):
    shape = (rows * PATCH, columns * PATCH, 3)
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def as_torch(image, found):
    """[1 3 h w], normalised as the section says."""
    import torch

    mean, std = (np.array(found.model[f"pixel_{name}"]) for name in ("mean", "std"))
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
    "clip": {"pre_norm": True, "quick": True},
    "map pool": {"class_token": False, "global_pool": "map"},
    "mean": {"class_token": False, "global_pool": "avg", "fc_norm": False},
}


@pytest.mark.parametrize("arguments", TIMM.values(), ids=TIMM)
def test_timm_on_a_grid_that_is_not_square(arguments, tmp_path):
    library("timm")
    from timm.layers import QuickGELU
    from timm.models.vision_transformer import VisionTransformer

    arguments = dict(arguments)
    quick, pool = arguments.pop("quick", False), arguments.get("global_pool", "token")
    model = VisionTransformer(
        img_size=(2 * PATCH, 4 * PATCH), patch_size=PATCH, embed_dim=32, depth=2,
        num_heads=2, num_classes=0 if pool != "token" else 5, **arguments,
        **({"act_layer": QuickGELU} if quick else {}),
    )  # fmt: skip
    path = save(scatter(model), tmp_path)
    replace = {"activation": "quick_gelu", "eps": 1e-6} if quick else {}
    found = weights.read(path, grid=(2, 4), num_heads=2, **replace)
    image = picture(2, 4)
    features = model.forward_features(as_torch(image, found))
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
        expected = numpy(model.forward_features(as_torch(image, found)))[0, 1:]
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
        hidden = numpy(model(as_torch(image, found), **more).last_hidden_state)[0]
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
        out = model(as_torch(image, found), interpolate_pos_encoding=True)
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
    out = model(as_torch(image, found), interpolate_pos_encoding=True)
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
    said = {"text_cfg": text, "quick_gelu": quick}
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": said}))
    found, image = weights.read(path, grid=(2, 4), num_heads=2), picture(2, 4)
    assert found.model["activation"] == ("quick_gelu" if quick else "gelu")
    ours = encode(found, image)
    projected = ours["pooled"] @ found.params["image_head"]["kernel"]
    expected = numpy(model.encode_image(as_torch(image, found)))
    compare({"image": projected}, {"image": expected})
    expected = numpy(model.encode_text(padded()))
    np.testing.assert_allclose(embed_texts(found), expected, atol=TOLERANCE)
    assert not [origin for origin in found.origins if origin.how == "unused"]
    assert found.text["activation"] == found.model["activation"]


def test_what_we_write_is_what_transformers_reads(tmp_path):
    transformers = library("transformers")
    config = transformers.Dinov2Config(
        **SMALL, image_size=4 * PATCH, patch_size=PATCH, mlp_ratio=2
    )
    model = scatter(transformers.Dinov2Model(config))
    model.save_pretrained(tmp_path / "theirs")
    found = weights.read(tmp_path / "theirs")
    write(tmp_path / "ours", found.model, found.params)
    again, loading = transformers.Dinov2Model.from_pretrained(
        tmp_path / "ours", output_loading_info=True
    )
    assert set(loading["missing_keys"]) <= {"embeddings.mask_token"}
    assert not loading["unexpected_keys"]
    inputs = as_torch(picture(3, 5), found)
    expected = numpy(model(inputs).last_hidden_state)
    np.testing.assert_allclose(
        numpy(again.eval()(inputs).last_hidden_state), expected, atol=TOLERANCE
    )


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
    alone = [numpy(model(as_torch(i, found)).last_hidden_state)[0] for i in images]
    tokens = np.concatenate([each[5:] for each in alone])
    pooled = np.stack([each[0] for each in alone])
    compare(ours, {"tokens": tokens, "pooled": pooled})
