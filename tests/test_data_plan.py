import dataclasses
import itertools
import json
import pickle

import numpy as np
import pytest
from plans import images, make_plan, table

from navit_jax.data import crop, resolution, token_drop
from navit_jax.data.window import enough_slots
from navit_jax.errors import ConfigError, DataError


@pytest.mark.parametrize("num_images", [1, 7, 256, 257, 700])
def test_every_image_comes_exactly_once_an_epoch(num_images):
    plan = make_plan((num_images,))
    epochs = []
    for epoch in range(3):
        windows = [plan.plan_window(epoch, w) for w in range(plan.num_windows)]
        seen = np.concatenate([window.images.index for window in windows])
        assert sorted(seen) == list(range(num_images))
        place = np.concatenate([window.images.images_seen for window in windows])
        expected = epoch * num_images + np.arange(num_images)
        np.testing.assert_array_equal(np.sort(place), expected)
        epochs.append(seen[np.argsort(place)].tolist())
    assert num_images < 10 or epochs[0] != epochs[1] != epochs[2]


def test_a_row_holds_what_the_laws_say_of_each_of_its_images():
    plan = make_plan(
        resolution=resolution.Uniform(48, 96),
        tokens=400,
        slots=40,
        token_drop=token_drop.Constant(0.25),
        flip=0.3,
        jitter=0.4,
        crop=crop.Inception(0.5, 1.0),
    )
    window = plan.plan_window(1, 0)
    drawn = window.images
    for i in range(len(drawn.index)):
        height, width = plan.tables[0][drawn.index[i]].tolist()
        assert drawn.size[i].tolist() == [height, width]
        top, left, bottom, right = drawn.box[i]
        height, width = height * (bottom - top), width * (right - left)
        rows, columns = drawn.grid[i]
        # Between the grids of the smallest and of the largest side.
        for grid, pixels in ((rows, height), (columns, width)):
            low, high = (s * pixels / (height * width) ** 0.5 / 16 for s in (48, 96))
            assert max(1, int(low)) <= grid <= max(1, int(high + 1e-6))
        assert drawn.kept[i] == max(1, np.rint(0.75 * rows * columns))
    assert 0.2 < drawn.flip.mean() < 0.4
    assert drawn.jitter.min() >= 0.6
    assert drawn.jitter.max() <= 1.4
    assert len(set(drawn.drop_key.tolist())) == len(drawn.index)
    again = plan.plan_window(2, 0).images
    common, here, there = np.intersect1d(drawn.index, again.index, return_indices=True)
    assert len(common) > 50
    assert (drawn.drop_key[here] != again.drop_key[there]).all()
    assert (drawn.box[here] != again.box[there]).any(1).mean() > 0.9


def test_rows_keep_to_tokens_and_slots_and_the_table_of_positions():
    plan = make_plan(tables=[np.array([[20, 3000]] * 50 + [[90, 90]] * 50)], max_side=9)
    window = plan.plan_window(0, 0)
    for r in range(len(window)):
        row = window.row(r)
        assert 1 <= len(row.kept) <= 8
        assert row.kept.sum() <= 64
    grid = window.images.grid
    assert grid.max() == 9
    wide = window.images.size[:, 1] == 3000
    assert window.images.shrunk[wide].all()
    assert (grid[wide] == [1, 9]).all()
    assert not window.images.shrunk[~wide].any()


def test_size_does_not_follow_from_the_place_in_a_window():
    plan = make_plan((4000,), window=4000, packer="closing")
    window = plan.plan_window(0, 0)
    kept = window.images.kept
    mean = [kept[a:b].mean() for a, b in itertools.pairwise(window.starts)]
    place = np.arange(len(window))
    assert abs(np.corrcoef(place, mean)[0, 1]) < 4 / np.sqrt(len(window))


def test_an_unreadable_image_has_one_patch_and_its_turn():
    tables = [np.concatenate([np.zeros((20, 2), np.uint16), table(20)])]
    for law in (resolution.Native(64), resolution.Fixed(64)):
        plan = make_plan(tables=tables, resolution=law, crop=crop.Inception())
        drawn = plan.plan_window(0, 0).images
        unreadable = drawn.size[:, 0] == 0
        assert unreadable.sum() == 20
        assert (drawn.grid[unreadable] == 1).all()
        assert (drawn.kept[unreadable] == 1).all()


def test_the_plain_vit_is_one_square_image_a_row():
    plan = make_plan(
        slots=1,
        tokens=196,
        square=True,
        resolution=resolution.Fixed(224),
        token_drop=token_drop.NoDrop(),
        crop=crop.Inception(),
        max_side=14,
    )
    window = plan.plan_window(0, 0)
    assert len(window) == len(window.images.index)
    assert (window.images.grid == 14).all()
    assert plan.report()["padding"] == 0
    changes = {"token_drop": token_drop.Beta(0.5, 0.9), "tokens": 32}
    drawn = make_plan(square=True, **changes).plan_window(0, 0).images
    assert drawn.shrunk.any()
    np.testing.assert_array_equal(drawn.grid[:, 0], drawn.grid[:, 1])


def test_rows_are_filled_by_their_last_image_as_far_as_it_has_tokens():
    plain, filled = make_plan(), make_plan(fill=True)
    before, after = plain.plan_window(0, 0), filled.plan_window(0, 0)
    assert len(before) == len(after)
    for r in range(len(after)):
        row, other = after.row(r), before.row(r)
        np.testing.assert_array_equal(row.index, other.index)
        np.testing.assert_array_equal(row.kept[:-1], other.kept[:-1])
        assert row.kept.sum() == 64 or row.kept[-1] == row.grid[-1].prod()
    assert filled.report()["padding"] < plain.report()["padding"] / 2


