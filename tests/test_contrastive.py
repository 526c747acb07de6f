"""Two towers and the loss over all pairs: by formula, on devices, in parts."""

import functools
import importlib.util
import json
import os
import pathlib
import socket
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from captioned import LENGTH, VOCABULARY, caption, with_texts
from packed import N, P, image, pack

from navit_jax import (
    compile,
    experiment,
    hlo,
    isolation,
    models,
    paths,
    sharding,
    train_state,
)
from navit_jax.batch import PackedBatch
from navit_jax.errors import ConfigError
from navit_jax.losses import contrastive as losses
from navit_jax.tasks import TASKS, Coupled, Task
from navit_jax.tasks.contrastive import Contrastive

TESTS = str(pathlib.Path(__file__).parent)
SHAPE = {"width": 16, "depth": 2, "num_heads": 2, "mlp": 24}
GRIDS = [(2, 3), (2, 4), (1, 4), (5, 1)]
KEY = jax.random.key(3)
E = 12


def build(loss_name="softmax", text=(), chunk=5, width=E, **arguments):
    """The task over two tiny towers."""
    task = {k: arguments.pop(k) for k in ("scale", "max_scale") if k in arguments}
    # The dense attention, and nothing computed again: they compile in half the time.
    arguments = {**SHAPE, "attention": "dense", "remat": "none", **arguments}
    positions = {"name": "factorized", "length": 8}
    encoder = models.NaViT("Ti/2", positions=positions, **arguments)
    text = {"size": "Ti", **arguments, **dict(text)}
    return Contrastive(
        encoder, VOCABULARY, LENGTH, text, loss_name, width, chunk=chunk, **task
    )


@functools.cache
def draw(seed=0, rows=8):
    """A batch where some slots lack the text, one lacks the image, one row has none."""
    rng = np.random.default_rng(seed)
    images, captions = [], []
    for row in range(rows):
        num = 0 if row == 5 else int(rng.integers(2, N + 1))
        ids = 100 * seed + N * row + np.arange(num)
        images.append([image(int(i), GRIDS[rng.integers(4)]) for i in ids])
        lengths = rng.integers(1, 6, num)
        captions.append([caption(int(i), n) for i, n in zip(ids, lengths, strict=True)])
    captions[0][0] = captions[1][1] = None
    batch = with_texts(pack(images), captions)
    mask = np.array(batch.image_mask)
    mask[2, 1] = False
    return batch.replace(image_mask=mask)


def valid(batch):
    """Which slots are pairs, by a loop."""
    mask = np.zeros_like(batch.image_mask)
    for row, segments in enumerate(batch.targets["text_segment_ids"]):
        for slot in range(N):
            mask[row, slot] = batch.image_mask[row, slot] and slot + 1 in segments
    return mask


@functools.cache
def some_params(task_name="softmax"):
    """Parameters that are not those of the beginning."""
    task = build(task_name)
    shapes = jax.eval_shape(task.init, jax.random.key(0), draw())
    rng = np.random.default_rng(0)

    def fill(path, shape):
        start = {"log_scale": 2.0, "bias": -4.0}.get(path[-1].key, 0.0)
        start = start if len(path) == 1 else path[-1].key == "scale"
        return jnp.asarray(0.3 * rng.standard_normal(shape.shape) + start, "float32")

    return jax.tree_util.tree_map_with_path(fill, shapes)


def by_formula(kind, image, text, scale, bias):
    """The mean loss over pairs [n E], in float64, and the share of each pair."""
    logits = scale * np.float64(image) @ np.float64(text).T + bias
    if kind == "sigmoid":
        signs = 2 * np.eye(len(logits)) - 1
        return np.logaddexp(0, -signs * logits).sum(1)
    both = (np.logaddexp.reduce(logits, axis) for axis in (0, 1))
    return sum(both) / 2 - np.diag(logits)


def numbers(params):
    return np.exp(np.float64(params["log_scale"])), np.float64(params.get("bias", 0))


