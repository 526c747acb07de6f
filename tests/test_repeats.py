"""Repeated augmentation and RandAugment: what is drawn anew, and what is not."""

import random
import sys
import types
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import tiny

from navit_jax import experiment
from navit_jax.data import rand_augment
from navit_jax.errors import ConfigError


def planned(**changes):
    return experiment.build_stream(tiny.config(**changes)).plan


def visits(plan, count):
    """(index, box) of the first images of the stream, in its order."""
    found = plan._draw(np.arange(count))
    return found.index.tolist(), found.box.tolist(), found


def test_an_image_comes_several_times_in_a_window_each_with_another_crop():
    indices, boxes, found = visits(planned(data__repeats=3, data__window=30), 300)
    assert len(set(found.drop_key.tolist())) == 300
    # Where no crop fits, an image is whole each time.
    others = [len({tuple(boxes[i + 10 * c]) for c in range(3)}) for i in range(10)]
    assert np.mean(others) > 2
    once, _, _ = visits(planned(), 100)
    for block in range(10):
        own = once[10 * block : 10 * block + 10]
        assert indices[30 * block : 30 * block + 30] == own * 3


def test_every_image_comes_equally_often_and_an_epoch_is_as_long():
    plan = planned(data__repeats=3, data__window=3)
    size = len(plan.tables[0])
    assert plan.num_windows == planned(data__window=3).num_windows
    indices, _, found = visits(plan, 3 * size)
    assert (np.bincount(indices, minlength=size) == 3).all()
    # No draw of the second run through the images is one of the first.
    again = plan._draw(np.arange(3 * size, 4 * size))
    assert not set(again.drop_key.tolist()) & set(found.drop_key.tolist())


def test_without_repeats_the_plan_is_what_it_was():
    plan, again = planned(), planned(data__repeats=1)
    assert plan.fingerprint() == again.fingerprint()
    assert plan.fingerprint() != planned(data__repeats=2).fingerprint()
    np.testing.assert_array_equal(
        plan._draw(np.arange(50)).box, again._draw(np.arange(50)).box
    )
    with pytest.raises(ConfigError, match=r"repeats=0"):
        planned(data__repeats=0)


@pytest.fixture
def stub(monkeypatch):
    """timm's place taken by what draws from the generators that timm draws from."""

    def transform(law, settings):
        assert settings == rand_augment.SETTINGS
        if "bogus" in law:
            raise AssertionError("unknown section")

        def change(image):
            shift = random.randrange(200) + int(np.random.randint(50))
            return image.point(lambda v: (v + shift) % 256)

        return change

    module = types.ModuleType("timm.data.auto_augment")
    module.rand_augment_transform = transform
    for name in ("timm", "timm.data"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, "timm.data.auto_augment", module)
    rand_augment.build.cache_clear()
    yield
    rand_augment.build.cache_clear()


LAW = "rand-m9-mstd0.5-inc1"
PIXELS = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)


def test_what_moves_pixels_is_refused_beside_their_classes(stub):
    rand_augment.check(LAW, False)
    rand_augment.check("", True)
    with pytest.raises(ConfigError, match="pixels and not their classes"):
        rand_augment.check(LAW, True)


def test_a_picture_changes_by_its_key_alone_in_any_thread(stub):
    state, other = random.getstate(), np.random.get_state()[1].copy()
    keys = [2**63 + i for i in range(40)]
    alone = [rand_augment.augment(PIXELS, LAW, key) for key in keys]
    with ThreadPoolExecutor(8) as pool:
        many = list(pool.map(lambda k: rand_augment.augment(PIXELS, LAW, k), keys))
    np.testing.assert_array_equal(alone, many)
    assert len({picture.tobytes() for picture in alone}) > 20
    assert random.getstate() == state
    np.testing.assert_array_equal(np.random.get_state()[1], other)


def test_training_is_augmented_and_evaluation_is_not(stub):
    evals = {
        "v": {"sources": {"c": {"name": "clipart", "split": "test"}}, "sides": (48,)}
    }
    same = {"data__jitter": 0.0, "evals": evals}
    plain, changed = (tiny.config(**same, data__rand_augment=law) for law in ("", LAW))
    batches = []
    for found in (plain, changed):
        _, stream = next(experiment.build_eval_streams(found, evals["v"], "v"))
        train = experiment.build_stream(found)
        batches.append([next(s.batches(np.arange(8)))[0] for s in (train, stream)])
    assert (batches[0][0].patches != batches[1][0].patches).any()
    np.testing.assert_array_equal(batches[0][1].patches, batches[1][1].patches)


def test_what_timm_does_not_know_is_refused_before_anything_runs(stub):
    for law in ("rand-bogus", "augmix"):
        with pytest.raises(ConfigError, match="rand_augment"):
            experiment.build_stream(tiny.config(data__rand_augment=law))


def test_without_timm_the_message_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm.data.auto_augment", None)
    rand_augment.build.cache_clear()
    with pytest.raises(ConfigError, match=r"navit_jax\[augment\]"):
        rand_augment.build(LAW)


def test_the_law_of_the_paper_is_one_that_timm_knows():
    pytest.importorskip("timm", reason="pip install 'navit_jax[augment]'")
    rand_augment.build.cache_clear()
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (48, 40, 3), np.uint8)
    # Of so many draws some are of the largest magnitude.
    found = [rand_augment.augment(pixels, LAW, key) for key in range(400)]
    again = [rand_augment.augment(pixels, LAW, key) for key in range(8)]
    np.testing.assert_array_equal(found[:8], again)
    assert sum((picture != pixels).any() for picture in found) >= 250
