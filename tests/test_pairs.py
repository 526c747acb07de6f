"""Images that bring captions: planned, packed and loaded as pairs."""

import collections
import dataclasses
import pickle
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from PIL import Image
from plans import all_rows, make_plan, same

from navit_jax import experiment, train_state
from navit_jax import plan as planning
from navit_jax.data import captions, draws, sources
from navit_jax.data.load import Loader
from navit_jax.data.records import Record
from navit_jax.data.rows import Batches
from navit_jax.data.tokenizer import open_tokenizer
from navit_jax.data.window import enough_text
from navit_jax.errors import ConfigError, DataError

TEXT = 24


def lengths_of(num_images, most=3, seed=0):
    """[M K] tokens of captions, about a quarter of them of no use."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 13, (num_images, most))
    lengths[rng.random(lengths.shape) < 0.25] = 0
    return lengths.astype(np.uint16)


def make_pairs(sizes=(700,), **changes):
    tables = [lengths_of(size, seed=i) for i, size in enumerate(sizes)]
    return make_plan(sizes, **{"captions": tables, "text_tokens": TEXT} | changes)


def all_of(plan, windows):
    """The images of some windows, in one."""
    found = [plan.plan_window(*plan.label(i)).images for i in windows]
    return type(found[0])(*map(np.concatenate, zip(*found, strict=True)))


@pytest.mark.parametrize("packer", ["auto", "best_fit", "closing", "first_fit:4"])
def test_a_pair_is_in_one_row_that_has_room_for_image_and_text(packer):
    plan = make_pairs(packer=packer)
    seen = collections.Counter()
    for number in range(plan.num_windows):
        window = plan.plan_window(0, number)
        for row in map(window.row, range(len(window))):
            assert sum(row.kept.tolist()) <= 64
            assert sum(row.text.tolist()) <= TEXT
            assert len(row.index) <= 8
            for index, caption, text in zip(
                row.index, row.caption, row.text, strict=True
            ):
                lengths = plan.captions[0][index].tolist()
                if any(lengths):
                    assert text == lengths[caption] > 0
                else:
                    assert (caption, text) == (-1, 0)
                seen[int(index)] += 1
    assert seen == dict.fromkeys(range(700), 1)


def test_texts_take_rows_where_room_for_images_is_left():
    tables = [np.full((700, 1), 12, np.uint16)]
    window = make_pairs(captions=tables).plan_window(0, 0)
    assert np.diff(window.starts).max() == 2


def test_the_caption_of_an_epoch_is_drawn_by_the_hash_of_its_image():
    plan = make_pairs((40, 30), weights=[1, 1])
    drawn = all_of(plan, range(2))
    source, epoch, _ = plan.mixture.locate(drawn.images_seen)
    for i in range(len(source)):
        ids = source[i : i + 1] << 40 | drawn.index[i : i + 1]
        (u,) = draws.uniform(3, int(epoch[i]), ids, "caption")
        lengths = plan.captions[source[i]][drawn.index[i]]
        of_use = np.flatnonzero(lengths)
        expected = of_use[int(u * len(of_use))] if len(of_use) else -1
        assert drawn.caption[i] == expected


def test_every_caption_of_use_is_drawn_as_often_as_the_others():
    plan = make_pairs((250,))
    drawn = all_of(plan, range(30))
    counts = np.zeros((250, 3))
    with_caption = drawn.caption >= 0
    np.add.at(counts, (drawn.index[with_caption], drawn.caption[with_caption]), 1)
    of_use = plan.captions[0] > 0
    np.testing.assert_array_equal(counts.sum(1), 30 * of_use.any(1))
    for number in (1, 2, 3):
        some = of_use.sum(1) == number
        found = counts[some][of_use[some]].reshape(-1, number)
        draws_, share = 30 * some.sum(), 1 / number
        # Four standard deviations of the sum, and of the most extreme of 750 captions.
        for total in found.sum(0):
            assert (
                abs(total - draws_ * share) <= 4 * (draws_ * share * (1 - share)) ** 0.5
            )
        assert abs(found - 30 * share).max() <= 5 * (30 * share * (1 - share)) ** 0.5


def test_evaluation_takes_the_first_caption_of_use():
    plan = make_pairs(training=False)
    drawn = all_of(plan, range(plan.num_windows))
    expected = [
        next((k for k, n in enumerate(plan.captions[0][i]) if n), -1)
        for i in drawn.index
    ]
    assert drawn.caption.tolist() == expected


@pytest.mark.parametrize("sizes", [(90,), (90, 40)])
def test_pairs_go_on_from_any_position(sizes):
    plan = make_pairs(sizes, weights=[1] * len(sizes), window=30)
    batches = Batches(plan)
    for k in (0, 3, 7):
        resumed = Batches(pickle.loads(pickle.dumps(plan)), batches.position(k))
        rows = all_rows(resumed, range(3))
        assert all(map(same, rows, all_rows(batches, range(k + 1, k + 4))))
        assert sum(int(row.text.sum()) for row in rows) > 0


def test_texts_change_neither_what_is_drawn_of_an_image_nor_the_order():
    plan, pairs = make_plan(), make_pairs(text_tokens=10_000)
    for number in range(4):
        images = plan.plan_window(*plan.label(number)).images
        others = pairs.plan_window(*pairs.label(number)).images
        assert (images.caption == -1).all()
        assert not images.text.any()
        order, other = np.argsort(images.images_seen), np.argsort(others.images_seen)
        for field in images._fields[:-2]:
            np.testing.assert_array_equal(
                getattr(images, field)[order], getattr(others, field)[other]
            )


def test_plans_without_text_keep_the_fingerprint_that_checkpoints_hold():
    # As it was before there were texts; another one needs another PLAN_VERSION.
    assert make_plan().fingerprint() == "14035d0d2576ef2c"


def test_the_fingerprint_tells_texts_apart():
    plan = make_pairs()
    other = lengths_of(700)
    other[5, 1] += 1
    changed = [{"text_tokens": 32}, {"captions": [other]}]
    plans = [plan, make_plan(), *(dataclasses.replace(plan, **c) for c in changed)]
    assert len({p.fingerprint() for p in plans}) == 4
    assert make_pairs().fingerprint() == plan.fingerprint()


def test_a_mapped_table_of_captions_travels_by_name(tmp_path):
    np.save(tmp_path / "captions.npy", lengths_of(50_000))
    mapped = np.load(tmp_path / "captions.npy", mmap_mode="r")
    np.save(tmp_path / "sizes.npy", make_plan((50_000,)).tables[0])
    sizes = np.load(tmp_path / "sizes.npy", mmap_mode="r")
    plan = make_plan(tables=[sizes], captions=[mapped], text_tokens=TEXT)
    sent = pickle.dumps(plan)
    assert len(sent) < 5_000
    assert pickle.loads(sent).fingerprint() == plan.fingerprint()


def test_the_report_counts_the_texts_and_recommends_room_for_them():
    plan = make_pairs((1500,), window=1500)
    report = plan.report()
    window = plan.plan_window(0, 0)
    tokens = sum(int(n) for n in window.images.text)
    assert report["text_tokens"] == tokens
    assert report["text_padding"] == 1 - tokens / (len(window) * TEXT)
    best = make_plan((1500,), window=1500).report()["padding"]
    bound = max(0.015, best + 0.001)
    room = report["enough_text"]
    assert room % 8 == 0
    # Plans of their own agree that it is enough, and that less is not. They pack the
    # same pairs, so nothing is left to chance.
    paddings = [
        make_pairs((1500,), window=1500, text_tokens=n).report()["padding"]
        for n in (room - 8, room)
    ]
    assert paddings[1] <= bound < paddings[0]


@pytest.mark.parametrize(
    "pairs, room",
    [
        ([(64, 9)] * 20, 16),  # one a row, whatever the room
        ([(8, 7)] * 80, 56),  # eight a row need eight texts' room
        ([(8, 0)] * 80, 0),
    ],
)
def test_enough_text_is_a_multiple_of_eight_that_wastes_no_image_token(pairs, room):
    assert enough_text(np.array(pairs), 64, 8, "auto") == room


# From here on with pixels and words.


@pytest.fixture(scope="module")
def stream():
    config = tiny.config(data__text={"tokens": 48}, data__window=200)
    return experiment.build_stream(config)


def test_a_batch_holds_the_tokens_of_the_captions_that_were_drawn(stream):
    batch, _ = next(stream.batches(np.arange(8)))
    found, tokenizer = batch.targets, open_tokenizer()
    assert stream.tokenizer == tokenizer
    assert found["text_tokens"].dtype == found["text_segment_ids"].dtype == np.int32
    for b, row in enumerate(Batches(stream.plan).rows(0)):
        expected = []
        for i in range(len(row.index)):
            record = stream.loader.sources[0][int(row.index[i])]
            ids = tokenizer.encode(record.captions[row.caption[i]]).tolist()
            expected += [(i + 1, place, id) for place, id in enumerate(ids)]
        assert len(expected) == row.text.sum()
        expected += [(0, 0, 0)] * (48 - len(expected))
        fields = (
            found["text_segment_ids"][b],
            found["text_coords"][b, :, 0],
            found["text_tokens"][b],
        )
        assert [tuple(map(int, t)) for t in zip(*fields, strict=True)] == expected


def test_the_example_has_the_shapes_of_a_batch(stream):
    batch, _ = next(stream.batches(np.arange(8)))
    example = stream.example().targets
    assert {k: (v.shape, v.dtype) for k, v in example.items()} == {
        k: (v.shape, v.dtype) for k, v in batch.targets.items()
    }
    plain = experiment.build_stream(tiny.config())
    assert plain.tokenizer is None
    assert set(plain.example().targets) == {"labels"}


def test_padding_of_texts_is_counted_beside_that_of_images(stream):
    batch, _ = next(stream.batches(np.arange(8)))
    counts = train_state.batch_counts(jax.tree.map(jnp.asarray, batch))
    planned = sum(int(row.text.sum()) for row in Batches(stream.plan).rows(0))
    assert counts["text_tokens"] == planned
    assert counts["text_room"] == 8 * 48


def test_a_loader_gives_the_same_texts_in_another_process(stream):
    rows = Batches(stream.plan).rows(0)
    ours, theirs = (
        loader.pack(loader.load(rows).images).targets
        for loader in (stream.loader, pickle.loads(pickle.dumps(stream.loader)))
    )
    for name, leaf in ours.items():
        np.testing.assert_array_equal(leaf, theirs[name])


def test_an_evaluation_set_has_the_texts_of_training():
    section = {
        "sources": {"clipart": {"name": "clipart", "split": "validation"}},
        "sides": (48,),
    }
    config = tiny.config(data__text={"tokens": 48, "length": 12})
    _, stream = next(experiment.build_eval_streams(config, section, "validation"))
    assert stream.tokenizer == open_tokenizer(length=12)
    assert stream.plan.text_tokens == 48


def test_the_packing_report_tells_of_texts(stream):
    text = planning.packing_report(stream, 6)
    report = stream.plan.report()
    (padding,) = re.findall(r"text padding +([\d.]+)%", text)
    assert float(padding) == pytest.approx(100 * report["text_padding"], abs=0.006)
    (room,) = re.findall(r"text room that suffices +(\d+)", text)
    assert int(room) == report["enough_text"]
    assert not planning.text_lines(make_plan(), {})


@dataclasses.dataclass(frozen=True)
class Listed:
    """Grey pictures, image 3 of which is none, with given captions."""

    folder: str
    texts: tuple[tuple[str, ...], ...]
    name: str = "listed"
    class_names: tuple[str, ...] = ()
    groups: np.ndarray | None = None

    def fingerprint(self):
        return "00"  # as of data that changed behind its back

    def __len__(self):
        return len(self.texts)

    def __getitem__(self, index):
        path = f"{self.folder}/{index}.png"
        Image.new("RGB", (40, 32), (index,) * 3).save(path)
        with open(path, "rb") as file:
            image = b"no picture" if index == 3 else file.read()
        return Record(f"#{index}", image, (), self.texts[index])


TEXTS = (("a cat", "two cats"), (), ("  ", "a dog"), ("a house",), ("\x00",))


@pytest.fixture
def listed(tmp_path, monkeypatch):
    """Opens a stream over texts, by the chain of a config."""
    monkeypatch.setenv("NAVIT_JAX_CACHE", str(tmp_path / "cache"))

    def open_listed(texts, **changes):
        source = Listed(str(tmp_path), texts, groups=np.arange(len(texts)))
        monkeypatch.setitem(sources.SOURCES, "listed", lambda: source)
        section = {"sources": {"mine": {"name": "listed"}}, "rows": 1, "slots": 6}
        data = tiny.config()["data"] | section | {"text": {"tokens": 48}} | changes
        return experiment.build_stream(tiny.config(data=data))

    return open_listed


def test_images_without_a_caption_of_use_are_left_out_and_counted(listed, caplog):
    stream = listed(TEXTS)
    (source,) = stream.loader.sources
    assert [source[i].key for i in range(len(source))] == ["#0", "#2", "#3"]
    assert source.groups.tolist() == [0, 2, 3]
    assert len(stream.plan.tables[0]) == len(stream.plan.captions[0]) == 3
    told = [r.message for r in caplog.records if "left out" in r.message]
    assert told == ["listed: 2 of 5 images have no caption of use and are left out"]
    with pytest.raises(ConfigError, match="listed has no caption of use"):
        listed(((), (" ",)))


def test_an_image_that_can_not_be_read_keeps_its_text_and_is_no_pair(listed):
    stream = listed(TEXTS)
    batches = stream.batches(np.arange(1))
    batch, info = next(item for item in batches if item[1].skipped)
    assert info.skipped == [("mine:#3", "not_image")] * len(info.skipped)
    slot = info.keys[0].index("mine:#3")
    assert not batch.image_mask[0, slot]
    text = batch.targets["text_tokens"][0][
        batch.targets["text_segment_ids"][0] == slot + 1
    ]
    np.testing.assert_array_equal(text, stream.tokenizer.encode("a house"))


@pytest.mark.parametrize("texts", [("a cat and a dog", "a cat and a dog"), ()])
def test_a_table_that_the_data_has_left_behind_is_named_with_the_remedy(listed, texts):
    stream = listed(TEXTS)
    ((whole, *_),) = [stream.loader.sources]
    stale = dataclasses.replace(whole.whole, texts=(texts, *TEXTS[1:]))
    loader = dataclasses.replace(
        stream.loader, sources=(dataclasses.replace(whole, whole=stale),)
    )
    assert isinstance(loader, Loader)
    with pytest.raises(DataError, match=r"mine:#0: caption . has . tokens") as error:
        next(dataclasses.replace(stream, loader=loader).batches(np.arange(1)))
    for word in ("remove captions-", whole.folder, "cache"):
        assert word in str(error.value)


@pytest.mark.parametrize(
    "text, message",
    [
        ({"tokens": 23}, "data.text.tokens=23: give the text .*data.text.length=24"),
        ({"length": 8}, "data.text.tokens=None: give"),
        ({"tokens": 48, "lenght": 8}, "did you mean 'length'"),
        ({"tokens": 48, "vocabulary": "/nowhere"}, "nowhere"),
    ],
)
def test_a_section_of_texts_that_can_not_work_is_refused(text, message):
    config = tiny.config(data__text=text)
    with pytest.raises(ConfigError, match=message):
        experiment.build_stream(config)


def test_keys_of_the_section_are_checked_before_anything_is_opened():
    experiment.check_sections(tiny.config(data__text={"tokens": 48, "empty": "keep"}))
    config = tiny.config(data__text={"tokens": 48, "lenght": 8})
    with pytest.raises(ConfigError, match="did you mean 'length'"):
        experiment.check_sections(config)


def test_captions_of_a_part_are_those_of_the_whole_by_number():
    whole = sources.clipart("validation", "none")
    lengths = captions.caption_lengths(whole, open_tokenizer())
    lengths = lengths.copy()
    lengths[[0, 7]] = 0
    part, table = captions.leave_out(whole, lengths)
    assert part[0].key == whole[1].key
    assert part[6].key == whole[8].key
    np.testing.assert_array_equal(
        captions.caption_lengths(part, open_tokenizer()), table
    )