def on(mesh, function):
    """A function jitted under a mesh, in full precision."""
    jitted = jax.jit(function)

    def run(*arguments):
        with jax.set_mesh(mesh), jax.default_matmul_precision("highest"):
            return jax.device_get(jitted(*arguments))

    return run


MESHES = {
    "one": {"devices": 1},
    "two axes": {"replica": 2, "fsdp": 4},
    "all axes": {"replica": 2, "fsdp": 2, "tensor": 2},
}


def mesh_of(name):
    axes = dict(MESHES[name])
    devices = jax.devices()[: axes.pop("devices", 8)]
    return sharding.make_mesh(devices=devices, **axes)


@pytest.mark.parametrize("mesh", ["one", "all axes"])
@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
def test_the_loss_is_that_of_all_pairs_of_the_batch_by_its_own_embeddings(kind, mesh):
    task, params, batch = build(kind), some_params(kind), draw()

    def compute(params, batch):
        weights = task.weights(batch)
        loss, means = task.loss(params, batch, KEY, weights)
        return loss, means, weights, task.embed(params, batch, KEY)

    loss, means, weights, embedded = on(mesh_of(mesh), compute)(params, batch)
    mask = valid(batch)
    assert weights["pairs"] == mask.sum() < batch.image_mask.sum()
    u, v = embedded["image"][mask], embedded["text"][mask]
    np.testing.assert_allclose(np.linalg.norm([u, v], axis=-1), 1, rtol=1e-6)
    expected = by_formula(kind, u, v, *numbers(params)).mean()
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    found = {name: mean.result() for name, mean in means.items()}
    scale = numbers(params)[0]
    cosine = (u * v).sum(1).mean()
    wanted = {"loss": expected, "similarity": cosine, "scale": scale}
    assert found == pytest.approx(wanted, rel=1e-5)


def test_the_loss_needs_no_mesh():
    task, params, batch = build(), some_params(), draw()
    with jax.default_matmul_precision("highest"):
        alone = jax.jit(task.loss)(params, batch, KEY, {})[0]
    loss = on(mesh_of("two axes"), task.loss)(params, batch, KEY, {})[0]
    np.testing.assert_allclose(alone, loss, rtol=1e-6)


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
def test_metrics_are_by_pair_among_the_pairs_of_its_row(kind):
    task, params, batch = build(kind), some_params(kind), draw()
    embedded = on(mesh_of("one"), task.outputs)(params, batch)
    found = on(mesh_of("one"), task.metrics)(params, batch)
    mask = valid(batch)
    for row in range(len(mask)):
        u, v = (embedded[name][row, mask[row]] for name in ("image", "text"))
        expected = by_formula(kind, u, v, *numbers(params))
        np.testing.assert_allclose(
            found["loss"].total[row, mask[row]], expected, rtol=1e-4, atol=1e-6
        )
        np.testing.assert_allclose(
            found["similarity"].total[row, mask[row]], (u * v).sum(1), atol=1e-6
        )
    for mean in found.values():
        np.testing.assert_array_equal(mean.weight, mask)
        assert not mean.total[~mask].any()


def test_images_alone_have_outputs_and_so_have_texts_alone():
    task, params, batch = build(), some_params(), draw()
    run = on(mesh_of("one"), task.outputs)
    whole = run(params, batch)
    bare = run(params, batch.replace(targets={}))
    assert set(whole) - set(bare) == {"text"}
    assert set(bare) == {"tokens", "pooled", "image"}
    for name, value in bare.items():
        np.testing.assert_array_equal(value, whole[name])
    leaves = (batch.targets[f"text_{n}"] for n in ("tokens", "coords", "segment_ids"))
    texts = functools.partial(task.embed_text, num_slots=N)
    np.testing.assert_array_equal(
        on(mesh_of("one"), texts)(params, *leaves), whole["text"]
    )


