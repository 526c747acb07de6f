"""Files of vit_jax and big_vision, against timm's own reader of them."""

import numpy as np
import pytest
import scipy.ndimage
from test_weights_parity import (
    PATCH,
    as_torch,
    compare,
    encode,
    library,
    numpy,
    picture,
)

from navit_jax import weights


@pytest.mark.parametrize("naming", ["augreg", "big_vision", "big_vision stacked"])
def test_npz_files_as_timm_reads_them(naming, tmp_path):
    library("timm")
    import torch
    from timm.models.vision_transformer import VisionTransformer

    path = tmp_path / "vit.npz"
    tensors = write_npz(naming)
    np.savez(path, **tensors)
    found = weights.read(path)
    assert found.layout == naming.split()[0]
    model = VisionTransformer(
        img_size=4 * PATCH, patch_size=PATCH, embed_dim=32, depth=2, num_heads=2,
        num_classes=5, mlp_ratio=2,
        act_layer=lambda: torch.nn.GELU(approximate="tanh"),
    )  # fmt: skip
    if "stacked" in naming:
        np.savez(path, **write_npz("big_vision"))
    model.load_pretrained(str(path))
    image = picture(4, 4)
    features = model.eval().forward_features(as_torch(image))
    ours = encode(found, image)
    compare(ours, {"tokens": numpy(features)[0, 1:], "pooled": numpy(features)[:, 0]})
    head = found.params["head"]["dense"]
    logits = ours["pooled"] @ head["kernel"] + head["bias"]
    compare({"logits": logits}, {"logits": numpy(model.forward_head(features))})


@pytest.mark.parametrize("naming", ["augreg", "big_vision"])
def test_npz_files_on_a_picture_that_is_not_square(naming, tmp_path):
    library("timm")
    import torch
    from timm.models.vision_transformer import VisionTransformer

    path = tmp_path / "vit.npz"
    tensors = write_npz(naming)
    np.savez(path, **tensors)
    model = VisionTransformer(
        img_size=(3 * PATCH, 6 * PATCH), patch_size=PATCH, embed_dim=32, depth=2,
        num_heads=2, num_classes=0, mlp_ratio=2,
        act_layer=lambda: torch.nn.GELU(approximate="tanh"),
    )  # fmt: skip
    model.load_pretrained(str(path))
    # timm has resampled with its own filter, vit_jax and big_vision do it so.
    (table,) = (value[0] for name, value in tensors.items() if "pos_emb" in name)
    grid = scipy.ndimage.zoom(table[1:].reshape(4, 4, 32), (3 / 4, 6 / 4, 1), order=1)
    whole = np.concatenate([table[:1], grid.reshape(-1, 32)])[None]
    model.pos_embed.data = torch.tensor(whole)
    image = picture(3, 6)
    features = numpy(model.eval().forward_features(as_torch(image)))
    ours = encode(weights.read(path), image)
    compare(ours, {"tokens": features[0, 1:], "pooled": features[:, 0]})


def write_npz(naming):
    """Random tensors of a ViT of width 32 in flax's naming and axes."""
    attention, norm_2, mlp = {
        "augreg": ("MultiHeadDotProductAttention_1", "LayerNorm_2", "MlpBlock_3"),
    }.get(naming, ("MultiHeadDotProductAttention_0", "LayerNorm_1", "MlpBlock_0"))
    shapes = {"LayerNorm_0": (32,), norm_2: (32,)}
    shapes |= {f"{mlp}/Dense_0": (32, 64), f"{mlp}/Dense_1": (64, 32)}
    shapes |= {f"{attention}/{n}": (32, 2, 16) for n in ("query", "key", "value")}
    shapes |= {f"{attention}/out": (2, 16, 32)}
    random = np.random.default_rng(0)
    tensors = {
        "cls": random.normal(size=(1, 1, 32)),
        "Transformer/posembed_input/pos_embedding": random.normal(size=(1, 17, 32)),
        "embedding/kernel": random.normal(size=(PATCH, PATCH, 3, 32)) / 10,
        "embedding/bias": random.normal(size=32),
        "Transformer/encoder_norm/scale": random.normal(size=32),
        "Transformer/encoder_norm/bias": random.normal(size=32),
        "head/kernel": random.normal(size=(32, 5)),
        "head/bias": random.normal(size=5),
    }
    if naming != "augreg":
        name = "Transformer/posembed_input/pos_embedding"
        tensors["pos_embedding"] = tensors.pop(name)
    blocks = []
    for _ in range(2):
        block = {}
        for module, shape in shapes.items():
            leaf = "scale" if "LayerNorm" in module else "kernel"
            scale = 1 if leaf == "scale" else 1 / 6
            block[f"{module}/{leaf}"] = random.normal(size=shape) * scale
            bias = shape if leaf == "scale" else shape[-1:]
            if len(shape) == 3 and not module.endswith("out"):
                bias = shape[1:]
            block[f"{module}/bias"] = random.normal(size=bias)
        blocks.append(block)
    for name in blocks[0]:
        if "stacked" in naming:
            stacked = np.stack([block[name] for block in blocks])
            tensors[f"Transformer/encoderblock/{name}"] = stacked
        else:
            for i, block in enumerate(blocks):
                tensors[f"Transformer/encoderblock_{i}/{name}"] = block[name]
    return {name: value.astype(np.float32) for name, value in tensors.items()}
