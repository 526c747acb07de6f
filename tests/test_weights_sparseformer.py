"""The published SparseFormers, by the names that their files have."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from navit_jax import config as config_lib
from navit_jax import weights
from navit_jax.data.patches import patchify
from navit_jax.models import MODELS, sampling
from navit_jax.models.feature_maps import Maps
from navit_jax.weights.official import rename

MIXING = "layers.0.adaptive_mixing.out_proj.weight"


@pytest.mark.parametrize(
    "before, after",
    [
        ("layers.0.adaptive_mixing.tuo_proj.bias", MIXING.replace("weight", "bias")),
        ("token_roi.weight", "initial_roi.weight"),
        ("token_embedding.weight", "initial_embedding.weight"),
        ("layers.2.ffn.0.weight", "layers.2.norm2.weight"),
        ("layers.4.ffn.1.bias", "blocks.1.mlp.fc1.bias"),
        ("layers.3.ffn.3.bias", "blocks.0.mlp.fc2.bias"),
        ("layers.0.ln_attn.weight", "layers.0.norm1.weight"),
        ("layers.0.attn.in_proj_weight", "layers.0.attn.qkv.weight"),
        ("layers.0.attn.out_proj.bias", "layers.0.attn.proj.bias"),
        ("blocks.7.attn.in_proj_bias", "blocks.7.attn.qkv.bias"),
        ("head.norm.weight", "norm.weight"),
        ("head.classifier.bias", "proj.bias"),
        ("ln_post.weight", "norm.weight"),
        ("global_embedding.weight", "cls_embedding.weight"),
        ("layers.0.roi_adjust_module.1.x", "layers.0.roi_adjust_module.last.x"),
    ],
)  # fmt: skip
def test_older_spellings_become_those_of_the_library(before, after):
    # With biases of mixing it is a first version, which has no stages.
    beside = {MIXING: np.ones(1), "layers.0.adaptive_mixing.m_beta": np.ones(1)}
    found = rename({**beside, before: np.zeros(2)})
    assert set(found) == {*beside, after}


def test_a_box_is_put_together_of_centre_and_size():
    beside = {MIXING: np.ones(1), "initial_embedding.weight": np.ones((1, 8))}
    parts = {
        "token_roi_cc.weight": np.array([[0.5, 0.25]]),
        "token_roi_wh.weight": np.array([[0.5, 0.125]]),
    }
    found = rename({**beside, **parts})
    expected = [[0.25, 0.1875, 0.75, 0.3125]]
    np.testing.assert_array_equal(found["initial_roi.weight"], expected)
    # The public converter drops them.
    assert found["layers.0.stage_embedding.weight"].shape == (4, 8)


def test_files_of_others_stay_as_they_are():
    others = {"layers.3.ffn.1.bias": np.ones(1)}
    assert rename(others) == others


@pytest.mark.parametrize("kind", ["v1", "augreg", "clip"])
def test_the_official_library_gives_the_same(kind, tmp_path):
    pytest.importorskip("torch", reason="pip install -e .[parity]")
    reason = "the official library is not on the path"
    modeling = pytest.importorskip("sparseformer.modeling", reason=reason)
    import safetensors.torch
    import torch
    from sparseformer import config

    torch.manual_seed(0)
    small = {"conv_dim": 32, "proj_dim": 10, "repeats": [4, 1, 1, 1]}
    if kind == "v1":
        arguments = config.sparseformer_v1_tiny(16)
        arguments |= {"width_configs": [64, 128, 128, 128]}
        arguments |= {"ops_list": config.make_v1_ops_list(3), "drop_path_rate": 0.0}
    else:
        make = config.sparseformer_btsp_augreg_base
        if kind == "clip":
            make = config.sparseformer_btsp_openai_clip_base
        arguments = make(17) | {"num_sampling_points": 9}
        arguments |= {"width_configs": [64, 128, 128, 128]}
        arguments |= {"ops_list": config.make_btsp_ops_list(2)}
    model = modeling.SparseFormer(**(arguments | small)).eval()
    model.init_layer()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.02 * torch.randn_like(parameter)
        # So small that eps counts in the first layer norm.
        model.initial_embedding.weight *= 0.003
    state = {name: value.contiguous() for name, value in model.state_dict().items()}
    safetensors.torch.save_file(state, tmp_path / "model.safetensors")
    found = weights.read(tmp_path)

    image = np.random.default_rng(0).integers(0, 256, (64, 96, 3), np.uint8)
    patches, coords = patchify(image, 16)
    row = patches[None], coords[None], np.ones((1, 24), int), np.array([[[4, 6]]])
    params = {"params": jax.tree.map(jnp.asarray, found.params["encoder"])}
    encoder = config_lib.build(found.model, MODELS, "model")
    out = jax.jit(encoder.apply)(params, *map(jnp.asarray, row))
    mean, std = map(np.array, arguments["normalization_factor"])
    pixels = ((image / 255 - mean) / std).transpose(2, 0, 1)[None]
    expected = model(torch.tensor(pixels).float()).detach().numpy()
    if kind == "clip":
        ours = out["projected"][0]
    else:
        head = found.params["head"]["dense"]
        ours = out["pooled"][0] @ head["kernel"] + head["bias"]
    np.testing.assert_allclose(ours, expected, atol=1e-4)


@pytest.mark.parametrize("padding", ["zeros", "border"])
@pytest.mark.parametrize("name", sampling.LOOKUPS)
def test_lookups_are_those_of_grid_sample_in_value_and_gradient(name, padding):
    torch = pytest.importorskip("torch", reason="pip install -e .[parity]")
    rng = np.random.default_rng(0)
    cells = rng.standard_normal((2, 1, 5, 5, 3)).astype(np.float32)
    points = rng.uniform(-0.5, 1.5, (2, 6, 4, 2)).astype(np.float32)

    def read(cells, points):
        # Of five columns the map has four.
        none, one = jnp.zeros((2, 1), int), jnp.ones((2, 1), int)
        maps = Maps(cells, none, none, one, jnp.array([[[5, 4]]] * 2))
        maps, slots = sampling.prepare(maps, name), jnp.zeros((2, 6), int)
        found = sampling.lookup(maps, slots, points, padding, name)
        return jnp.square(found).sum(), found

    slope = jax.jit(jax.value_and_grad(read, (0, 1), has_aux=True))
    (_, ours), slopes = slope(jnp.asarray(cells), jnp.asarray(points))
    given = [torch.tensor(x, requires_grad=True) for x in (cells, points)]
    theirs = torch.nn.functional.grid_sample(
        given[0][:, 0, :, :4].permute(0, 3, 1, 2),
        2 * given[1] - 1,
        padding_mode=padding,
        align_corners=False,
    ).permute(0, 2, 3, 1)
    theirs.square().sum().backward()
    np.testing.assert_allclose(ours, theirs.detach().numpy(), atol=1e-5)
    for own, other in zip(slopes, given, strict=True):
        np.testing.assert_allclose(own, other.grad.numpy(), atol=1e-4)
