import types

import jax
import numpy as np
import oracle
import pytest
import tiny
from etils import epath
from PIL import Image

from navit_jax import (
    checkpoint,
    data,
    evaluate,
    evaluator,
    experiment,
    reporting,
    sharding,
    train,
)
from navit_jax.data import images
from navit_jax.data.sizes import size_table
from navit_jax.data.sources import clipart
from navit_jax.errors import ConfigError, DataError
from navit_jax.evaluator import Evaluator
from navit_jax.metrics import interval_by_group

SIDES = (32, 48)
CLIPART = {"clipart": {"name": "clipart", "split": "validation"}}


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """Sources: a folder with a picture of each class, and two that are none."""
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    names = experiment.build_stream(tiny.config()).class_names
    for i, name in enumerate(names):
        (folder / name).mkdir()
        pixels = rng.integers(0, 256, (30 + 9 * i, 60, 3), np.uint8)
        Image.fromarray(pixels).save(folder / name / "one.png")
    (folder / names[0] / "empty.png").write_bytes(b"")
    whole = (folder / names[1] / "one.png").read_bytes()
    (folder / names[1] / "cut.png").write_bytes(whole[: len(whole) // 2])
    return {"own": {"name": "folder", "path": str(folder)}}


def judge(params, source, side):
    """Indices, losses and hits of the usable pictures, each alone in numpy."""
    used, losses, right = [], [], []
    params = jax.tree.map(np.float64, params)
    for index in range(len(source)):
        record = source[index]
        try:
            size = images.read_size(record.image)
            scale = side / np.sqrt(size[0] * size[1]) / 16
            rows, columns = (max(1, int(x * scale + 1e-9)) for x in size)
            pixels, _ = images.read(record.image, size, (16 * rows, 16 * columns))
        except images.BadImage:
            continue
        coords = np.array([(r, c) for r in range(rows) for c in range(columns)])
        blocks = [pixels[16 * r : 16 * r + 16, 16 * c : 16 * c + 16] for r, c in coords]
        _, pooled = oracle.forward(
            params["encoder"],
            np.stack(blocks).reshape(len(coords), -1) / 127.5 - 1.0,
            coords,
            (rows, columns),
            num_heads=2,
            positions={"name": "factorized", "length": 32},
        )
        logits = oracle.dense(params["head"]["dense"], pooled)
        signs = np.where(np.isin(np.arange(len(logits)), record.labels), 1, -1)
        used.append(index)
        losses.append(np.log1p(np.exp(-signs * logits)).sum())
        right.append(float(logits.argmax() in record.labels))
    return used, np.array(losses), np.array(right)


def test_every_set_and_side_is_judged_as_by_a_loop_that_packs_nothing(own):
    config = tiny.config(
        evals={
            "validation": {"sources": CLIPART, "sides": SIDES},
            "own": {"sources": own, "sides": SIDES},
        }
    )
    mesh, stream = sharding.make_mesh(), experiment.build_stream(config)
    task = experiment.build_task(config, stream.num_classes)
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda x: np.float32(0.3 * rng.standard_normal(x.shape)),
        jax.eval_shape(task.init, jax.random.key(0), stream.example()),
    )
    with jax.set_mesh(mesh), jax.default_matmul_precision("highest"):
        evaluator = Evaluator(config, task, mesh, stream.class_names)
        values = evaluator.run(params)
    groups = clipart("validation").groups
    assert groups is not None
    expected = {}
    for name, side in [(name, side) for name in config["evals"] for side in SIDES]:
        source = evaluator.streams[f"{name}_{side}"].loader.sources[0]
        used, losses, right = judge(params, source, side)
        expected[f"{name}_{side}/images"] = len(used)
        for metric, terms in (("loss", losses), ("accuracy", right)):
            key = f"{name}_{side}/{metric}"
            expected[key] = terms.mean()
            if name == "validation":
                interval = interval_by_group(terms, np.ones(len(used)), groups[used])
                expected[f"{key}_low"], expected[f"{key}_high"] = interval
    assert expected["own_48/images"] == stream.num_classes
    assert 0 < expected["validation_48/accuracy"] < 1
    names = {f"{name}_{side}" for name in config["evals"] for side in SIDES}
    assert {key.split("/")[1] for key in values} == names
    for key, value in expected.items():
        assert values[f"eval/{key}"] == pytest.approx(value, 1e-5), key
    # Who knows of no near-duplicates gives no interval.
    assert "eval/own_32/accuracy_low" not in values


def test_rows_grow_at_native_size_until_the_longest_picture_fits():
    config, slots = tiny.config(), 6
    section = {"sources": CLIPART, "sides": (32, 96, "native")}

    def plans(config=config, **own):
        streams = dict(experiment.build_eval_streams(config, section | own, "v", 2))
        for stream in streams.values():
            assert stream.loader.num_tokens == stream.plan.tokens
        return {label: stream.plan for label, stream in streams.items()}

    patches = size_table(clipart("validation")).astype(int) // 16
    lengths = np.maximum(patches, 1).prod(1)
    found = plans()
    assert [(p.rows, p.tokens) for p in found.values()][:2] == [(8, 32), (8, 64)]
    native = found["native"]
    assert lengths.max() <= native.tokens < 2 * lengths.max()
    # As many tokens a batch, and a row for each of the two devices.
    assert native.rows == max(2, 8 * 32 // native.tokens)
    assert native.slots == slots
    images = native.plan_window(0, 0).images
    assert sorted(images.kept) == sorted(lengths)
    # The set's own length stays, and so does what the positions reach.
    images = plans(tokens=64)["native"].plan_window(0, 0).images
    assert images.shrunk.sum() == (lengths > 64).sum() > 0
    short = tiny.config(model__positions={"name": "factorized", "length": 8})
    with pytest.raises(ConfigError, match=r"^config.evals.v.sides=144 reaches 144 px"):
        plans(short, sides=(32, 144))
    short = plans(short, sides=("native",))["native"]
    assert short.tokens == 64
    images = short.plan_window(0, 0).images
    assert images.shrunk.sum() == (patches.max(1) > 8).sum() > 0


def test_time_is_that_of_the_devices_without_loading_and_compilation(monkeypatch):
    sides = (*SIDES, "native")
    config = tiny.config(evals={"v": {"sources": CLIPART, "sides": sides}})
    mesh, now, seen = sharding.make_mesh(), [0.0], set()
    task = experiment.build_task(config, 8)
    stream = experiment.build_stream(config)
    shapes = jax.eval_shape(task.init, jax.random.key(0), stream.example())
    params = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes)
    with jax.set_mesh(mesh):
        own = Evaluator(config, task, mesh, stream.class_names)
        judge_, place = own._judge, sharding.place

        def judge_slowly(params, batch, compute):
            shape = batch.segment_ids.shape
            now[0] += 1.0 if shape in seen else 100.0
            seen.add(shape)
            return judge_(params, batch, compute)

        def place_slowly(batch, mesh):
            now[0] += 1000.0
            return place(batch, mesh)

        monkeypatch.setattr(own, "_judge", judge_slowly)
        monkeypatch.setattr(sharding, "place", place_slowly)
        clock = types.SimpleNamespace(perf_counter=lambda: now[0])
        monkeypatch.setattr(evaluator, "time", clock)
        for _ in range(2):
            values = own.run(params)
            for name, stream in own.streams.items():
                batches = -(-len(stream.plan.plan_window(0, 0)) // stream.plan.rows)
                found = values[f"eval/{name}/seconds_per_image"]
                assert found == pytest.approx(batches / values[f"eval/{name}/images"])
    assert len(seen) == 2  # the sides share a shape


def test_a_set_without_a_picture_of_use_is_named(own, tmp_path):
    names = experiment.build_stream(tiny.config()).class_names
    cut = epath.Path(own["own"]["path"]) / names[1] / "cut.png"
    for name in names:
        (tmp_path / name).mkdir()
        cut.copy(epath.Path(tmp_path) / name / "cut.png")
    sources = {"own": {"name": "folder", "path": str(tmp_path)}}
    config = tiny.config(evals={"broken": {"sources": sources, "sides": SIDES[:1]}})
    mesh, stream = sharding.make_mesh(), experiment.build_stream(config)
    task = experiment.build_task(config, stream.num_classes)
    with jax.set_mesh(mesh):
        evaluator = Evaluator(config, task, mesh, stream.class_names)
        shapes = jax.eval_shape(task.init, jax.random.key(0), stream.example())
        params = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes)
        with pytest.raises(DataError, match="no picture of the eval set broken_32 can"):
            evaluator.run(params)


@pytest.mark.parametrize("name", ["retrieval", "zero_shot"])
def test_texts_are_not_asked_of_a_task_that_knows_none(name):
    evals = {"pairs": {"name": name, "sources": CLIPART, "sides": SIDES}}
    config, mesh = tiny.config(evals=evals), sharding.make_mesh()
    task = experiment.build_task(config, 8)
    with pytest.raises(ConfigError, match=r"'classification' of this run has no text"):
        Evaluator(config, task, mesh, ())


def test_names_of_classes_that_do_not_fit_are_refused_before_a_run():
    section = {"name": "zero_shot", "names": ("cat", "dog"), "sources": CLIPART}
    config = tiny.config(evals={"kinds": {**section, "sides": SIDES}})
    task = experiment.build_task(config, 8)
    with pytest.raises(ConfigError, match="has 8 classes, and 2 names are given"):
        Evaluator(config, task, sharding.make_mesh(), ())


@pytest.mark.parametrize("name", ["metrics", "segmentation"])
def test_a_set_of_other_classes_is_refused_before_a_run(name):
    evals = {"v": {"name": name, "sources": CLIPART, "sides": SIDES}}
    config, mesh = tiny.config(evals=evals), sharding.make_mesh()
    task = experiment.build_task(config, 8)
    with pytest.raises(ConfigError, match=r"has 8 classes .* must share their"):
        Evaluator(config, task, mesh, tuple("abcdefgh"))


def test_a_run_with_a_running_mean_is_judged_by_it_and_by_what_is_frozen(own, tmp_path):
    config = tiny.config(
        steps=2,
        model__depth=1,
        optim__lr=0.1,
        optim__schedule={"name": "constant"},
        optim__freeze=[("encoder/norm/.*", True)],
        train__ema=0.5,
        evals={"own": {"sources": own, "sides": SIDES[:1]}},
        **tiny.PLAIN,
    )
    assert train.train(config, tmp_path) == 0
    found = [reporting.read_metrics(epath.Path(tmp_path))[-1]]
    found.append(evaluate.evaluate(tmp_path))
    losses = {}
    for part in ("ema", "params"):
        path = epath.Path(tmp_path) / "checkpoints"
        restored = checkpoint.restore_params(path, subtree=part)
        params = jax.device_get(restored.state)
        losses[part] = judge(params, data.open_sources(own)[0][0], SIDES[0])[1].mean()
    assert losses["params"] != pytest.approx(losses["ema"], 0.01)
    # A run computes at the precision of its devices.
    for values in found:
        assert values["eval/own_32/loss"] == pytest.approx(losses["ema"], 1e-4)
