"""The real ViT-S/14, where somebody has fetched it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import navit_jax
from navit_jax import config as config_lib
from navit_jax import weights
from navit_jax.data.patches import patchify
from navit_jax.data.records import cache_folder
from navit_jax.errors import ConfigError
from navit_jax.models import MODELS

CACHE = cache_folder()  # of whoever runs the tests


def real():
    """The file of ViT-S/14, where somebody has fetched it."""
    pytest.importorskip("onnx", reason="pip install -e .[weights]")
    path = CACHE / "weights" / "vit_s14" / "vit_s_focus.onnx"
    if not path.is_file():
        pytest.skip("python -m navit_jax.weights.fetch vit_s14")
    return path


def photo(rows, columns, seed=0):
    """Smooth colours, as pictures have them."""
    small = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), np.uint8)
    size = (columns * 14, rows * 14)
    return np.asarray(Image.fromarray(small).resize(size, Image.Resampling.BICUBIC))


def encode(found, images, num_slots):
    parts = [patchify(image, 14) for image in images]
    ids = np.repeat(np.arange(len(parts)) + 1, [len(part[0]) for part in parts])
    grids = np.ones((1, num_slots, 2), int)
    grids[0, : len(images)] = [[s // 14 for s in each.shape[:2]] for each in images]
    patches, coords = (np.concatenate(each)[None] for each in zip(*parts, strict=True))
    model = config_lib.build(found.model, MODELS, "model")
    params = {"params": jax.tree.map(jnp.asarray, found.params["encoder"])}
    row = map(jnp.asarray, (patches, coords, ids[None], grids))
    return jax.tree.map(np.asarray, jax.jit(model.apply)(params, *row))


def test_the_real_vit_equals_onnxruntime_on_the_same_file():
    path = real()
    onnxruntime = pytest.importorskip("onnxruntime", reason="pip install -e .[weights]")
    import onnx

    graph = onnx.load(str(path))
    nodes = [n for n in graph.graph.node if n.name.startswith("/backbone/layernorm/")]
    name = nodes[-1].output[0]
    kind = onnx.TensorProto.FLOAT
    graph.graph.output.append(onnx.helper.make_tensor_value_info(name, kind, None))
    session = onnxruntime.InferenceSession(graph.SerializeToString())
    image, found = photo(16, 16), weights.read(path)
    # As the package that has the file normalises.
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    pixels = ((image / 255 - mean) / std).transpose(2, 0, 1)[None].astype(np.float32)
    (expected,) = session.run([name], {"input_image": pixels})
    ours = encode(found, [image], 1)
    # Values reach 7; two programs sum in other orders.
    np.testing.assert_allclose(ours["tokens"], expected[:, 1:], atol=1e-4)
    np.testing.assert_allclose(ours["pooled"], expected[:, :1], atol=1e-4)


def test_the_real_vit_packed_at_native_aspect_equals_one_by_one():
    found = weights.read(real())
    images = [photo(5, 9, 1), photo(12, 3, 2), photo(7, 7, 3)]
    packed = encode(found, images, 4)
    alone = [encode(found, [image], 1) for image in images]
    tokens = np.concatenate([each["tokens"] for each in alone], 1)
    pooled = np.concatenate([each["pooled"] for each in alone], 1)
    np.testing.assert_allclose(packed["tokens"], tokens, atol=1e-4)
    np.testing.assert_allclose(packed["pooled"][:, :3], pooled, atol=1e-4)
    np.testing.assert_array_equal(packed["pooled"][:, 3], 0)


def test_the_real_vit_is_a_predictor(monkeypatch):
    path = real()
    monkeypatch.setenv("NAVIT_JAX_CACHE", str(CACHE))
    model, image = navit_jax.load("vit_s14"), photo(5, 9)
    (found,) = model.embed([image], side="native")
    alone = encode(weights.read(path), [image], 1)
    np.testing.assert_allclose(found, alone["pooled"][0, 0], atol=1e-4)
    (tokens,) = model.tokens([image], side="native")
    assert tokens.shape == (5, 9, 384)
    with pytest.raises(ConfigError, match="gives no 'probabilities'"):
        model.predict([image])
