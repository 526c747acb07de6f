"""Bootstrapping: a student learns its teacher's vectors, and the teacher stays."""

import dataclasses
import functools
import json

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from PIL import Image

from navit_jax import (
    compile,
    experiment,
    inheritance,
    paths,
    sharding,
    teach,
    train_flops,
    zero_shot,
)
from navit_jax.data import patches as patches_lib
from navit_jax.data import sources, teacher_outputs
from navit_jax.errors import ConfigError
from navit_jax.evaluator import Evaluator
from navit_jax.losses import alignment
from navit_jax.models.layers import Block
from navit_jax.models.pair import REPRESENTATIONS, represent
from navit_jax.models.resized import resize
from navit_jax.predictor import Predictor
from navit_jax.tasks.bootstrapping import longest_side

TEACHER = {
    "name": "navit", "size": "Ti/16", "width": 32, "depth": 5, "num_heads": 2,
    "mlp": 64, "pooling": "mean", "positions": {"name": "factorized", "length": 32},
    "attention": "dense",
}  # fmt: skip
INHERIT = [
    ("encoder/blocks/(.*)", r"teacher/blocks/\1[1:]"),
    ("encoder/norm/(.*)", r"teacher/norm/\1"),
]


def config(**changes):
    """A student of four blocks, the last of a teacher of five."""
    task = {"name": "bootstrapping", "teacher": TEACHER, "inherit": INHERIT}
    found = {
        "task": task,
        "model__depth": 4,
        "model__pooling": "mean",
        "optim__schedule": {"name": "constant"},
        "optim__freeze": [("encoder/blocks/.*", "2:"), ("encoder/norm/.*", True)],
    }
    return tiny.config(**{**tiny.PLAIN, **found, **changes})


def build(changed):
    stream = experiment.build_stream(changed)
    task = experiment.build_task(changed, stream.num_classes)
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    return stream, task, mesh


@pytest.fixture(scope="module")
def trained():
    """(task, first state, state after 8 steps, losses, batch)."""
    stream, task, mesh = build(config())
    with jax.set_mesh(mesh):
        program = compile.Program(config(), task, stream.example(), mesh)
        state, step, losses = program.first_state(), program.step(), []
        first = jax.tree.map(jnp.copy, state)  # the step donates it
        batches = stream.batches(np.arange(8))
        for _ in range(8):
            host, _ = next(batches)
            batch = sharding.place(host, mesh)
            state, metrics = step(state, batch, jnp.zeros((8, 8), jnp.int32))
            losses.append(float(metrics["loss"]))
        return task, first, state, losses, batch