def test_packed_pairs_are_what_each_is_alone_and_a_neighbour_changes_no_bit():
    task, params = build(attention="blocks"), some_params()
    images = [image(i, grid) for i, grid in enumerate(GRIDS)]
    captions = [caption(i, 2 + i) for i in range(4)]
    embed = on(mesh_of("one"), functools.partial(task.embed, key=None))

    def run(rows):
        batch = pack([[images[i] for i in row] for row in rows])
        return batch, [[captions[i] for i in row] for row in rows]

    rows = [[0, 1, 2, 3], [3, 2], [], [1]]
    batch, texts = run(rows)
    packed = embed(params, with_texts(batch, texts))
    singles, alone_texts = run([[0], [1], [2], [3]])
    alone = embed(params, with_texts(singles, alone_texts))
    for name, found in packed.items():
        for row, members in enumerate(rows):
            np.testing.assert_allclose(
                found[row, : len(members)], alone[name][members, 0], atol=1e-5
            )
            assert not found[row, len(members) :].any()
    texts[0][1] = caption(77, len(captions[1]))
    other = embed(params, with_texts(batch, texts))
    np.testing.assert_array_equal(other["image"], packed["image"])
    changed = (other["text"] != packed["text"]).any(-1)
    np.testing.assert_array_equal(np.argwhere(changed), [[0, 1]])


@pytest.mark.parametrize("part", ["image", "text"])
def test_the_pair_that_makes_a_loss_not_finite_is_found_alone(part):
    task, params, batch = build(), some_params(), draw()
    row, slot = np.argwhere(valid(batch))[5]
    patches, targets = np.array(batch.patches), dict(batch.targets)
    if part == "image":
        patches[row, np.argmax(batch.segment_ids[row] == slot + 1)] = np.nan
    else:
        own = targets["text_segment_ids"][row] == slot + 1
        tokens = np.array(targets["text_tokens"])
        tokens[row, np.argmax(own)] = VOCABULARY  # is not in it
        targets["text_tokens"] = tokens
    judge = on(mesh_of("one"), lambda batch: task.metrics(params, batch)["loss"].total)
    spoiled = batch.replace(patches=patches, targets=targets)
    found = isolation.find_nonfinite(judge, spoiled)
    np.testing.assert_array_equal(found, [batch.image_ids[row, slot]])


def test_the_gradient_of_a_pair_reaches_no_other_image_and_no_other_text():
    task, batch = build(), draw()
    params = some_params()

    def pulled(patches, table, batch, mine):
        tree = paths.flatten(params) | {"text/token_embedding/embedding": table}
        found = task.embed(paths.nest(tree), batch.replace(patches=patches))
        return sum((x * jnp.arange(E))[mine].sum() for x in found.values())

    table = params["text"]["token_embedding"]["embedding"]
    gradient = on(mesh_of("one"), jax.grad(pulled, (0, 1)))
    row, slot = np.argwhere(valid(batch))[3]
    pixels, entries = gradient(batch.patches, table, batch, (row, slot))
    own = np.zeros_like(batch.segment_ids, bool)
    own[row] = batch.segment_ids[row] == slot + 1
    np.testing.assert_array_equal(pixels.any(-1), own)
    mine = batch.targets["text_segment_ids"][row] == slot + 1
    ids = batch.targets["text_tokens"][row][mine]
    np.testing.assert_array_equal(np.flatnonzero(entries.any(1)), np.unique(ids))


def test_a_text_drops_nothing_because_its_image_does():
    # Each of the last block's two branches, half of the time: four embeddings of one.
    task, params, batch = build(drop_path=0.5), some_params(), draw()
    embed = on(mesh_of("one"), task.embed)
    found = [embed(params, batch, key) for key in jax.random.split(KEY, 12)]
    first, second = np.triu_indices(len(found), 1)
    same = {}
    for name in ("image", "text"):
        values = np.stack([one[name][valid(batch)] for one in found])
        same[name] = np.abs(values[first] - values[second]).max(-1) < 1e-6
        assert same[name].mean() == pytest.approx(1 / 4, abs=0.05)
    both = same["image"] & same["text"]
    assert both.mean() == pytest.approx(1 / 16, abs=0.05)


