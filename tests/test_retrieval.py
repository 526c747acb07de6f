import itertools

import numpy as np
import pytest

from navit_jax import retrieval
from navit_jax.data import sources
from navit_jax.metrics import interval_by_group

# Two images share a text, one has two texts, one has the same text twice.
CAPTIONS = [
    ("a card",),
    ("A  card ", "red card"),
    ("a dog", "a dog"),
    ("the moon",),
    ("a cat",),
]
PAIRS = [(0, 0), (1, 0), (1, 1), (2, 2), (2, 2), (3, 3), (4, 4)]
CATEGORIES = np.array([0, 0, 1, 2, 1])


def test_captions_equal_but_for_case_and_blanks_are_one_text():
    texts, pairs = retrieval.list_pairs([*CAPTIONS, (), ("\u200b", " ")])
    assert texts == ["a card", "red card", "a dog", "the moon", "a cat"]
    assert pairs.tolist() == [list(pair) for pair in PAIRS]


@pytest.mark.parametrize("chunk", [3, 512])
def test_recall_is_that_of_a_loop_over_all_scores(monkeypatch, chunk):
    monkeypatch.setattr(retrieval, "CHUNK", chunk)
    rng = np.random.default_rng(0)
    num_images, num_texts = 40, 25
    pairs = [(i, rng.integers(num_texts)) for i in range(num_images) for _ in range(3)]
    pairs += [(rng.integers(num_images), u) for u in range(num_texts)]
    pairs = np.array(sorted(pairs))
    images, texts = rng.standard_normal((2, num_images, 6))
    texts = texts[:num_texts]
    groups = np.arange(num_images) // 3
    found = retrieval.recall(images, texts, pairs, groups)
    for name, terms in (
        ("image_to_text", [
            ([images[i] @ t for t in texts], {u for j, u in pairs if j == i}, groups[i])
            for i in range(num_images)
        ]),
        ("text_to_image", [
            ([texts[u] @ x for x in images], {j for j, v in pairs if v == u}, groups[i])
            for i, u in pairs
        ]),
    ):  # fmt: skip
        for k in (1, 5, 10):
            right = [
                float(any(j in own for j in np.argsort(scores)[::-1][:k]))
                for scores, own, _ in terms
            ]
            key = f"{name}_r{k}"
            assert 0 < np.mean(right) < 1
            assert found[key] == pytest.approx(np.mean(right))
            interval = interval_by_group(
                np.array(right), np.ones(len(right)), np.array([g for *_, g in terms])
            )
            assert (found[f"{key}_low"], found[f"{key}_high"]) == pytest.approx(
                interval
            )


def test_a_tie_counts_by_the_orders_in_which_it_is_right():
    gallery = np.array([3.0, 2, 2, 2, 2, 1])[:, None]
    for right in ([1], [1, 4], [0], [5], [4, 5], [1, 2, 3, 4]):
        pairs = np.array([(0, j) for j in right])
        found = retrieval.hits(np.ones((1, 1)), gallery, pairs, (1, 2, 3, 4, 5, 6))
        orders = [(0, *middle, 5) for middle in itertools.permutations((1, 2, 3, 4))]
        for k, value in enumerate(found[0], 1):
            expected = np.mean([bool({*order[:k]} & {*right}) for order in orders])
            assert value == pytest.approx(expected)


def test_rounding_decides_nothing():
    rng = np.random.default_rng(0)
    same = np.float32(np.sqrt(1 / 8)) + rng.uniform(-3e-8, 3e-8, (5, 8))
    pairs = retrieval.list_pairs(CAPTIONS).pairs
    found = retrieval.recall(same.astype(np.float32), same.astype(np.float32), pairs)
    assert found == pytest.approx(retrieval.chance(pairs))


def test_an_embedding_that_is_no_number_is_never_right():
    images, texts = np.eye(3, dtype=np.float32), np.eye(3, dtype=np.float32)
    pairs = np.array([(0, 0), (1, 1), (2, 2)])
    images[1] = np.nan
    found = retrieval.hits(images, texts, pairs, (1, 3))
    np.testing.assert_array_equal(found, [[1, 1], [0, 0], [1, 1]])
    # For the others it is a wrong picture that comes first.
    found = retrieval.hits(texts, images, pairs, (1, 2))
    np.testing.assert_array_equal(found, [[0, 1], [0, 0], [0, 1]])


def by_orders(num, first, right, k):
    """The share of orders, `first` of them ahead, that are right within k."""
    others = [j for j in range(num) if j not in first]
    found = [
        bool({*(ahead + behind)[:k]} & {*right})
        for ahead in itertools.permutations(first)
        for behind in itertools.permutations(others)
    ]
    return np.mean(found)


@pytest.mark.parametrize("knows", [False, True])
def test_baselines_are_the_mean_over_all_orders(monkeypatch, knows):
    monkeypatch.setattr(retrieval, "DEPTHS", (1, 2, 3))
    pairs = np.array(PAIRS)
    categories = CATEGORIES if knows else np.zeros(5, int)
    found = retrieval.oracle(pairs, categories) if knows else retrieval.chance(pairs)
    members = [np.flatnonzero(categories == c).tolist() for c in range(3)]
    for k in (1, 2, 3):
        to_text = [
            by_orders(
                5,
                sorted({u for j, u in PAIRS if categories[j] == categories[i]}),
                {u for j, u in PAIRS if j == i},
                k,
            )
            for i in range(5)
        ]
        to_image = [
            by_orders(5, members[categories[i]], {j for j, v in PAIRS if v == u}, k)
            for i, u in PAIRS
        ]
        assert found[f"image_to_text_r{k}"] == pytest.approx(np.mean(to_text))
        assert found[f"text_to_image_r{k}"] == pytest.approx(np.mean(to_image))


def test_pictures_that_are_not_there_take_their_texts_with_them():
    pairs = np.array(PAIRS)
    images = np.array([4, 7, 1, 0])  # 7 has no caption
    used, texts, own = retrieval.restrict(pairs, images)
    assert used.tolist() == [0, 2, 3]
    assert texts.tolist() == [0, 1, 4]
    named = {(int(images[used[i]]), int(texts[u])) for i, u in own}
    assert named == {(0, 0), (1, 0), (1, 1), (4, 4)}


@pytest.mark.parametrize("split", ["validation", "test"])
def test_the_category_alone_is_worth_15_to_17_times_chance(split):
    source = sources.clipart(split, "none")
    records = [source[i] for i in range(len(source))]
    pairs = retrieval.list_pairs([record.captions for record in records]).pairs
    categories = retrieval.top_categories([record.key for record in records])
    assert len(set(categories.tolist())) > 15
    ratio = (
        retrieval.oracle(pairs, categories)["image_to_text_r5"]
        / retrieval.chance(pairs)["image_to_text_r5"]
    )
    assert 14.5 < ratio < 17.5


def test_keys_without_a_folder_are_of_one_category():
    assert retrieval.top_categories(["a/b/1", "c/2", "a/3"]).tolist() == [0, 1, 0]
    assert retrieval.top_categories(["coco-1", "coco-2"]).tolist() == [0, 0]