def test_losses_are_what_their_names_say():
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((2, 7, 12))
    norms = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)

    def standard(x):
        return (x - x.mean(-1, keepdims=True)) / x.std(-1, keepdims=True)

    def softmax(x):
        return np.exp(x) / np.exp(x).sum(-1, keepdims=True)

    apart = np.abs(standard(a) - standard(b))
    expected = {
        "cosine": 1 - (a * b).sum(-1) / norms,
        "l2": ((a - b) ** 2).mean(-1),
        "smooth_l1": np.where(apart < 1, apart**2 / 2, apart - 0.5).mean(-1),
        "kl": (softmax(b) * np.log(softmax(b) / softmax(a))).sum(-1),
    }
    assert set(expected) == set(alignment.LOSSES)
    for name, loss in alignment.LOSSES.items():
        found = loss(jnp.asarray(a, jnp.float32), jnp.asarray(b, jnp.float32))
        np.testing.assert_allclose(found, expected[name], rtol=1e-4, err_msg=name)
        same = loss(jnp.asarray(a, jnp.float32), jnp.asarray(a, jnp.float32))
        np.testing.assert_allclose(same, 0, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("name", alignment.LOSSES)
def test_a_vector_of_zeros_has_a_finite_gradient(name):
    ones = jnp.ones((1, 6))
    gradient = jax.grad(lambda x: alignment.LOSSES[name](x, ones).sum())(ones * 0)
    assert np.isfinite(gradient).all()


def test_the_student_begins_with_the_last_blocks_of_its_teacher(trained):
    _, first, *_ = trained
    student, teacher = first.params["encoder"], first.params["teacher"]
    for name, leaf in paths.flatten(student["blocks"]).items():
        expected = paths.flatten(teacher["blocks"])[name][1:]
        np.testing.assert_array_equal(leaf, expected, err_msg=name)
    assert not np.array_equal(
        student["patch_embedding"]["kernel"], teacher["patch_embedding"]["kernel"]
    )


def test_what_comes_out_of_the_dropped_blocks_and_into_the_inherited_is_the_teacher(
    trained,
):
    task, first, _, _, batch = trained
    params, model = first.params, task.teacher_model
    arrays = batch.patches, batch.coords, batch.segment_ids, batch.grids
    whole = model.apply({"params": params["teacher"]}, *arrays)
    # The teacher's own front, embedding and positions included.
    front = model.clone(depth=1)
    dropped = jax.tree.map(lambda p: p[:1], params["teacher"]["blocks"])
    tail = params["encoder"]["blocks"]
    hidden = _before_norm(front, {**params["teacher"], "blocks": dropped}, arrays)
    for layer in range(4):
        own = jax.tree.map(lambda p, i=layer: p[i], tail)
        hidden = _block(model, own, hidden, batch.segment_ids)
    scale = params["encoder"]["norm"]["scale"]
    mean = hidden.mean(-1, keepdims=True)
    hidden = (hidden - mean) / np.sqrt(hidden.var(-1, keepdims=True) + 1e-6) * scale
    real = batch.segment_ids > 0
    np.testing.assert_allclose(hidden[real], whole["tokens"][real], atol=1e-5)


def _block(model, params, hidden, segment_ids):
    spec = model.spec
    block = Block(
        num_heads=spec.num_heads, hidden=spec.mlp, bias_qkv=False, bias_ln=False,
        bias_mlp=True, qk_norm=True, implementation="dense", dropout=0.0,
        dtype=jnp.float32,
    )  # fmt: skip
    return block.apply({"params": params}, hidden, {}, segment_ids, None)[0]


def _before_norm(model, params, arrays):
    """The tokens that a model of one block gives to its last norm."""
    seen = []

    def watch(next_one, args, kwargs, context):
        if context.module.name == "norm":
            seen.append(args[0])
        return next_one(*args, **kwargs)

    with nn.intercept_methods(watch):
        model.apply({"params": params}, *arrays)
    return seen[0].reshape(*arrays[2].shape, -1)


def test_only_what_is_tuned_moves_and_the_rest_stays_to_the_bit(trained):
    _, first, last, losses, _ = trained
    assert losses[-1] < 0.8 * losses[0]
    before, after = paths.flatten(first.params), paths.flatten(last.params)
    for name, leaf in before.items():
        if name.startswith("teacher/") or name == "encoder/norm/scale":
            np.testing.assert_array_equal(leaf, after[name], err_msg=name)
        elif name.startswith("encoder/blocks/"):
            np.testing.assert_array_equal(leaf[2:], after[name][2:], err_msg=name)
            assert not np.array_equal(leaf[:2], after[name][:2]), name
        else:
            assert not np.array_equal(leaf, after[name]), name


def test_the_teacher_has_no_optimizer_state(trained):
    _, first, *_ = trained
    student = sum(x.size for x in jax.tree.leaves(first.params["encoder"]))
    moments = sum(x.size for x in jax.tree.leaves(first.opt_state) if np.ndim(x))
    assert moments <= 2 * student


def test_the_loss_is_the_mean_over_images_however_they_are_split(trained):
    task, _, last, _, batch = trained
    key = jax.random.key(3)
    whole, _ = task.loss(last.params, batch, key, task.weights(batch))
    parts = [jax.tree.map(lambda x, s=s: x[s], batch) for s in (slice(3), slice(3, 8))]
    summed = sum(task.loss(last.params, p, key, task.weights(batch))[0] for p in parts)
    np.testing.assert_allclose(summed, whole, rtol=1e-5)
    vectors = task.vectors(last.params, batch)
    a, b = (np.asarray(vectors[k], np.float64) for k in ("student", "teacher"))
    cosines = (a * b).sum(-1) / np.maximum(
        np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1), 1e-9
    )
    expected = (1 - cosines)[batch.image_mask].mean()
    np.testing.assert_allclose(whole, expected, rtol=1e-4)
    terms = task.metrics(last.params, batch)
    assert terms["cosine"].weight.sum() == batch.image_mask.sum()