@pytest.mark.parametrize("kind, start", [("softmax", 1 / 0.07), ("sigmoid", 10)])
def test_the_temperature_starts_as_published_or_as_asked_for(kind, start):
    def first(name, **asked):
        init = build(kind, **asked).init
        return jax.jit(lambda key, batch: init(key, batch)[name])(KEY, draw())

    np.testing.assert_allclose(np.exp(first("log_scale")), start, rtol=1e-6)
    np.testing.assert_allclose(np.exp(first("log_scale", scale=3)), 3, rtol=1e-6)
    if kind == "sigmoid":
        assert first("bias") == -10


def test_past_the_largest_scale_only_a_gradient_that_leads_back_counts():
    clamp = jax.value_and_grad(lambda x, sign: sign * losses.clamp(x, 2.0))
    for x, value in ((1.0, 1.0), (2.0, 2.0), (3.0, 2.0)):
        for sign in (1.0, -1.0):
            found, gradient = clamp(jnp.float32(x), sign)
            assert found == sign * value
            # Descent goes against the gradient: 1 leads to smaller values.
            assert gradient == (0 if x >= 2 and sign < 0 else sign)


def test_the_loss_knows_no_scale_above_the_largest():
    task, params, batch = build(max_scale=20), dict(some_params()), draw()
    run = on(mesh_of("one"), jax.value_and_grad(task.loss, has_aux=True))

    def at(scale):
        params["log_scale"] = jnp.log(jnp.float32(scale))
        (loss, means), gradient = run(params, batch, KEY, {})
        return loss, means["scale"].result(), gradient["log_scale"]

    (below, _, slope), (edge, _, _), (beyond, scale, _) = map(at, (10, 20, 90))
    assert beyond == pytest.approx(edge, rel=1e-6) != below
    assert scale == pytest.approx(20, rel=1e-6)
    # These random pairs do not belong together: a lower scale is better.
    assert slope > 0 < at(90)[2]


@pytest.mark.parametrize(
    "kind, mesh, locked",
    [("sigmoid", "one", "encoder/"), ("softmax", "all axes", "nothing")],
)
def test_two_passes_over_parts_give_the_gradients_of_the_whole_batch(
    kind, mesh, locked
):
    task = build(kind, drop_path=0.4, dropout=0.2, attention="dense")
    params, batch = some_params(kind), draw(rows=16)
    mesh = mesh_of(mesh)
    shards = mesh.shape["replica"] * mesh.shape["fsdp"]
    freeze = [[locked + ".*", True]] if locked == "encoder/" else []
    at_once = on(mesh, train_state.loss_and_gradients(task))
    in_parts = on(mesh, train_state.loss_and_gradients(task, 2, shards, freeze))
    whole, first = at_once(params, batch, KEY)
    parts, second = in_parts(params, batch, KEY)
    # With other draws it is another loss, by far.
    assert abs(at_once(params, batch, jax.random.key(4))[0][0] - whole[0]) > 1e-3
    np.testing.assert_allclose(parts[0], whole[0], rtol=1e-5)
    for name, mean in whole[1].items():
        np.testing.assert_allclose(parts[1][name].result(), mean.result(), rtol=1e-5)
    for name, value in paths.flatten(first).items():
        largest = np.abs(value).max()
        assert largest > 0, name
        wanted = 0 * value if name.startswith(locked) else value
        error = np.abs(paths.flatten(second)[name] - wanted).max()
        assert error <= 1e-5 * np.abs(wanted).max(), name


def test_it_is_a_task_that_couples_images_and_others_are_not():
    assert isinstance(build(), Task)
    assert isinstance(build(), Coupled)
    assert not issubclass(TASKS["classification"], Coupled)


def run(config, task, batches, mesh):
    """The state after all batches, and the loss of each step."""
    with jax.set_mesh(mesh), jax.default_matmul_precision("highest"):
        program = compile.Program(config, task, batches[0], mesh)
        state, step, found = program.first_state(), program.step(), []
        signals = np.zeros((len(batches[0].image_mask), 8), np.int32)
        own = sharding.local_rows(mesh, len(signals))
        for batch in batches:
            mine = jax.tree.map(lambda x: x[own], (batch, signals))
            state, metrics = step(state, *sharding.place(mine, mesh))
            found.append(float(metrics["loss"]))
    return jax.device_get(state), found