def test_a_schedule_goes_by_the_place_in_the_stream():
    schedule = {"start": 0.9, "end": 0.1, "total": 1400}
    plan = make_plan(
        token_drop=token_drop.Constant(schedule=schedule),
        resolution=resolution.Uniform(32, 64),
    )
    rates = []
    for number in range(6):
        drawn = plan.plan_window(*plan.label(number)).images
        full = drawn.grid.prod(1)
        rate = plan.token_drop.average(drawn.images_seen)
        expected = np.maximum(1, np.rint((1 - rate) * full))
        np.testing.assert_array_equal(drawn.kept, expected)
        rates.append(rate.mean())
    assert rates == sorted(rates, reverse=True)
    assert rates[0] > 0.8
    assert rates[-1] < 0.2


def test_a_mapped_table_travels_by_name(tmp_path):
    np.save(tmp_path / "sizes.npy", table(50_000))
    mapped = np.load(tmp_path / "sizes.npy", mmap_mode="r")
    plan = make_plan(tables=[mapped])
    sent = pickle.dumps(plan)
    assert len(sent) < 5_000
    copy = pickle.loads(sent)
    assert copy.fingerprint() == plan.fingerprint()
    assert copy.fingerprint() == make_plan(tables=[table(50_000)]).fingerprint()
    part = pickle.loads(pickle.dumps(make_plan(tables=[mapped[10:60]])))
    np.testing.assert_array_equal(part.tables[0], table(50_000)[10:60])


def test_the_report_counts_what_the_rows_hold():
    plan = make_plan(
        (600, 300),
        weights=[2, 1],
        max_side=6,
        slots=5,
        resolution=resolution.Uniform(32, 96),
    )
    report = plan.report(windows=2)
    rows = [
        window.row(r)
        for window in (plan.plan_window(0, 0), plan.plan_window(0, 1))
        for r in range(len(window))
    ]
    tokens = sum(int(n) for row in rows for n in row.kept)
    count = len(images(rows))
    assert report["rows"] == len(rows)
    assert report["images"] == count == 512
    assert report["tokens"] == tokens
    np.testing.assert_allclose(report["padding"], 1 - tokens / (64 * len(rows)))
    np.testing.assert_allclose(report["images_per_row"], count / len(rows))
    np.testing.assert_allclose(report["slot_use"], count / (5 * len(rows)))
    full = sum(len(row.kept) == 5 for row in rows) / len(rows)
    np.testing.assert_allclose(report["full_rows"], full)
    work = sum(int(n) ** 2 for row in rows for n in row.kept)
    np.testing.assert_allclose(report["attention_work"], work / (len(rows) * 64**2))
    assert report["shrunk"] == sum(int(row.shrunk.sum()) for row in rows) > 0
    shares = [sum(s == i for s, _ in images(rows)) / count for i in (0, 1)]
    np.testing.assert_allclose(report["source_shares"], shares)
    assert json.loads(json.dumps(report)) == report


@pytest.mark.parametrize(
    "lengths, enough", [([8] * 80, 8), ([64] * 9, 1), ([1] * 640, 64)]
)
def test_enough_slots_are_those_that_pad_no_more_than_more_would(lengths, enough):
    assert enough_slots(np.array(lengths)[:, None], [64], "auto") == enough


def test_the_fingerprint_tells_plans_apart():
    plan = make_plan()
    assert plan.fingerprint() == make_plan().fingerprint()
    tables = [plan.tables[0].copy()]
    tables[0][5, 1] += 1
    others = [
        {"seed": 4},
        {"slots": 9},
        {"rows": 24},
        {"packer": "closing"},
        {"resolution": resolution.Uniform(32, 127)},
        {"token_drop": token_drop.Constant(0.4)},
        {"crop": crop.Inception()},
        {"tables": tables},
        {"tables": [plan.tables[0][:-1]]},
        {"training": False},
    ]
    changed = [dataclasses.replace(plan, **other) for other in others]
    prints = {p.fingerprint() for p in [plan, *changed]}
    assert len(prints) == 1 + len(others)
    plan.check_fingerprint(make_plan().fingerprint())
    with pytest.raises(ConfigError, match="is not that of this config and data"):
        plan.check_fingerprint(changed[0].fingerprint())


@pytest.mark.parametrize(
    "changes, error, message",
    [
        ({"tables": [np.zeros((0, 2))]}, DataError, "source 0 has no images"),
        ({"plan_shards": 5}, ConfigError, "plan_shards=5 must divide data.rows=12"),
        ({"slots": 0}, ConfigError, "data.slots=0 must be >= 1"),
        ({"flip": 2}, ConfigError, "data.flip=2"),
        ({"packer": "bestfit"}, ConfigError, "did you mean 'best_fit'"),
        ({"max_side": 7}, ConfigError, "positions.length=7: 112 px, 49 patches"),
        ({"tokens": 31}, ConfigError, "keeps 32 tokens, but a row has tokens=31"),
        (
            {"token_drop": token_drop.NoDrop(), "tokens": 63},
            ConfigError,
            "keeps 64 tokens",
        ),
        (
            {
                "token_drop": token_drop.Constant(
                    schedule={"start": 0.8, "end": 0.2, "total": 9}
                ),
                "tokens": 50,
            },
            ConfigError,
            "keeps 51 tokens",
        ),
        (
            {"sizes": (9, 9), "training": False},
            ConfigError,
            "evaluation takes one source, not 2",
        ),
    ],
)
def test_what_can_not_work_is_refused_before_it_begins(changes, error, message):
    with pytest.raises(error, match=message):
        make_plan(**changes)


def test_a_square_image_at_the_limits_is_no_error():
    make_plan(max_side=8, tokens=32)
    make_plan(resolution=resolution.Native(), max_side=1, tokens=1)