def test_vectors_that_a_batch_brings_stand_for_the_teacher(trained):
    task, _, last, _, batch = trained
    vectors = task.vectors(last.params, batch)["teacher"]
    # Without the teacher's parameters it can not run.
    alone = {"encoder": last.params["encoder"]}
    brought = dataclasses.replace(batch, targets={"teacher": vectors})
    key, weights = jax.random.key(0), task.weights(batch)
    expected, _ = task.loss(last.params, batch, key, weights)
    found, _ = task.loss(alone, brought, key, weights)
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    fresh = jax.eval_shape(task.init, key, brought)
    assert set(fresh) == {"encoder", "teacher"}


def test_the_teacher_begins_alone_as_it_begins_beside_its_student(trained):
    _, first, *_ = trained
    stream, task, mesh = build(config())
    with jax.set_mesh(mesh):
        program = compile.Program(config(), task, stream.example(), mesh)
        found = program.first_params(teach.PARTS)
    chex.assert_trees_all_equal(found, {"teacher": first.params["teacher"]})


def test_the_teacher_alone_has_the_weights_of_model_init(monkeypatch):
    def load(params, weights):
        assert weights == "file"
        real = jax.tree.map(jnp.ones_like, params["teacher"])
        return {**params, "teacher": real}

    monkeypatch.setattr(compile.initialise, "from_run", load)
    asked = config()
    stream, task, mesh = build(asked)
    asked["model"] = {**asked["model"], "init": {"weights": "file"}}
    with jax.set_mesh(mesh):
        program = compile.Program(asked, task, stream.example(), mesh)
        found = program.first_params(teach.PARTS)
    assert all((leaf == 1).all() for leaf in jax.tree.leaves(found["teacher"]))


@pytest.mark.parametrize(
    "side, length, message",
    [(600, 64, "--side=600 reaches 600 px, 37 patches a side, but .*=32: 512 px"),
     (48, 2, "--side=48 reaches 48 px, 3 patches a side, but .*=2: 32 px")],
    ids=["student", "teacher"],
)  # fmt: skip
def test_a_side_that_one_of_the_two_can_not_read_is_refused_at_once(
    tmp_path, monkeypatch, side, length, message
):
    monkeypatch.setattr(compile, "Program", lambda *_: 1 / 0)
    positions = {**TEACHER["positions"], "length": length}
    changed = config(
        task__teacher={**TEACHER, "positions": positions},
        data__resolution={"name": "fixed", "side": 32},
    )
    with pytest.raises(ConfigError, match=message):
        teach.teach(changed, side, str(tmp_path))
    with pytest.raises(ZeroDivisionError):
        teach.teach(changed, 32, str(tmp_path))
    squares = {"size": "Ti/16", **changed["task"], "teacher_side": 32}
    assert longest_side(squares, 32) == 32


