"""Padded pictures keep their content, and their aspect tells nothing of them."""

import io
import pickle
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import tiny
from PIL import Image

from navit_jax import baselines, experiment
from navit_jax.data import codec, images, open_sources, padded, sizes, sources
from navit_jax.data.containers import MAX_PIXELS, MAX_SIDE
from navit_jax.data.records import Selection
from navit_jax.errors import ConfigError

SIZES = np.array([(10, 40), (33, 21), (0, 0), (16, 16), (50, 7)], np.uint16)
CLIPART = {"name": "clipart", "split": "validation"}


def test_a_canvas_has_the_aspect_of_another_picture_and_grows_along_one_side():
    for seed in range(20):
        found = padded.draw_canvases(SIZES, seed).tolist()
        aspects = [h / w for h, w in SIZES.tolist() if h]
        for (h, w), (rows, columns) in zip(SIZES.tolist(), found, strict=True):
            if not h:
                assert rows == columns == 0
                continue
            assert (rows == h and columns >= w) or (columns == w and rows >= h)
            # Each aspect is used once, exact to half a pixel of the side that grew.
            off = np.abs(np.log(rows / columns / np.array(aspects)))
            assert off.min() < 0.51 / min(rows, columns)
            aspects.pop(int(off.argmin()))
        assert not aspects


def test_a_canvas_is_no_larger_than_what_can_be_read():
    extreme = np.array([(1, 60_000), (60_000, 1), (9000, 9000)], np.uint16)
    for seed in range(6):
        found = padded.draw_canvases(extreme, seed).astype(np.int64)
        assert (found >= extreme).all()
        assert found.max() <= MAX_SIDE
        assert found.prod(1).max() <= MAX_PIXELS


def test_the_draw_is_a_function_of_the_seed_and_no_other_seed_has_it():
    table = sizes.size_table(sources.padded(CLIPART, seed=3))
    np.testing.assert_array_equal(table, sizes.size_table(sources.padded(CLIPART, 3)))
    other = sizes.size_table(sources.padded(CLIPART, seed=4))
    assert (table != other).any(1).mean() > 0.9


def test_the_pixels_are_those_of_the_picture_in_the_middle_of_white():
    source = sources.padded(CLIPART)
    for index in range(0, len(source), 7):
        plain = Image.open(io.BytesIO(source.whole[index].image)).convert("RGBA")
        white = Image.new("RGBA", plain.size, "white")
        plain = np.array(Image.alpha_composite(white, plain).convert("RGB"))
        rows, columns = sizes.size_table(source)[index].tolist()
        above, left = (rows - len(plain)) // 2, (columns - plain.shape[1]) // 2
        below, right = rows - len(plain) - above, columns - plain.shape[1] - left
        expected = np.pad(
            plain, ((above, below), (left, right), (0, 0)), constant_values=255
        )
        size = rows, columns
        assert images.read_size(source[index].image) == size
        found, _ = images.read(source[index].image, size, size)
        np.testing.assert_array_equal(found, expected)


def test_a_batch_holds_the_padded_pictures_at_their_own_grids():
    config = tiny.config(data__tokens=64)
    section = {"sources": {"drawings": {"name": "padded", "source": CLIPART}}}
    _, stream = next(
        experiment.build_eval_streams(config, {**section, "sides": (64,)}, "padded")
    )
    source, seen = stream.loader.sources[0], 0
    for batch, info in stream.batches(np.arange(stream.plan.rows)):
        assert not info.skipped
        assert not info.notes
        for row, slot in np.argwhere(batch.image_mask):
            index = int(batch.image_ids[row, slot, 1])
            scale = 64 / np.sqrt(np.prod(source.sizes[index], dtype=float))
            grid = np.maximum(source.sizes[index] * scale / 16 + 1e-9, 1).astype(int)
            if grid.max() <= 32:  # a longer one is shrunk to the position table
                np.testing.assert_array_equal(batch.grids[row, slot], grid)
            labels = batch.targets["labels"][row, slot]
            assert set(labels[labels >= 0]) == set(source.whole[index].labels)
            seen += 1
    assert seen == len(source)


def test_the_aspect_of_padded_pictures_tells_nothing_of_their_labels():
    found = []
    for fold in range(5):
        whole = sources.clipart(f"fold{fold}:test")
        labels = np.zeros((len(whole), 8), bool)
        for i in range(len(whole)):
            labels[i, list(whole[i].labels)] = True
        own = np.asarray(sizes.size_table(whole), float)
        # What the aspect tells at most: guesses are judged on what they learnt from.
        for table in (
            own,
            *(padded.draw_canvases(own.astype("u2"), s) for s in range(9)),
        ):
            aspects = np.log(table[:, 0] / table[:, 1])
            half = np.arange(len(own)) % 2 == 0
            found.append(
                baselines.aspect_only(
                    labels[half], aspects[half], labels[~half], aspects[~half]
                )
                - baselines.majority(labels[half], labels[~half])
            )
    own, *drawn = np.reshape(found, (5, 10)).mean(0)
    assert own > 0.02
    assert np.max(drawn) < 0.0


