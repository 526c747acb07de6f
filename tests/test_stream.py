import collections
import dataclasses
import itertools

import numpy as np
import psutil
import pytest
import tiny
from PIL import Image

from navit_jax import data, experiment
from navit_jax.errors import ConfigError, DataError

FIELDS = ("patches", "coords", "segment_ids", "grids", "image_mask", "image_ids")


def take(stream, rows, num, position=None):
    chosen = stream.batches(np.asarray(rows), position)
    return [next(chosen) for _ in range(num)]


def assert_same(a, b):
    for field in FIELDS:
        np.testing.assert_array_equal(getattr(a, field), getattr(b, field))
    np.testing.assert_array_equal(a.targets["labels"], b.targets["labels"])


@pytest.fixture(scope="module")
def stream():
    return experiment.build_stream(tiny.config())


def test_a_batch_says_what_the_plan_and_the_loader_made(stream):
    batch, info = take(stream, range(8), 1)[0]
    planned = stream.plan.plan_window(0, 0)
    for r in range(8):
        row = planned.row(r)
        assert len(info.keys[r]) == len(row.index) == batch.image_mask[r].sum()
        counts = np.bincount(batch.segment_ids[r], minlength=7)[1 : len(row.kept) + 1]
        np.testing.assert_array_equal(counts, row.kept)
        np.testing.assert_array_equal(batch.grids[r, : len(row.grid)], row.grid)
        for i in range(len(row.index)):
            record = stream.loader.sources[0][int(row.index[i])]
            labels = [x for x in batch.targets["labels"][r, i].tolist() if x >= 0]
            assert labels == list(record.labels)
            assert info.keys[r][i] == f"clipart:{record.key}"


def test_two_hosts_load_the_halves_of_what_one_loads(stream):
    whole = take(stream, range(8), 3)
    for rows in (range(4), range(4, 8)):
        for (part, info), (batch, whole_info) in zip(
            take(stream, rows, 3), whole, strict=True
        ):
            cut = dataclasses.replace(
                batch,
                **{f: getattr(batch, f)[rows.start : rows.stop] for f in FIELDS},
                targets={"labels": batch.targets["labels"][rows.start : rows.stop]},
            )
            assert_same(part, cut)
            first = rows.start == 0
            assert info.position == (whole_info.position if first else [None])


def test_going_on_from_a_position_gives_the_batches_that_come_next(stream):
    whole = take(stream, range(8), 5)
    rest = take(stream, range(8), 3, position=whole[1][1].position)
    for (a, info_a), (b, info_b) in zip(rest, whole[2:], strict=True):
        assert_same(a, b)
        assert info_a == info_b


def test_worker_processes_give_the_same_batches(stream):
    several = dataclasses.replace(stream, workers=2)
    pairs = zip(take(several, range(8), 3), take(stream, range(8), 3), strict=True)
    for (a, info_a), (b, info_b) in pairs:
        assert_same(a, b)
        assert info_a == info_b


def test_a_killed_worker_is_an_error_and_no_hang(stream):
    chosen = dataclasses.replace(stream, workers=1).batches(np.arange(8))
    next(chosen)
    children = psutil.Process().children()
    workers = [c for c in children if "spawn_main" in " ".join(c.cmdline())]
    assert workers
    for worker in workers:
        worker.kill()
    with pytest.raises(RuntimeError, match="terminated unexpectedly with exit code -9"):
        collections.deque(itertools.islice(chosen, 100), maxlen=0)


def test_evaluation_sees_each_image_once_and_pads_the_last_batch():
    section = {
        "sources": {"clipart": {"name": "clipart", "split": "validation"}},
        "sides": (48,),
    }
    config = tiny.config()
    _, stream = next(experiment.build_eval_streams(config, section, "validation"))
    seen = []
    for batch, _ in stream.batches(np.arange(8)):
        assert batch.image_mask.shape == (8, 6)
        seen += batch.image_ids[batch.image_mask][:, 1].tolist()
    assert sorted(seen) == list(range(len(stream.loader.sources[0])))


@pytest.fixture
def folder(tmp_path):
    for name, content in (("a/1", 10), ("a/2", 20), ("b/3", 30)):
        path = tmp_path / f"{name}.png"
        path.parent.mkdir(exist_ok=True)
        Image.new("RGB", (40, 32), (content,) * 3).save(path)
    (tmp_path / "b" / "4.jpg").write_bytes(b"<html>not found</html>")
    return tmp_path


def test_a_bad_image_leaves_its_slot_empty_and_is_named(folder):
    sources = {"mine": {"name": "folder", "path": str(folder)}}
    crop = {"name": "none"}
    config = tiny.config(data__sources=sources, data__rows=1, data__crop=crop)
    stream = experiment.build_stream(config)
    batch, info = take(stream, [0], 1)[0]
    assert [reason for _, reason in info.skipped] == ["not_image"]
    assert info.skipped[0][0].endswith("b/4.jpg")
    slot = info.keys[0].index(info.skipped[0][0])
    assert not batch.image_mask[0, slot]
    assert not (batch.segment_ids[0] == slot + 1).any()
    # Its number stays its own: the images after it keep theirs.
    used = set(batch.segment_ids[0].tolist()) - {0}
    assert used == {i + 1 for i in range(len(info.keys[0])) if i != slot}


def test_a_picture_with_more_labels_than_planned_for_is_named():
    stream = experiment.build_stream(tiny.config(data__num_labels=1))
    with pytest.raises(DataError, match=r"has 2 labels; raise config.data.num_labels"):
        take(stream, range(8), 100)


def test_mixed_sources_must_share_their_classes(folder):
    sources = {
        "mine": {"name": "folder", "path": str(folder)},
        "clipart": {"name": "clipart", "split": "train"},
    }
    with pytest.raises(ConfigError, match="must share their classes"):
        data.open_sources(sources)
    # As many classes, but others.
    for name in "cd":
        (folder / "other" / name).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(folder / "other" / name / "1.png")
    sources["clipart"] = {"name": "folder", "path": str(folder / "other")}
    sources["mine"]["path"] = str(folder / "mine")
    for name in "ab":
        (folder / "mine" / name).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(folder / "mine" / name / "1.png")
    with pytest.raises(ConfigError, match="must share their classes"):
        data.open_sources(sources)


def test_the_share_of_each_source_is_that_of_its_weight():
    sources = {
        name: {"name": "clipart", "split": split, "weight": weight}
        for name, split, weight in (("old", "train", 3.0), ("new", "validation", 1.0))
    }
    stream = experiment.build_stream(tiny.config(data__sources=sources))
    keys = [
        k for _, info in take(stream, range(8), 20) for row in info.keys for k in row
    ]
    share = sum(key.startswith("old:") for key in keys) / len(keys)
    assert share == pytest.approx(0.75, abs=0.03)
