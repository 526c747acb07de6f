"""What is made of a set's embeddings, against loops over its pictures."""

import numpy as np
import pytest

from navit_jax import judges
from navit_jax.data.records import Record
from navit_jax.errors import ConfigError
from navit_jax.metrics import interval_by_group

NAMES = ("cat", "pets/guinea_pig", "dog")


class Pictures:
    """A source of captions and labels, of which number 2 can not be had."""

    name = "pictures"
    class_names = NAMES
    groups = np.array([7, 8, 8, 7, 8, 7])
    captions = ("a cat",), ("A cat", "pet"), ("lost",), (), ("dog", "pet"), (" ",)
    labels = (2,), (0, 1), (1,), (), (1,), (2,)

    def __len__(self):
        return len(self.captions)

    def __getitem__(self, index):
        if index == 2:
            raise OSError
        return Record(f"a/{index}", b"", self.labels[index], self.captions[index])


def embed(num, seed):
    found = np.random.default_rng(seed).standard_normal((num, 3)).astype(np.float32)
    return found / np.linalg.norm(found, axis=1, keepdims=True)


# Slots: two are empty or hold what could not be used; the others are in no order.
INDEX = np.array([4, -1, 0, 3, 5, 1, -1])


def test_retrieval_counts_pictures_that_can_be_used_and_texts_that_are_known():
    judge, source = judges.Retrieval(), Pictures()
    asked = judge.read(source, list)
    assert asked.texts == ["a cat", "pet", "dog"]
    images, texts = embed(len(INDEX), 4), embed(3, 1)
    known = np.array([True, True, False])
    found = judge.conclude(asked, judges.Texts(texts, known), images, INDEX, source)
    of_image = {int(i): images[slot] for slot, i in enumerate(INDEX) if i >= 0}
    # Of 4 and 5 nothing is left but "pet"; 3 has no caption.
    captions = {0: [0], 1: [0, 1], 4: [1]}
    by_image = [
        float(max((0, 1), key=lambda u, i=i: of_image[i] @ texts[u]) in captions[i])
        for i in captions
    ]
    pairs = [(i, u) for i in captions for u in captions[i]]
    by_caption = [
        float(u in captions[max(captions, key=lambda i, u=u: of_image[i] @ texts[u])])
        for _, u in pairs
    ]
    for name, right, own in (
        ("image_to_text_r1", by_image, [*captions]),
        ("text_to_image_r1", by_caption, [i for i, _ in pairs]),
    ):
        right = np.array(right)
        assert 0 < right.mean() < 1
        assert found[name] == pytest.approx(right.mean())
        interval = interval_by_group(right, np.ones(len(right)), source.groups[own])
        assert (found[f"{name}_low"], found[f"{name}_high"]) == pytest.approx(interval)
    assert (found["captions"], found["without_caption"]) == (4, 2)
    assert (found["image_to_text_r5"], found["text_to_image_r5"]) == (1, 1)


def test_a_set_without_captions_is_named():
    judge, source = judges.Retrieval(), Pictures()
    asked = judge.read(source, list)
    texts = judges.Texts(embed(3, 1), np.zeros(3, bool))
    with pytest.raises(ConfigError, match="pictures has no caption of use"):
        judge.conclude(asked, texts, embed(len(INDEX), 0), INDEX, source)


def training():
    """Captions that hold two of the three names."""

    class Trained(Pictures):
        captions = ("one Cat",), (), (), (), ("dog",), ()

    return judges.read_captions([Trained(), Pictures()])


def test_zero_shot_takes_the_nearest_class_and_tells_absent_names_apart():
    judge, source = judges.ZeroShot(templates=["{}", "a {}"]), Pictures()
    asked = judge.read(source, training)
    assert asked.texts == ["cat", "a cat", "guinea pig", "a guinea pig", "dog", "a dog"]
    assert asked.absent is not None
    assert asked.absent.tolist() == [False, True, False]
    images, prompts = embed(len(INDEX), 6), embed(6, 3)
    texts = judges.Texts(prompts, np.ones(6, bool))
    found = judge.conclude(asked, texts, images, INDEX, source)
    classes = prompts.reshape(3, 2, 3).sum(1)
    classes /= np.linalg.norm(classes, axis=1, keepdims=True)
    of_image = {int(i): images[slot] for slot, i in enumerate(INDEX) if i >= 0}
    labelled = [i for i in of_image if source.labels[i]]
    right = np.array(
        [float((classes @ of_image[i]).argmax() in source.labels[i]) for i in labelled]
    )
    assert 0 < right.mean() < 1
    assert found["accuracy"] == right.mean()
    interval = interval_by_group(right, np.ones(4), source.groups[labelled])
    assert (found["accuracy_low"], found["accuracy_high"]) == interval
    # Number 4 alone is called by nothing but the name that was never read: 1, whose
    # last label it is, has another.
    assert found["absent"] == 1
    assert found["accuracy_absent"] == right[labelled.index(4)]


def test_names_are_searched_in_small_training_sets_alone(monkeypatch):
    monkeypatch.setattr(judges, "SEARCHED", 11)
    assert judges.ZeroShot().read(Pictures(), training).absent is None


def test_zero_shot_names_what_it_can_not_classify():
    judge, source = judges.ZeroShot(), Pictures()
    asked = judge.read(source, list)
    images, known = embed(len(INDEX), 2), np.array([True, False, True])
    with pytest.raises(ConfigError, match="leaves out 'guinea pig'"):
        judge.conclude(asked, judges.Texts(embed(3, 3), known), images, INDEX, source)
    with pytest.raises(ConfigError, match="has 3 classes, and 1 names are given"):
        judges.ZeroShot(names=["cat"]).read(source, list)
    source.class_names = ()
    with pytest.raises(ConfigError, match="has 0 classes"):
        judge.read(source, list)
    assert judges.ZeroShot(names=list("abc")).read(Pictures(), list).texts == [*"abc"]
