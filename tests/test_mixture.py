import collections

import numpy as np
import pytest
from plans import all_rows, images, make_plan, same

from navit_jax.data.mixture import PERIOD, Mixture
from navit_jax.data.rows import Batches
from navit_jax.errors import ConfigError


@pytest.mark.parametrize("weights", [(1.0,), (3, 1), (0.7, 0.2, 0.1), (1, 1, 1, 1000)])
def test_a_mixture_takes_each_source_in_its_share_and_in_its_order(weights):
    sizes = tuple(50 + 13 * i for i in range(len(weights)))
    mixture = Mixture(sizes, weights)
    assert sum(mixture.quotas) == PERIOD
    source, epoch, place = mixture.locate(np.arange(3 * PERIOD + 100))
    for i, size in enumerate(sizes):
        mine = source == i
        taken = epoch[mine] * size + place[mine]
        np.testing.assert_array_equal(taken, np.arange(mine.sum()))
        assert place[mine].max() < size
        share = weights[i] / sum(weights)
        ahead = np.cumsum(mine) - share * np.arange(1, len(mine) + 1)
        # The pattern is even; rounding to the period adds up over three of them.
        assert abs(ahead).max() < 1 + len(weights) + 3
    n = mixture.longest_window()
    for i, size in enumerate(sizes):
        run = np.concatenate([[0], np.cumsum(source == i)])
        assert n == 1 or (run[n:] - run[:-n]).max() <= size


def test_a_mixture_is_planned_and_resumed_as_one_source_is():
    plan = make_plan((300, 900), weights=[3, 1], window=200)
    batches = Batches(plan)
    rows = all_rows(batches, range(30))
    seen = collections.Counter(images(rows))
    counts = [sum(n for (s, _), n in seen.items() if s == i) for i in (0, 1)]
    assert abs(counts[0] / sum(counts) - 0.75) < 0.02
    # Each has epochs of its own: no image is ahead of another by more than the window
    # that is not over.
    of_first = [seen[0, i] for i in range(300)]
    assert max(of_first) - min(of_first) <= 2
    resumed = Batches(plan, batches.position(11))
    assert all(map(same, resumed.rows(3), batches.rows(15)))
    assert resumed.images_seen(17) == batches.images_seen(29) == sum(counts)
    shares = plan.report(windows=4)["source_shares"]
    np.testing.assert_allclose(shares, [0.75, 0.25], atol=0.01)


def test_sources_of_a_mixture_have_orders_and_draws_of_their_own():
    plan = make_plan((2000, 2000), window=4000)
    drawn = plan.plan_window(0, 0).images
    first, second = (drawn.index[drawn.source == i] for i in (0, 1))
    order = np.argsort(drawn.images_seen)
    first, second = (drawn.index[order][drawn.source[order] == i] for i in (0, 1))
    assert abs(np.corrcoef(first[:1900], second[:1900])[0, 1]) < 0.1
    keys = [dict(zip(drawn.index, drawn.drop_key, strict=True))]
    assert len(set(drawn.drop_key.tolist())) == len(drawn.index) > len(keys[0])


def test_a_weight_that_rounds_to_nothing_is_refused():
    with pytest.raises(ConfigError, match=r"weight=0.0001 is less than 1/4096"):
        make_plan((9, 9), weights=[1.0, 0.0001])
    with pytest.raises(ConfigError, match="weight=-1"):
        make_plan((9, 9), weights=[3, -1])
