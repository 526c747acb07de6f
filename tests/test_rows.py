import collections
import json
import pickle
import threading

import numpy as np
import pytest
from plans import all_rows, images, make_plan, same

from navit_jax.data.rows import Batches, Rows
from navit_jax.data.window import EMPTY
from navit_jax.errors import ConfigError


@pytest.mark.parametrize("plan_shards, spread", [(1, 1), (3, 2)])
def test_no_image_is_ahead_of_the_others(plan_shards, spread):
    batches = Batches(make_plan((90,), window=25, plan_shards=plan_shards))
    for stop in (5, 6, 7, 20):
        seen = collections.Counter(images(all_rows(batches, range(stop))))
        assert len(seen) == 90
        # Shards do not wait for each other, so one may be an epoch's end ahead.
        assert max(seen.values()) - min(seen.values()) <= spread


@pytest.mark.parametrize("plan_shards", [1, 2, 4])
@pytest.mark.parametrize("stops", [[], [0], [2, 3], [0, 1, 4, 5]])
def test_resuming_anywhere_on_any_hosts_gives_the_same_global_batches(
    plan_shards, stops
):
    plan = make_plan((90,), window=25, plan_shards=plan_shards)
    expected = [Batches(plan).rows(k) for k in range(8)]
    batches, first = Batches(plan), 0
    for k in range(8):
        num_hosts = (1, 2, 3, 6)[k % 4]
        share = 12 // num_hosts
        rows = []
        for host in range(num_hosts):
            rows += batches.rows(k - first, host * share, (host + 1) * share)
        assert len(rows) == 12
        assert all(map(same, rows, expected[k]))
        if k in stops:
            # A new process knows only what the checkpoint says, in JSON.
            position = json.loads(json.dumps(batches.position(k - first)))
            batches, first = Batches(make_plan((90,), **_of(plan)), position), k + 1


def _of(plan):
    return {"window": plan.window, "plan_shards": plan.plan_shards}


def test_a_batch_without_end_crosses_epochs_and_windows():
    plan = make_plan((5,), rows=30, window=2)
    seen = collections.Counter(images(Batches(plan).rows(0)))
    assert len(seen) == 5
    assert max(seen.values()) - min(seen.values()) <= 1


def test_a_position_is_where_the_next_row_is_and_comes_back_as_itself():
    plan = make_plan()
    rows = Rows(plan)
    for i in (0, 1, 40, 41, 130, 500):
        position = rows.position(i)
        later = Rows(plan, 0, position)
        assert later.position(0) == position
        assert same(later[0], rows[i])
        assert same(later[77], rows[i + 77])
        assert later.position(77) == rows.position(i + 77)
        assert later.images_before(77) == rows.images_before(i + 77)
        window = plan.plan_window(*position[:2])
        assert same(window.row(position[2]), rows[i])


def test_rows_can_be_had_in_any_order():
    plan = make_plan((90,), window=25)
    forward = Rows(plan)
    expected = [forward[i] for i in range(200)]
    backward = Rows(plan)
    assert all(same(backward[i], expected[i]) for i in reversed(range(200)))


@pytest.mark.parametrize("plan_shards", [1, 3])
def test_images_seen_counts_the_images_of_all_batches(plan_shards):
    plan = make_plan(plan_shards=plan_shards)
    batches, count = Batches(plan), 0
    resumed = Batches(plan, batches.position(4))
    for k in range(12):
        count += len(images(batches.rows(k)))
        assert batches.images_seen(k) == count
        if k > 4:
            assert resumed.images_seen(k - 5) == count


def test_a_slice_plans_only_its_shards():
    plan = make_plan(plan_shards=3)
    whole, part = Batches(plan), Batches(plan)
    assert all(map(same, part.rows(5, 4, 8), whole.rows(5)[4:8]))
    before, mine, after = part.position(5, 4, 8)
    assert before is None
    assert after is None
    assert mine == whole.position(5)[1]
    assert [bool(rows._stops) for rows in part._shards] == [False, True, False]
    parts = [part.images_seen(5, start, start + 4) for start in (0, 4, 8)]
    assert sum(parts) == whole.images_seen(5)


def test_shards_share_no_window():
    plan = make_plan(plan_shards=3)
    for k in range(4):
        for r, row in enumerate(Batches(plan).rows(k)):
            windows = np.searchsorted(
                plan.images_before(np.arange(99)), row.images_seen, side="right"
            )
            assert set((windows - 1) % 3) == {r // 4}


def test_positions_of_another_number_of_shards_are_refused():
    position = Batches(make_plan(plan_shards=3)).position(2)
    with pytest.raises(ConfigError, match="plan_shards=1, but the position is of 3"):
        Batches(make_plan(), position)
    with pytest.raises(ConfigError, match="is not of shard 1"):
        Rows(make_plan(plan_shards=2), 1, [0, 0, 0])


def test_threads_and_processes_agree():
    batches = Batches(make_plan((90,), window=25))
    expected = [batches.rows(k) for k in range(20)]
    copy = pickle.loads(pickle.dumps(batches))
    got = {}

    def work(first):
        for k in range(first, 20, 4):
            got[k] = copy.rows(k)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(all(map(same, got[k], expected[k])) for k in range(20))


@pytest.mark.parametrize("plan_shards", [1, 3])
@pytest.mark.parametrize("num_images", [1, 700])
def test_evaluation_plans_each_image_once_and_fills_up_with_empty_rows(
    num_images, plan_shards
):
    plan = make_plan((num_images,), training=False, plan_shards=plan_shards, flip=0.5)
    batches = Batches(plan)
    rows = all_rows(batches, range(len(batches)))
    assert len(rows) == 12 * len(batches)
    assert sorted(images(rows)) == [(0, i) for i in range(num_images)]
    assert any(same(row, EMPTY) for row in rows) or len(rows) % 12 == 0
    assert not any(row.flip.any() for row in rows)
    # Nothing is dropped, though the plan has a law for it.
    assert all((row.kept == row.grid.prod(1)).all() for row in rows)
    with pytest.raises(IndexError):
        batches.rows(len(batches))
    if plan_shards == 1:
        assert len(batches) == -(-len(Rows(plan)) // 12)
    assert batches.images_seen(len(batches) - 1) == num_images
    done = Batches(plan, batches.position(len(batches) - 1))
    assert len(done) == 0


def test_evaluation_takes_images_in_the_order_of_the_table():
    plan = make_plan(training=False, packer="next_fit")
    seen = images(row for k, row in enumerate(Rows(plan)) if k < 9)
    assert seen == [(0, i) for i in range(len(seen))]
