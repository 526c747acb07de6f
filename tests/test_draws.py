import hashlib
import itertools

import numpy as np
import pytest
from scipy import stats

from navit_jax.data import draws

INDICES = np.arange(20_000)


@pytest.mark.parametrize("size", [*range(1, 40), 255, 256, 257, 1000, 4097, 70_001])
def test_an_epoch_holds_every_index_once(size):
    order = draws.permute(np.arange(size), size, seed=1, epoch=2)
    np.testing.assert_array_equal(np.sort(order), np.arange(size))


def test_a_position_is_sent_alone_where_it_is_sent_among_others():
    order = draws.permute(np.arange(1000), 1000, seed=1, epoch=2)
    alone = [draws.permute(np.array([i]), 1000, 1, 2)[0] for i in range(0, 1000, 97)]
    assert alone == order[::97].tolist()


def test_billions_of_images_need_no_memory():
    size = 3_000_000_000
    order = draws.permute(np.arange(size - 1000, size), size, seed=0, epoch=0)
    assert len(set(order.tolist())) == 1000
    assert 0 <= order.min() < order.max() < size


@pytest.mark.parametrize("size, num_orders", [(3, 6), (5, 120)])
def test_every_order_of_a_few_images_is_as_likely(size, num_orders):
    seeds = range(10 * num_orders)
    orders = [draws.permute(np.arange(size), size, seed, 0) for seed in seeds]
    _, counts = np.unique(orders, axis=0, return_counts=True)
    assert len(counts) == num_orders
    assert stats.chisquare(counts).pvalue > 1e-4


@pytest.mark.parametrize("size", [100, 1 << 10, 1500])
def test_places_of_neighbours_and_of_epochs_are_independent(size):
    orders = [draws.permute(np.arange(size), size, 3, epoch) for epoch in range(20)]
    limit = 5 / np.sqrt(size)
    for before, after in itertools.pairwise(orders):
        assert abs(stats.pearsonr(before, after).statistic) < limit
        assert abs(stats.pearsonr(before[1:], before[:-1]).statistic) < limit
        assert abs(stats.pearsonr(before, np.arange(size)).statistic) < limit


@pytest.mark.parametrize("purpose", ["side", "drop"])
@pytest.mark.parametrize("epoch", [0, 7, INDICES % 5], ids=["0", "7", "one each"])
def test_draws_are_uniform(purpose, epoch):
    u = draws.uniform(0, epoch, INDICES, purpose)
    assert 0 <= u.min() < u.max() < 1
    assert stats.kstest(u, "uniform").pvalue > 1e-4
    counts, _ = np.histogram(u, 100, (0, 1))
    assert stats.chisquare(counts).pvalue > 1e-4
    # Below the first bits too: a hash that only looks random on top would fail.
    assert stats.kstest(u * 2**20 % 1, "uniform").pvalue > 1e-4


def test_draws_do_not_follow_from_neighbours_epochs_seeds_or_purposes():
    u = draws.uniform(0, 0, INDICES, "side")
    others = {
        "neighbour": draws.uniform(0, 0, INDICES + 1, "side"),
        "far neighbour": draws.uniform(0, 0, INDICES + (1 << 40), "side"),
        "epoch": draws.uniform(0, 1, INDICES, "side"),
        "seed": draws.uniform(1, 0, INDICES, "side"),
        "large seed": draws.uniform(1 << 64, 0, INDICES, "side"),
        "purpose": draws.uniform(0, 0, INDICES, "drop"),
    }
    for name, v in others.items():
        assert abs(stats.spearmanr(u, v).statistic) < 5 / np.sqrt(len(u)), name
        counts, _, _ = np.histogram2d(u, v, 10, [(0, 1), (0, 1)])
        assert stats.chisquare(counts.ravel()).pvalue > 1e-4, name


def test_an_epoch_for_each_index_draws_as_that_epoch_does():
    epochs = np.array([3, 0, 3, 1])
    together = draws.key(5, epochs, np.arange(4), "flip")
    alone = [
        draws.key(5, int(e), np.array([i]), "flip")[0] for i, e in enumerate(epochs)
    ]
    assert together.tolist() == alone


def test_keys_are_these_for_ever():
    # A run resumed under another version of numpy must draw the same. The second way:
    # integers of Python, cut to 64 bits by hand.
    mask = 2**64 - 1

    def mix(x):
        x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & mask
        x = (x ^ x >> 27) * 0x94D049BB133111EB & mask
        return x ^ x >> 31

    digest = hashlib.blake2b(b"11/side", digest_size=8).digest()
    golden = 0x9E3779B97F4A7C15
    state = mix(4 * golden + int.from_bytes(digest, "big") & mask)
    expected = [mix(state + i * golden & mask) for i in range(5)]
    assert draws.key(11, 4, np.arange(5), "side").tolist() == expected


def test_one_number_is_mixed_as_it_is_in_an_array():
    numbers = np.random.default_rng(0).integers(0, 2**64, 100, np.uint64)
    numbers[:3] = 0, 1, 2**64 - 1
    expected = draws.mix(numbers)
    assert [draws.mix_one(int(x)) for x in numbers] == expected.tolist()
    assert draws.mix_one(int(numbers[5]) + 2**64) == expected[5]