def test_a_folder_that_can_not_be_written_is_refused_before_the_teacher_runs(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(experiment, "build_stream", lambda _: 1 / 0)
    (tmp_path / "file").write_text("")
    out = f"{tmp_path}/file/vectors"
    with pytest.raises(ConfigError, match=f"--out={out} can not be written"):
        teach.teach(config(), 48, out)


def test_a_run_says_at_which_side_the_vectors_that_it_reads_were_made(tmp_path, caplog):
    caplog.set_level("INFO", "absl")
    opened = sources.clipart("validation")
    vectors = np.zeros((len(opened), 4), np.float32)
    teacher_outputs.write(tmp_path, "art", opened, vectors, {}, 224)
    read = functools.partial(teacher_outputs.open_outputs, str(tmp_path), ["art"])
    assert read([opened])
    assert caplog.messages[-1] == f"vectors of art in {tmp_path}: at side 224"
    # As it was written once.
    stamp = json.loads((tmp_path / "art.json").read_text())
    del stamp["side"]
    (tmp_path / "art.json").write_text(json.dumps(stamp))
    assert read([opened])
    assert caplog.messages[-1] == f"vectors of art in {tmp_path}: at an unknown side"


def test_a_pass_over_the_data_keeps_what_the_teacher_says(tmp_path):
    """Against the teacher on batches of training, of equal images at equal sides."""
    section = {"name": "clipart", "split": "validation"}
    changed = config(
        data__sources={"art": section},
        data__resolution={"name": "fixed", "side": 48},
        data__crop={"name": "none"},
        data__flip=0.0,
        data__jitter=0.0,
        task__inherit=[],
        mesh={"fsdp": 8},
    )
    teach.teach(changed, 48, str(tmp_path))
    cached = tiny.change(
        {**changed, "data": {**changed["data"]}}, data__teacher=str(tmp_path)
    )
    stream, task, mesh = build(cached)
    with jax.set_mesh(mesh):
        params = compile.Program(changed, task, stream.example(), mesh).first_state()
    batch, _ = next(stream.batches(np.arange(8)))
    batch = jax.tree.map(jnp.asarray, batch)
    plain = dataclasses.replace(batch, targets={})
    expected = task.vectors_of_teacher(params.params, plain)
    brought = batch.targets["teacher"]
    np.testing.assert_allclose(
        brought[batch.image_mask], expected[batch.image_mask], atol=1e-4
    )
    assert (brought[~batch.image_mask] == 0).all()


def test_vectors_of_other_data_another_teacher_or_of_crops_are_refused(tmp_path):
    section = {"name": "clipart", "split": "validation"}
    changed = config(
        data__sources={"art": section},
        data__crop={"name": "none"},
        data__teacher=str(tmp_path),
    )
    with pytest.raises(ConfigError, match=r"navit_jax\.teach"):
        experiment.build_stream(changed)
    opened = sources.clipart("validation")
    bare = {**changed, "data": {}}
    about = experiment.about_teacher(bare, experiment.build_task(bare, 8))
    vectors = np.zeros((len(opened), 32), np.float32)
    teacher_outputs.write(tmp_path, "art", opened, vectors, about, 48)
    assert experiment.build_stream(changed).loader.teacher.width == 32
    assert experiment.build_task(changed, 8)
    with pytest.raises(ConfigError, match="another teacher"):
        experiment.build_task(
            {**changed, "task": {**changed["task"], "teacher_side": 32}}, 8
        )
    other_weights = {**changed["model"], "init": {"weights": "other.npz"}}
    with pytest.raises(ConfigError, match=r"another teacher.*other\.npz"):
        experiment.build_task({**changed, "model": other_weights}, 8)
    squares = {**changed["data"], "square": True}
    with pytest.raises(ConfigError, match="another teacher"):
        experiment.build_task({**changed, "data": squares}, 8)
    cropped = {**changed["data"], "crop": {"name": "inception"}}
    with pytest.raises(ConfigError, match=r"config\.data\.crop"):
        experiment.build_stream({**changed, "data": cropped})
    other = sources.clipart("test")
    teacher_outputs.write(tmp_path, "art", other, vectors, about, 48)
    with pytest.raises(ConfigError, match="other data"):
        experiment.build_stream(changed)


def test_a_teacher_at_its_own_size_sees_each_image_as_a_square(trained):
    """Against Pillow, each image alone; its triangle is the same, its sums rounded."""
    _, _, _, _, batch = trained
    arrays = batch.patches, batch.coords, batch.segment_ids, batch.grids
    squares, coords, segment_ids, grids = resize(*map(jnp.asarray, arrays), 42, 14, 8)
    N = batch.grids.shape[1]
    assert (grids == 3).all()
    assert squares.shape == (8 * N, 9, 3 * 14**2)
    assert (segment_ids.any(1) == batch.image_mask.ravel()).all()
    batch = jax.device_get(batch)
    for b, i in list(zip(*np.nonzero(batch.image_mask), strict=True))[:12]:
        mine = batch.segment_ids[b] == i + 1
        grid = tuple(batch.grids[b, i].tolist())
        own = patches_lib.unpatchify(
            batch.patches[b][mine], batch.coords[b][mine], grid, 16
        )
        expected = np.array(Image.fromarray(own).resize((42, 42), Image.BILINEAR))
        row = b * N + i
        found = patches_lib.unpatchify(
            np.asarray(squares[row]), np.asarray(coords[row]), (3, 3), 14
        )
        assert np.abs(found.astype(int) - expected).max() <= 1


def test_a_teacher_of_another_patch_and_size_trains_a_student():
    teacher = {**TEACHER, "size": "Ti/14"}
    changed = config(task__teacher=teacher, task__teacher_side=28)
    stream, task, _ = build(changed)
    batch, _ = next(stream.batches(np.arange(8)))
    batch = jax.tree.map(jnp.asarray, batch)
    params = task.init(jax.random.key(0), batch)
    assert params["teacher"]["patch_embedding"]["kernel"].shape[0] == 3 * 14**2
    loss, _ = jax.jit(task.loss)(params, batch, jax.random.key(0), task.weights(batch))
    assert np.isfinite(loss)
    count = train_flops.flops_counter(changed, params)
    counts = {"tokens": 100.0, "attention_pairs": 900.0, "images": 10.0}
    other = config(task__teacher=teacher, task__teacher_side=56)
    assert train_flops.flops_counter(other, params)(counts) > count(counts)


def test_the_teacher_is_asked_for_the_target_and_the_student_for_its_own(trained):
    """The student has no class token, so that it can not be asked for it."""
    *_, batch = trained
    teacher = {**TEACHER, "depth": 1, "class_token": True, "pooling": "class"}
    found, key = {}, jax.random.key(0)
    for target in ("", "class"):
        task = experiment.build_task(
            config(
                model__depth=1,
                task__teacher=teacher,
                task__inherit=[],
                task__representation="mean",
                task__target=target,
            ),
            8,
        )
        shapes = jax.eval_shape(task.init, key, batch)
        assert jax.eval_shape(task.outputs, shapes, batch)["student"].shape[-1] == 32
        found[target] = task
    model = found[""].teacher_model
    arrays = batch.patches, batch.coords, batch.segment_ids, batch.grids

    @jax.jit
    def say(batch):
        params = {"teacher": model.init(key, *arrays)["params"]}
        out = model.apply({"params": params["teacher"]}, *arrays)
        vectors = [task.vectors_of_teacher(params, batch) for task in found.values()]
        return out, dict(zip(found, vectors, strict=True))

    out, vectors = jax.device_get(say(batch))
    there, segment_ids = np.asarray(batch.image_mask), np.asarray(batch.segment_ids)
    means = [
        out["tokens"][b][segment_ids[b] == i + 1].mean(0)
        for b, i in zip(*np.nonzero(there), strict=True)
    ]
    np.testing.assert_allclose(vectors[""][there], means, atol=1e-5)
    np.testing.assert_array_equal(vectors["class"][there], out["class"][there])
    assert np.abs(vectors["class"] - vectors[""])[there].max() > 0.1


def test_a_head_of_the_teacher_is_shared_and_stays(trained):
    _, _, _, _, batch = trained
    stream, task, _ = build(
        config(task__head_width=7, task__align="head", task__loss_name="kl")
    )
    params = task.init(jax.random.key(0), batch)
    assert task.frozen == ("teacher/.*", "head/.*")
    assert params["head"]["dense"]["kernel"].shape == (32, 7)
    out = task.outputs(params, batch)
    assert out["logits"].shape == (*batch.image_mask.shape, 7)
    assert "accuracy" not in task.metrics(params, batch)
    before = dataclasses.replace(
        task, align="representation", loss_name="cosine", head_width=8
    )
    params = before.init(jax.random.key(0), batch)
    bias = jnp.zeros(8).at[3].set(1.0)
    params = {**params, "head": {"dense": {**params["head"]["dense"], "bias": bias}}}
    found = before.metrics(params, batch)["accuracy"]
    labels = np.asarray(batch.targets["labels"])[batch.image_mask]
    assert found.weight.sum() == len(labels)
    np.testing.assert_allclose(found.total.sum(), (labels == 3).any(-1).sum())
    assert stream.num_classes == 8


def test_the_targets_are_what_their_names_say():
    segment_ids = jnp.array([[1, 1, 2, 0]])
    out = {
        "tokens": jnp.arange(8.0).reshape(1, 4, 2),
        "class": jnp.ones((1, 2, 2)),
        "pooled": jnp.zeros((1, 2, 2)),
    }
    found = {n: represent(out, n, segment_ids, 2)[0] for n in REPRESENTATIONS}
    np.testing.assert_allclose(found["mean"], [[1, 2], [4, 5]])
    np.testing.assert_allclose(found["both"], [[0, 0, 1, 2], [0, 0, 4, 5]])
    np.testing.assert_allclose(found["class"], np.ones((2, 2)))
    np.testing.assert_allclose(found["pooled"], np.zeros((2, 2)))
    own = {**out, "latent_ids": jnp.array([[1, 2, 2, 2]])}
    np.testing.assert_allclose(
        represent(own, "mean", segment_ids, 2)[0], [[0, 1], [4, 5]]
    )
    with pytest.raises(ConfigError, match="needs the output 'class'"):
        represent({"tokens": out["tokens"]}, "class", segment_ids, 2)


TEXT = {
    "size": "Ti", "width": 24, "depth": 1, "num_heads": 2, "mlp": 48,
    "pooling": "last", "causal": True, "bias_qkv": True, "bias_ln": True,
    "qk_norm": False, "activation": "quick_gelu", "eps": 1e-5,
}  # fmt: skip


def test_a_student_is_judged_by_the_texts_of_its_teacher_which_stay_to_the_bit():
    """Against the cosines of each picture's vector and each prompt's alone."""
    templates = ["{}", "a picture of {}"]
    source = {"name": "clipart", "split": "test"}
    kinds = {"name": "zero_shot", "sources": {"art": source}, "templates": templates}
    changed = config(
        model__depth=1,
        data__text={"tokens": 40, "length": 12, "captions": False},
        task__teacher={**TEACHER, "depth": 1},
        task__inherit=[],
        task__head_width=7,
        task__align="head",
        task__text=TEXT,
        optim__freeze=[],
        evals={"kinds": {**kinds, "sides": [32]}},
    )
    experiment.check_sections(changed)
    stream, task, mesh = build(changed)
    assert not any(name.startswith("text") for name in stream.example().targets)
    with jax.set_mesh(mesh), jax.default_matmul_precision("highest"):
        program = compile.Program(changed, task, stream.example(), mesh)
        state = program.first_state()
        rng = np.random.default_rng(0)
        moved = {
            name: jax.tree.map(
                lambda p: jnp.asarray(p + 0.3 * rng.standard_normal(p.shape), p.dtype),
                state.params[name],
            )
            for name in ("head", "text", "text_head")
        }
        first = {**state.params, **moved}
        batch, _ = next(stream.batches(np.arange(8)))
        state, _ = program.step()(
            state.replace(params=jax.tree.map(jnp.copy, first)),
            sharding.place(batch, mesh),
            jnp.zeros((8, 8), jnp.int32),
        )
        judging = Evaluator(changed, task, mesh, stream.class_names)
        found = judging.run(state.params)
        (judged,) = judging.streams.values()
        images, index = [], []
        outputs = jax.jit(task.outputs)
        for batch, _ in judged.batches(np.arange(8)):
            mask = np.asarray(batch.image_mask)
            images.append(np.asarray(outputs(state.params, batch)["student"])[mask])
            index.append(np.asarray(batch.image_ids)[mask][:, 1])
    before, after = paths.flatten(first), paths.flatten(state.params)
    for name, leaf in before.items():
        same = np.array_equal(leaf, after[name])
        assert same != name.startswith("encoder/"), name
    student = sum(x.size for x in jax.tree.leaves(state.params["encoder"]))
    moments = sum(x.size for x in jax.tree.leaves(state.opt_state) if np.ndim(x))
    assert moments <= 2 * student

    tokenizer = experiment.open_text(changed)[1]
    opened = sources.clipart("test")
    embed = jax.jit(lambda *row: task.embed_text(state.params, *row, num_slots=1))
    classes = []
    for name in map(zero_shot.call_class, opened.class_names):
        prompts = []
        for template in templates:
            ids = tokenizer.encode(template.replace("{}", name))
            row = np.zeros((1, 12), np.int32)
            row[0, : len(ids)] = ids
            real = (np.arange(12) < len(ids)).astype(np.int32)
            with jax.default_matmul_precision("highest"):
                prompts.append(embed(row, np.arange(12)[None, :, None], real[None]))
        classes.append(np.concatenate(prompts)[:, 0].mean(0))
    classes = np.stack(classes)
    classes /= np.linalg.norm(classes, axis=1, keepdims=True)
    nearest = (np.concatenate(images) @ classes.T).argmax(1)
    labels = [opened[int(i)].labels for i in np.concatenate(index)]
    hits = [c in own for c, own in zip(nearest, labels, strict=True)]
    assert 0 < np.mean(hits) < 1
    assert found["eval/kinds_32/accuracy"] == pytest.approx(np.mean(hits))
    # The same asked as a user does, at the scale that CLIP ends with, 100.
    model = Predictor(changed, [], task, state.params, 0, mesh)
    pictures = [np.full((40, 50, 3), 90, np.uint8), np.zeros((32, 32, 3), np.uint8)]
    cosines = model.embed(pictures) @ model.embed_text(["cat", "dog"]).T
    odds = np.exp(100 * (cosines[:, :1] - cosines[:, 1:]))[:, 0]
    asked = model.zero_shot(pictures, ["cat", "dog"])
    np.testing.assert_allclose(asked[:, 0], odds / (1 + odds), atol=1e-3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"loss_name": "cosin"}, "cosine"),
        ({"representation": "cls"}, "class"),
        ({"align": "after"}, "'head'"),
        ({"align": "head"}, "head_width"),
        ({"loss_name": "kl", "head_width": 3}, "align='head'"),
        ({"text": {}, "head_width": 3}, "config.task.text: .*align='head'"),
        ({"teacher_side": 40}, "multiple of the teacher's patch, 16"),
        ({"teacher": {**TEACHER, "size": "Ti/14"}}, "patches of 14"),
    ],
)
def test_what_can_not_work_is_refused(changes, message):
    changed = config(data__text={"tokens": 24, "captions": False})
    changed["task"] = {**changed["task"], **changes}
    with pytest.raises(ConfigError, match=message):
        experiment.build_task(changed, 8)


