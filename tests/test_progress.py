import dataclasses

import captioned
import jax
import jax.numpy as jnp
import numpy as np
import optax
import packed
import pytest
from etils import epath

from navit_jax import optim, reporting, train_state
from navit_jax.batch import BatchInfo
from navit_jax.host_signals import Totals
from navit_jax.metrics import Mean
from navit_jax.progress import Progress

ROWS, TOKENS, TEXT, PEAK = 2, 10, 6, 1000.0
PLACE = Totals(planned=5, skipped=1, stop=False, position=[[1, 2, 3]], images_seen=77)


def flops(counts):
    price = {"tokens": 2, "attention_pairs": 3, "images": 5}
    price |= {"text_tokens": 7, "text_attention_pairs": 11, "texts": 13}
    return sum(each * counts[name] for name, each in price.items())


@pytest.fixture
def clock(monkeypatch):
    """Holds the time; a test sets its only entry."""
    now = [100.0]
    monkeypatch.setattr(reporting.time, "monotonic", lambda: now[0])
    return now


def start(folder, steps=10, peak=PEAK):
    return Progress(
        writer=reporting.MetricWriter(epath.Path(folder)),
        steps=steps,
        report_every=3,
        rows=ROWS,
        num_tokens=TOKENS,
        flops=flops,
        peak_flops=peak,
    )


def info(skipped=(), notes=None, shrunk=()):
    return BatchInfo(
        position=[[1, 2, 3]],
        images_seen=[77],
        keys=[["a:x", "b:y", "a:z"], ["a:w"]],
        skipped=list(skipped),
        shrunk=list(shrunk),
        notes=notes or {},
    )


def metrics(lengths, loss, labelled, finite=True, texts=(), **told):
    """What a step says: lengths of its images and texts, the total of the losses."""
    return {
        "means": {"loss": Mean(total=loss, weight=labelled)},
        "counts": {
            "images": len(lengths),
            "tokens": sum(lengths),
            "attention_pairs": sum(n * n for n in lengths),
            "texts": len(texts),
            "text_tokens": sum(texts),
            "text_attention_pairs": sum(n * n for n in texts),
            "text_room": ROWS * TEXT,
        },
        "finite": finite,
        "gradient_norm": 0.0,
        "learning_rate": 0.0,
        "nonfinite": 0,
        **told,
    }


def test_a_record_is_what_a_hand_computes(clock, tmp_path):
    progress = start(tmp_path)
    bad = [("a:x", "truncated")]
    progress.add(1, info(bad), PLACE, metrics([9], 9.0, 1))
    clock[0] = 103.0
    progress.add(
        2, info(bad, {"animated": 2}, ["a:x"]), PLACE, metrics([4, 4, 6], 6.0, 3)
    )
    failed = metrics([5], float("nan"), 1, finite=False)
    clock[0] = 105.0
    progress.add(3, info([("b:y", "empty")]), PLACE, failed)
    last = metrics(
        [2, 8, 7],
        1.0,
        2,
        texts=[3, 4],
        gradient_norm=2.5,
        learning_rate=0.125,
        nonfinite=1,
    )
    # A second before an evaluation of 14 s, and two after it.
    progress.evaluated(3, {"eval/v_32/loss": 3.0}, 14.0)
    clock[0] = 122.0
    progress.add(4, info(), PLACE, metrics([10, 10], 3.0, 2, texts=[6]))
    progress.add(5, info(), PLACE, metrics([], 0.0, 0))
    progress.add(6, info(), PLACE, last)
    progress.close()
    first, second, evaluated, third = reporting.read_metrics(epath.Path(tmp_path))
    assert first["train/loss"] == 9.0
    assert not any(name.startswith("throughput/") for name in first)
    assert evaluated == {"step": 3, "eval/v_32/loss": 3.0}

    # Steps 2 and 3, of which the second was not finite, in 5 s.
    assert second["step"] == 3
    assert second["train/loss"] == 6.0 / 3
    assert second["pack/padding"] == pytest.approx(1 - (14 + 5) / (2 * 20))
    assert second["pack/images_per_row"] == 4 / 4
    assert second["throughput/images_per_second"] == 4 / 5
    assert second["data/skipped"] == 3

    # Steps 4 to 6: 5 images and 37 tokens in 17 - 14 s.
    useful = 2 * 37 + 3 * (100 + 100 + 4 + 64 + 49) + 5 * 5
    useful += 7 * 13 + 11 * (36 + 9 + 16) + 13 * 3
    dense = 2 * 60 + 3 * (6 * 100) + 5 * 5
    dense += 7 * 36 + 11 * (6 * 36) + 13 * 3
    expected = {
        "step": 6,
        "train/loss": (3.0 + 0.0 + 1.0) / (2 + 0 + 2),
        "train/gradient_norm": 2.5,
        "train/learning_rate": 0.125,
        "train/nonfinite_steps": 1,
        "pack/padding": 1 - 37 / 60,
        "pack/text_padding": 1 - 13 / 36,
        "pack/images_per_row": 5 / 6,
        "throughput/images_per_second": 5 / 3,
        "throughput/tokens_per_second": 37 / 3,
        "throughput/step_seconds": 1.0,
        "throughput/mfu": useful / 3 / PEAK,
        "throughput/mfu_padded": dense / 3 / PEAK,
        "data/images_seen": 77,
        "data/tokens_seen": 9 + 14 + 5 + 37,
        "data/skipped": 6,  # one of all hosts a step
        "data/skipped/truncated": 2,
        "data/skipped/empty": 1,
        "data/notes/animated": 2,
        "data/share/a": 3 / 4,
        "data/share/b": 1 / 4,
        "data/shrunk": 1,
    }
    assert third.pop("position") == [[1, 2, 3]]
    assert third == {k: pytest.approx(v) for k, v in expected.items()}