def test_canvases_tell_nothing_of_classes_that_stand_in_order():
    # As `folder` gives them: neighbours are of one class, so of like aspects.
    rng = np.random.default_rng(0)
    classes = np.repeat(np.arange(4), 300)
    aspects = np.exp(rng.normal(classes - 1.5, 0.3))
    own = np.rint(64 * np.stack([aspects**0.5, aspects**-0.5], 1)).astype(np.uint16)
    labels = np.eye(4, dtype=bool)[classes]
    half = rng.random(len(own)) < 0.5

    def judge(table):
        ratio = np.log(table[:, 0] / table[:, 1])
        return baselines.aspect_only(
            labels[half], ratio[half], labels[~half], ratio[~half]
        )

    assert judge(own) > 0.8
    # A guess among four; 600 pictures are judged, so 0.02 is a standard error.
    assert max(judge(padded.draw_canvases(own, seed)) for seed in range(9)) < 0.31


def test_pixels_are_those_of_pillow_whatever_else_is_installed(tmp_path, monkeypatch):
    Image.new("RGB", (30, 20), "red").save(tmp_path / "a.jpg")
    monkeypatch.setattr(codec, "FAST", True)
    monkeypatch.setattr(codec, "decode", None)
    source = sources.padded({"name": "folder", "path": str(tmp_path)})
    assert images.read_size(source[0].image) == tuple(source.sizes[0])


def test_it_is_another_source_than_the_unpadded_one():
    source = sources.padded(CLIPART)
    whole = source.whole
    assert source.fingerprint() != whole.fingerprint()
    assert source.fingerprint() != sources.padded(CLIPART, seed=1).fingerprint()
    assert source[0].key != whole[0].key
    assert source.name != whole.name
    assert (sizes.size_table(source) != sizes.size_table(whole)).any(1).mean() > 0.9
    assert source[0].labels == whole[0].labels
    assert source.class_names == whole.class_names
    np.testing.assert_array_equal(source.groups, whole.groups)


def test_it_is_small_when_pickled_and_read_alike_from_threads():
    source = sources.padded(CLIPART)
    data = pickle.dumps(source)
    assert len(data) < 20_000
    expected = [source[i] for i in range(20)]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(pickle.loads(data).__getitem__, range(20))) == expected


def test_some_of_its_pictures_have_their_rows_of_its_table():
    source = sources.padded(CLIPART)
    chosen = np.array([5, 2, 9], np.int32)
    np.testing.assert_array_equal(
        sizes.size_table(Selection(source, chosen)), source.sizes[chosen]
    )


def test_a_picture_that_can_not_be_read_says_so_itself(tmp_path):
    for name in ("a.png", "b.png", "c.png", "d.png"):
        Image.new("RGB", (30, 20), "red").save(tmp_path / name)
    (tmp_path / "b.png").write_bytes(b"<html>")
    (tmp_path / "c.png").write_bytes((tmp_path / "c.png").read_bytes()[:60])
    section = {"name": "folder", "path": str(tmp_path)}
    config = tiny.config()
    section = {"sources": {"mine": {"name": "padded", "source": section}}}
    _, stream = next(
        experiment.build_eval_streams(config, {**section, "sides": (64,)}, "mine")
    )
    (_, info), *_ = stream.batches(np.arange(8))
    reasons = {name.rsplit("/")[-1]: reason for name, reason in info.skipped}
    assert reasons == {"mine:b.png": "not_image", "mine:c.png": "truncated"}


def test_a_config_names_its_source_and_its_part_may_be_exchanged():
    section = {"name": "padded", "source": CLIPART, "seed": 2, "split": "test"}
    (source,), _ = open_sources({"drawings": section})
    assert len(source) == len(sources.clipart("test"))
    assert source.seed == 2


@pytest.mark.parametrize(
    "section, message",
    [
        ({"source": "clipart"}, r"source='clipart' of a padded source: give a section"),
        ({"source": {"name": "clipat"}}, "did you mean 'clipart'"),
        ({"source": {"name": "clipart", "splt": "test"}}, "did you mean 'split'"),
        ({"source": {"name": "clipart", "split": "tst"}}, "split='tst' is unknown"),
        ({"source": CLIPART, "sed": 1}, r"sources\.a\.sed is unknown; did you mean"),
        ({}, r"data\.sources\.a\.source is missing"),
    ],
)
def test_what_is_wrong_with_its_section_is_named(section, message):
    with pytest.raises(ConfigError, match=message):
        open_sources({"a": {"name": "padded", **section}})


def test_a_section_inside_is_checked_before_anything_is_opened():
    config = tiny.config()
    inner = {"name": "clipart", "splt": "test"}
    config["data"]["sources"] = {"a": {"name": "padded", "source": inner}}
    with pytest.raises(ConfigError, match=r"data\.sources\.a\.source\.splt is unknown"):
        experiment.check_sections(config)
