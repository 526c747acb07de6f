import jax
import numpy as np
import oracle
import pytest
import tiny
from etils import epath
from PIL import Image

from navit_jax import checkpoint, data, evaluate, experiment, reporting, sharding, train
from navit_jax.data import images
from navit_jax.data.sources import clipart
from navit_jax.errors import DataError
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


def test_a_run_with_a_running_mean_is_judged_by_it(own, tmp_path):
    config = tiny.config(
        steps=2,
        model__depth=1,
        optim__lr=0.1,
        optim__schedule={"name": "constant"},
        train__ema=0.5,
        evals={"own": {"sources": own, "sides": SIDES[:1]}},
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