def test_an_interval_without_a_finite_step_has_no_loss_and_an_unknown_peak_no_mfu(
    clock, tmp_path
):
    progress = start(tmp_path, steps=2, peak=float("nan"))
    progress.add(1, info(), PLACE, metrics([9], 9.0, 1))
    clock[0] += 1.0
    progress.add(2, info(), PLACE, metrics([9], float("inf"), 1, finite=False))
    progress.close()
    last = reporting.read_metrics(epath.Path(tmp_path))[-1]
    assert last["step"] == 2  # the last one, of an interval that is not full
    assert last["train/loss"] is None
    assert last["throughput/images_per_second"] == 1
    assert not any("mfu" in name for name in last)


def test_the_counts_of_a_batch_are_those_of_a_loop_over_its_images():
    sizes = [[(3, 4), (2, 5)], [(1, 1), (4, 4), (5, 2)], []]
    rows = [
        [packed.image(len(row) * 10 + i, grid) for i, grid in enumerate(row)]
        for row in sizes
    ]
    batch = jax.tree.map(jnp.asarray, packed.pack(rows))
    # One that failed has a number and no token.
    batch = dataclasses.replace(batch, image_ids=batch.image_ids.at[0, 2].set(7))
    lengths = [h * w for row in sizes for h, w in row]
    counts = {
        "images": len(lengths),
        "tokens": sum(lengths),
        "attention_pairs": sum(n * n for n in lengths),
    }
    assert train_state.batch_counts(batch) == counts
    texts = [[3, 5], [None, 2, 7], []]
    captions = [[n and captioned.caption(7, n) for n in row] for row in texts]
    paired = captioned.with_texts(batch, captions)
    paired = jax.tree.map(jnp.asarray, paired)
    lengths = [n for row in texts for n in row if n]
    assert train_state.batch_counts(paired) == {
        **counts,
        "texts": 4,
        "text_tokens": sum(lengths),
        "text_attention_pairs": sum(n * n for n in lengths),
        "text_room": 3 * captioned.T,
    }


class Slope:
    """A task whose gradients are (3, -4), and 12 and the locked value for two more."""

    def init(self, key, batch):
        return {"w": jnp.zeros(2), "locked": jnp.float32(2), "more": jnp.float32(0)}

    def weights(self, batch):
        return {}

    def loss(self, params, batch, key, weights):
        slope = params["w"] @ jnp.array([3.0, -4.0])
        return slope + params["locked"] * (12 + params["more"]), {}

    def outputs(self, params, batch):
        return {}

    def metrics(self, params, batch):
        return {}


@pytest.mark.parametrize(
    "freeze, norm",
    [
        ((), (9 + 16 + 144 + 4) ** 0.5),
        ((("locked", True),), (9 + 16 + 4) ** 0.5),
        ((("locked|more", True),), 5),
    ],
    ids=["none", "one", "two"],
)
def test_the_norm_that_is_told_is_of_what_is_trained_before_clipping(freeze, norm):
    batch, task = jax.tree.map(jnp.asarray, packed.pack([[]])), Slope()
    section = {"name": "sgd", "lr": 1.0, "schedule": {"name": "constant"}}
    section |= {"freeze": freeze, "clip": 0.5, "decay": ()}
    params = task.init(None, batch)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(optim.OPTIMIZERS, "sgd", optax.identity)
        tx, _ = optim.build(section, 10, params)
    state = train_state.init_state(task, tx, jax.random.key(0), batch)
    signals = jnp.zeros((1, 1), jnp.int32)
    state, told = train_state.train_step(
        state, batch, signals, task=task, tx=tx, seed=0, freeze=freeze
    )
    assert told["gradient_norm"] == pytest.approx(norm)
    gradient = {"w": np.array([3.0, -4.0]), "locked": 12.0, "more": 2.0}
    for name, value in state.params.items():
        still = any(name in pattern.split("|") for pattern, _ in freeze)
        moved = 0 if still else -gradient[name] * 0.5 / norm
        np.testing.assert_allclose(value - params[name], moved, rtol=1e-6)
