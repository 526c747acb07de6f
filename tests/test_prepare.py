import json

import commands
import numpy as np
import pytest
from PIL import Image
from test_images import exif, photo

from navit_jax.data import images, open_sources, prepare, sizes, sources, tables
from navit_jax.errors import ConfigError, DataError

SIZES = [(90, 120), (120, 90), (60, 61), (300, 40), (33, 47), (100, 100)]


@pytest.fixture
def folder(tmp_path):
    """Twelve JPEGs in two classes, one of them turned; and two files that are none."""
    for number in range(12):
        path = tmp_path / "in" / ("cat", "dog")[number % 2] / f"{number:02}.jpg"
        path.parent.mkdir(exist_ok=True, parents=True)
        pixels = photo(*SIZES[number % 6], seed=number)
        turn = 6 if number == 3 else 1
        Image.fromarray(pixels).save(path, quality=90, exif=exif(turn))
    (tmp_path / "in" / "cat" / "05.jpg").write_bytes(b"<html>")
    (tmp_path / "in" / "dog" / "08.jpg").write_bytes(b"")
    return tmp_path / "in"


@pytest.fixture
def source(folder, monkeypatch):
    monkeypatch.setattr(prepare, "SHARD", 5)
    return sources.folder(str(folder))


def test_what_is_prepared_is_what_would_be_read_with_all_that_belongs_to_it(
    source, tmp_path
):
    written = prepare.prepare(source, tmp_path / "out", 64, 16, "pillow")
    section, bad = written.section, written.skipped
    assert sorted(reason for _, reason in bad) == ["empty", "not_image"]
    assert {key.split("/")[-1] for key, _ in bad} == {"05.jpg", "08.jpg"}
    (opened,), _ = open_sources({"mine": section})
    assert opened.class_names == source.class_names == ("cat", "dog")
    originals = [source[i] for i in range(len(source))]
    originals = [r for r in originals if r.key not in dict(bad)]
    assert len(opened) == len(originals) == 12
    for i, original in enumerate(originals):
        record = opened[i]
        assert (record.key, record.labels) == (original.key, original.labels)
        assert record.captions == original.captions == ()
        h, w = images.read_size(original.image)
        scale = min(1, 64 / np.sqrt(h * w)) / 16
        target = tuple(max(1, int(s * scale + 1e-9)) * 16 for s in (h, w))
        expected, _ = images.read(original.image, (h, w), target, codec="pillow")
        assert images.read_size(record.image) == target
        np.testing.assert_array_equal(
            images.read(record.image, target, target)[0], expected
        )


def test_sizes_are_known_without_reading_what_was_prepared(
    source, tmp_path, monkeypatch
):
    written = prepare.prepare(source, tmp_path / "out", 64, 16)
    (opened,), _ = open_sources({"mine": written.section})
    monkeypatch.setattr(tables, "scan", None)
    table = sizes.size_table(opened)
    expected = [images.read_size(opened[i].image) for i in range(12)]
    np.testing.assert_array_equal(table, expected)


def files(folder):
    return {p.name: p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_after_a_stop_it_goes_on_and_the_files_are_the_same(
    source, tmp_path, monkeypatch
):
    prepare.prepare(source, tmp_path / "whole", 64, 16)
    shrink, seen = prepare.shrink, []

    def stop(source, side, patch, codec, index):
        if index == 7:
            raise KeyboardInterrupt
        return shrink(source, side, patch, codec, index)

    monkeypatch.setattr(prepare, "shrink", stop)
    with pytest.raises(KeyboardInterrupt):
        prepare.prepare(source, tmp_path / "out", 64, 16)

    def count(source, side, patch, codec, index):
        seen.append(index)
        return shrink(source, side, patch, codec, index)

    monkeypatch.setattr(prepare, "shrink", count)
    prepare.prepare(source, tmp_path / "out", 64, 16)
    assert sorted(seen) == list(range(5, 14))
    assert files(tmp_path / "out") == files(tmp_path / "whole")


def test_a_folder_with_something_else_is_refused(source, tmp_path):
    prepare.prepare(source, tmp_path / "out", 64, 16)
    with pytest.raises(ConfigError, match=r"is begun, or done, as .*'side': 64"):
        prepare.prepare(source, tmp_path / "out", 96, 16)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("mine")
    with pytest.raises(ConfigError, match="is not empty: give a new folder"):
        prepare.prepare(source, tmp_path / "full", 64, 16)
    assert files(tmp_path / "full") == {"file": b"mine"}
    below = tmp_path / "full" / "file" / "out"
    with pytest.raises(ConfigError, match=f"--output={below} can not be written"):
        prepare.prepare(source, below, 64, 16)


def test_a_file_of_bad_pictures_alone_is_left_out_and_a_set_of_them_refused(
    folder, source, tmp_path
):
    for path in sorted((folder / "cat").iterdir()):
        path.write_bytes(b"<html>")
    written = prepare.prepare(source, tmp_path / "out", 64, 16)
    assert len(written.skipped) == 8
    (opened,), _ = open_sources({"mine": written.section})
    assert [r.labels for r in map(opened.__getitem__, range(len(opened)))] == [(1,)] * 6
    for path in sorted((folder / "dog").iterdir()):
        path.write_bytes(b"<html>")
    with pytest.raises(DataError, match="no picture of in can be used"):
        prepare.prepare(sources.folder(str(folder)), tmp_path / "none", 64, 16)


def test_the_command_tells_how_to_open_the_set_and_names_what_is_left_out(
    folder, tmp_path
):
    done = commands.run(
        "navit_jax.data.prepare", "--config=configs/smoke.py",
        "--config.data.sources.mine.name=folder",
        f"--config.data.sources.mine.path={folder}",
        "--source=mine", "--side=64", f"--output={tmp_path / 'out'}",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "left out, not_image: " in done.stdout
    assert "12 pictures" in done.stdout
    assert "img/s" in done.stderr
    line = done.stdout.splitlines()[-1].removeprefix("data.sources = ")
    section = json.loads(line.replace("'", '"'))["mine"]
    (opened,), _ = open_sources({"mine": section})
    assert opened.class_names == ("cat", "dog")
