"""Two towers trained on their stream: stopped, split, locked, with a bad picture."""

import chex
import jax
import numpy as np
import pytest
import tiny
from etils import epath
from kills import assert_same_runs, signal_at
from PIL import Image
from test_contrastive import by_formula, mesh_of, numbers, on, run

from navit_jax import (
    checkpoint,
    experiment,
    host_signals,
    paths,
    reporting,
    train,
)

# What differs between runs is not the attention; this one compiles quickly.
TOWER = {"attention": "dense", "remat": "none"}
DROP = {"drop_path": 0.2, "dropout": 0.1}
LEARNING = {"optim__schedule": {"name": "constant"}}


def small(**changes):
    found = tiny.contrastive(**changes)
    found["model"] |= TOWER | DROP
    found["task"]["text"] |= TOWER | DROP
    return found


def saved(workdir):
    """The parameters of the last checkpoint, by name."""
    found = checkpoint.restore_params(epath.Path(workdir) / "checkpoints")
    return paths.flatten(jax.device_get(found.state))


def test_a_run_that_was_stopped_ends_as_if_it_had_not_been(tmp_path, monkeypatch):
    config, unbroken, broken = (
        small(steps=5),
        tmp_path / "unbroken",
        tmp_path / "broken",
    )
    assert train.train(config, unbroken) == 0
    with monkeypatch.context() as patch:
        signal_at(host_signals, "encode", 2, replace=patch.setattr)
        assert train.train(config, broken) == 42
    (left,) = (broken / "checkpoints").iterdir()
    assert 2 <= int(left.name) < 5
    assert train.train(config, broken) == 0
    assert_same_runs(broken, unbroken)
    losses = [r["train/loss"] for r in reporting.read_metrics(epath.Path(unbroken))]
    assert len(set(losses)) == 5
    assert np.isfinite(losses).all()


def test_eight_devices_in_two_parts_learn_from_the_stream_as_one_device_at_once():
    config = small(data__rows=16, steps=100, **LEARNING)
    stream = experiment.build_stream(config)
    task = experiment.build_task(config, stream.num_classes)
    chosen = stream.batches(np.arange(16))
    batches = [next(chosen)[0] for _ in range(10)]
    _, single = run(config, task, batches, mesh_of("one"))
    config["train"]["accumulate"] = 2
    _, split = run(config, task, batches, mesh_of("two axes"))
    # The sums of a product split over devices are rounded in another order.
    np.testing.assert_allclose(split, single, rtol=1e-5)
    assert single[-1] < single[0]


def test_a_locked_image_tower_is_that_of_the_classification_it_comes_from(tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    assert train.train(tiny.config(**tiny.PLAIN), first) == 0
    init = {"workdir": str(first), "allow_unused": ["head/.*"]}
    freeze = [["encoder/.*", True]]
    config = small(seed=1, model__init=init, optim__freeze=freeze, **LEARNING)
    config["model"]["depth"] = 2
    assert train.train(config, second) == 0
    given, found = saved(first), saved(second)
    tower = {k: v for k, v in found.items() if k.startswith("encoder/")}
    chex.assert_trees_all_equal(tower, {k: given.pop(k) for k in tower})
    assert set(given) == {"head/dense/kernel", "head/dense/bias"}


def test_a_picture_that_can_not_be_decoded_leaves_with_its_text(tmp_path, monkeypatch):
    monkeypatch.setenv("NAVIT_JAX_CACHE", str(tmp_path / "cache"))
    rng = np.random.default_rng(0)
    for i in range(8):
        pixels = rng.integers(0, 256, (48, 40, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{i}.png")
    bad = tmp_path / "3.png"
    bad.write_bytes(bad.read_bytes()[:2000])
    lines = [f"{i}.png,a picture of number {i} {'and more ' * i}" for i in range(8)]
    (tmp_path / "captions.csv").write_text("\n".join(["file,caption", *lines]))
    source = {"name": "folder", "path": str(tmp_path), "labels": False}
    source["captions"] = str(tmp_path / "captions.csv")
    config = small(data__sources={"mine": source}, data__rows=4, data__slots=3)
    stream = experiment.build_stream(config)
    task = experiment.build_task(config, stream.num_classes)
    batch, info = next(
        (batch, info) for batch, info in stream.batches(np.arange(4)) if info.skipped
    )
    assert [name for name, _ in info.skipped] == ["mine:3.png"] * len(info.skipped)
    good = np.zeros_like(batch.image_mask)
    for row, keys in enumerate(info.keys):
        good[row, : len(keys)] = [key != "mine:3.png" for key in keys]
    assert 0 < good.sum() == sum(map(len, info.keys)) - len(info.skipped)

    def compute(params, batch):
        weights, key = task.weights(batch), jax.random.key(1)
        return (
            task.loss(params, batch, key, weights),
            weights,
            task.embed(params, batch, key),
        )

    params = jax.jit(task.init)(jax.random.key(0), batch)
    (loss, means), weights, found = on(mesh_of("one"), compute)(params, batch)
    terms = by_formula(
        "softmax", found["image"][good], found["text"][good], *numbers(params)
    )
    assert weights["pairs"] == means["loss"].weight == good.sum()
    assert loss == pytest.approx(terms.mean(), rel=1e-5)