LEARNING = {"optim__schedule": {"name": "constant"}, "steps": 100}


@functools.cache
def ten_steps(mesh):
    batches = [draw(seed % 3) for seed in range(10)]
    task = build(drop_path=0.2)
    return run(tiny.config(**LEARNING), task, batches, mesh_of(mesh))[1]


@pytest.mark.slow  # test_contrastive_run.py has them learn from the stream
def test_eight_devices_learn_as_one():
    single = ten_steps("one")
    # The sums of a product split over devices are rounded in another order.
    np.testing.assert_allclose(ten_steps("two axes"), single, rtol=1e-5)
    assert single[-1] < single[0]


PROGRAM = """
import json, sys, jax
jax.distributed.initialize(sys.argv[1], num_processes=2, process_id=int(sys.argv[2]))
import test_contrastive
found = test_contrastive.ten_steps("two axes")
print("losses", json.dumps(found))
"""


@pytest.mark.slow
def test_two_processes_learn_as_one():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    flags = os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=4")
    environment = {**os.environ, "XLA_FLAGS": flags, "PYTHONPATH": TESTS}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, address, str(index)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for index in range(2)
    ]
    try:
        said = [process.communicate(timeout=400)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    for one in said:
        lines = [line for line in one.splitlines() if line.startswith("losses")]
        assert lines, one
        found = json.loads(lines[0].removeprefix("losses"))
        np.testing.assert_allclose(found, ten_steps("one"), rtol=1e-5)


def shapes(rows, slots=8, tokens=32, text=24):
    """A batch that is never filled."""

    def leaf(kind, *shape):
        return jax.ShapeDtypeStruct((rows, *shape), kind)

    return PackedBatch(
        patches=leaf(np.uint8, tokens, P),
        coords=leaf(np.int32, tokens, 2),
        segment_ids=leaf(np.int32, tokens),
        grids=leaf(np.int32, slots, 2),
        image_mask=leaf(bool, slots),
        image_ids=leaf(np.uint32, slots, 2),
        targets={
            "text_tokens": leaf(np.int32, text),
            "text_coords": leaf(np.int32, text, 1),
            "text_segment_ids": leaf(np.int32, text),
        },
    )


@functools.cache
def compiled(rows, width, accumulate=1, devices=None):
    """The whole training step over 2 x 4 devices, not run."""
    config = tiny.config(train__accumulate=accumulate)
    mesh = sharding.make_mesh(replica=2, fsdp=4, devices=devices)
    example = shapes(rows)
    # The choices of a config that makes none.
    default = {"attention": "auto", "remat": "light"}
    task = build(width=width, chunk=16, **default)
    program = compile.Program(config, task, example, mesh)
    signals = jax.ShapeDtypeStruct((rows, 8), np.int32)
    with jax.set_mesh(mesh):
        lowered = program.step().lower(program.abstract, example, signals)
    return lowered.compile()


def assert_nobody_has_all(program, rows, width, most):
    """No operation brings a device as much as the embeddings of one modality."""
    found = hlo.read(program.as_text())
    kinds = {one.kind for one in found}
    # The ring, and parameters that are gathered.
    assert {"collective-permute", "all-gather"} <= kinds
    for one in found:
        assert one.size < most * rows * 8 * width, one


def test_a_whole_step_never_gathers_the_embeddings_and_memory_grows_with_the_batch():
    small, large = compiled(128, 256), compiled(512, 256)
    for program, rows in ((small, 128), (large, 512)):
        # A quarter of the bytes of float32: all it gathers are parameters.
        assert_nobody_has_all(program, rows, 256, most=1)
    sizes = [one.memory_analysis().temp_size_in_bytes for one in (small, large)]
    assert sizes[1] <= 4.4 * sizes[0]


@pytest.mark.slow
def test_nor_does_a_step_in_two_parts():
    small, large = compiled(128, 256, 2), compiled(512, 256, 2)
    for program, rows in ((small, 128), (large, 512)):
        assert_nobody_has_all(program, rows, 256, most=1)
    sizes = [one.memory_analysis().temp_size_in_bytes for one in (small, large)]
    assert sizes[1] <= 4.4 * sizes[0]


FOR_TPU = """
import sys
from jax.experimental import topologies
import test_contrastive
found = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x4")
program = test_contrastive.compiled(1024, 256, int(sys.argv[1]), tuple(found.devices))
test_contrastive.assert_nobody_has_all(program, 1024, 256, most=1)
"""


@pytest.mark.slow
@pytest.mark.parametrize("accumulate", [1, 2])
def test_nor_does_a_step_that_is_compiled_for_a_tpu(accumulate):
    if not importlib.util.find_spec("libtpu"):
        pytest.skip("compiling for a TPU needs libtpu")
    # A process of its own: libtpu ends one whose XLA_FLAGS it does not know.
    environment = {
        **os.environ, "XLA_FLAGS": "", "TPU_SKIP_MDS_QUERY": "1",
        "TPU_ACCELERATOR_TYPE": "v5litepod-8", "TPU_WORKER_HOSTNAMES": "localhost",
        "JAX_ENABLE_COMPILATION_CACHE": "false",
        "PYTHONPATH": f"{TESTS}{os.pathsep}{os.environ.get('PYTHONPATH', '')}",
    }  # fmt: skip
    command = [sys.executable, "-c", FOR_TPU, str(accumulate)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


SECTION = {
    "name": "contrastive", "width": 8, "chunk": 4,
    "text": {"size": "Ti", "width": 16, "depth": 1, "num_heads": 2, "mlp": 24},
}  # fmt: skip


def test_a_config_names_the_towers_and_the_tokenizer_gives_the_vocabulary():
    config = tiny.config(task=SECTION, data__text={"tokens": 96, "length": 11})
    experiment.check_sections(config)
    task = experiment.build_task(config, num_classes=0)
    assert (task.vocab_size, task.text_length) == (2048, 11)
    tree = jax.eval_shape(task.init, jax.random.key(0), shapes(2))
    leaves = paths.flatten(tree)
    assert leaves["text/token_embedding/embedding"].shape == (2048, 16)
    assert leaves["text/position_embedding/tables"].shape == (1, 11, 16)
    assert leaves["image_head/kernel"].shape == (32, 8)
    assert leaves["text_head/kernel"].shape == (16, 8)


def test_tables_and_heads_are_split_over_fsdp():
    tree = jax.eval_shape(build(width=8).init, jax.random.key(0), draw())
    specs = sharding.param_specs(tree, mesh_of("two axes"))
    specs = {name: tuple(spec) for name, spec in specs.items()}
    assert specs["text/token_embedding/embedding"] == (None, "fsdp")
    assert specs["image_head/kernel"] == ("fsdp", None)
    assert specs["text_head/kernel"] == ("fsdp", None)
    assert specs["text/blocks/mlp/up/kernel"] == (None, "fsdp", "tensor")
    assert specs["text/position_embedding/tables"] == (None, None, None)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"loss_name": "hinge"}, "task.loss_name='hinge': use 'softmax' or 'sigmoid'"),
        ({"bias": -10}, "task.bias is for loss_name='sigmoid'"),
        ({"scale": 0}, "task.scale=0: give more than 0"),
        ({"chunk": 0}, "task.chunk=0: give more than 0"),
        ({"grad_dtype": "float16"}, "task.grad_dtype='float16': use 'float32' or"),
        ({"text": {"size": "B/16"}}, "task.text.size='B/16'"),
        ({"text": {"widht": 16}}, "task.text.widht is unknown; did you mean 'width'"),
    ],
)
def test_what_a_config_gets_wrong_is_named(changes, message):
    config = tiny.config(task={**SECTION, **changes}, data__text={"tokens": 96})

    def use():
        experiment.check_sections(config)
        task = experiment.build_task(config, num_classes=0)
        jax.eval_shape(task.init, jax.random.key(0), shapes(2))

    with pytest.raises(ConfigError, match=message):
        use()


def test_texts_are_asked_for():
    with pytest.raises(ConfigError, match="needs texts: give config"):
        experiment.build_task(tiny.config(task=SECTION), num_classes=0)