def test_a_student_of_another_width_is_refused(trained):
    _, _, _, _, batch = trained
    changed = config(model__width=48, task__inherit=[])
    task = experiment.build_task(changed, 8)
    params = task.init(jax.random.key(0), batch)
    with pytest.raises(ConfigError, match="width 48, the teacher's 32"):
        task.metrics(params, batch)


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (("encoder/bloks/(.*)", "x"), "matches no parameter"),
        (("encoder/norm/(.*)", r"teacher/nrom/\1"), "teacher/norm/scale"),
        (("encoder/blocks/(.*)", r"teacher/blocks/\1[2:]"), "choose the layers"),
    ],
)
def test_rules_of_inheritance_that_fit_nothing_are_refused(rule, message, trained):
    with pytest.raises(ConfigError, match=message):
        inheritance.inherit(trained[1].params, [rule])


def test_a_sparseformer_inherits_from_a_vit_and_is_trained_by_it():
    """Shapes alone: what it computes is tested where it is made."""
    teacher = {
        **TEACHER, "width": 128, "depth": 4, "num_heads": 4, "mlp": 512,
        "class_token": True, "pooling": "class", "bias_qkv": True, "bias_ln": True,
        "qk_norm": False,
    }  # fmt: skip
    changed = config(
        model={"name": "sparseformer", "size": "v2_micro/16", "max_side": 8},
        task__teacher=teacher,
        task__representation="both",
        task__inherit=[
            ("encoder/blocks/(.*)", r"teacher/blocks/\1[1:]"),
            ("encoder/norm/(.*)", r"teacher/norm/\1"),
            ("encoder/class_token", "teacher/class_token"),
        ],
    )
    experiment.check_sections(changed)
    stream, task, mesh = build(changed)
    with jax.set_mesh(mesh):
        program = compile.Program(changed, task, stream.example(), mesh)
        params, batch = program.abstract.params, stream.example()
        # Rules that do not fit raise; the others change no shape.
        copied = jax.eval_shape(
            lambda p: inheritance.inherit(p, task.inherit),
            jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, p.dtype), params),
        )
        assert jax.tree.structure(copied) == jax.tree.structure(params)
        batch = jax.tree.map(jnp.asarray, batch)
        gradient = jax.grad(task.loss, has_aux=True)
        weights = task.weights(batch)
        found, means = jax.eval_shape(
            gradient, params, batch, jax.random.key(0), weights
        )
    assert set(means) == {"loss", "cosine"}
    assert jax.tree.structure(found) == jax.tree.structure(params)
