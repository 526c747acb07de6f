"""The embedded set: what is in it, that nothing leaks, and that it can be rebuilt."""

import collections
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import zlib

import numpy as np
import pytest
from PIL import Image

from navit_jax.data import sources
from navit_jax.data.builders import (
    captions,
    classes,
    clipart,
    debian,
    groups,
    openclipart,
)
from navit_jax.data.images import read_size
from navit_jax.data.sizes import size_table
from navit_jax.data.tables import SAMPLE
from navit_jax.errors import ConfigError, DataError

SPLITS = ("train", "validation", "test")
PACKAGES = pathlib.Path(
    os.environ.get("NAVIT_JAX_OPENCLIPART", sources.cache_folder() / "openclipart")
)


@pytest.fixture(scope="module")
def pictures():
    return sources.clipart("all", labels="none")


@pytest.fixture(scope="module")
def records(pictures):
    return [pictures[i] for i in range(len(pictures))]


def test_the_set_holds_all_visible_pictures_within_12_megabytes(pictures, records):
    assert len(records) == len({r.key for r in records}) == 3739
    files = [p for p in sources.CLIPART.rglob("*") if p.is_file()]
    assert sum(p.stat().st_size for p in files) < 12e6


@pytest.mark.parametrize("labels, count", [("classes8", 2031), ("classes34", 2487)])
def test_splits_share_no_picture_and_hold_every_labelled_one(labels, count):
    parts = [sources.clipart(split, labels) for split in SPLITS]
    seen = np.concatenate([part.indices for part in parts])
    assert len(seen) == len(np.unique(seen)) == count
    shares = [len(part) / count for part in parts]
    np.testing.assert_allclose(shares, [0.8, 0.1, 0.1], atol=0.03)
    for part in parts:
        found = {label for i in range(len(part)) for label in part[i].labels}
        assert found <= set(range(len(part.class_names)))
        if labels == "classes8":
            assert len(found) == 8


def test_no_group_is_in_two_splits_or_in_both_parts_of_a_fold():
    def owners(names):
        return [set(sources.clipart(n, "none").groups.tolist()) for n in names]

    train, validation, test = owners(SPLITS)
    assert not (train & validation)
    assert not (train & test)
    assert not (validation & test)
    tests = []
    for fold in range(groups.NUM_FOLDS):
        rest, held = owners([f"fold{fold}:train", f"fold{fold}:test"])
        assert not rest & held
        tests.append(held)
    assert sum(map(len, tests)) == len(set.union(*tests)) == 3056


def test_near_duplicates_are_in_one_group(pictures, records):
    by_key = dict(zip([r.key for r in records], pictures.groups.tolist(), strict=True))
    deck = "recreation/games/cards/simple/simple_"
    assert by_key[f"{deck}c_4.png"] == by_key[f"{deck}s_4.png"]
    assert by_key["people/grandpa_01.png"] != by_key[f"{deck}c_4.png"]


@pytest.fixture(scope="module")
def names_of():
    """For each label set, the class names of each labelled picture."""
    return {
        labels: {
            record.key: [source.class_names[n] for n in record.labels]
            for record in map(source.__getitem__, range(len(source)))
        }
        for labels in ("classes8", "classes34")
        for source in [sources.clipart("all", labels)]
    }


@pytest.mark.parametrize(
    "key, classes8, classes34",
    [
        ("food/submarine_sandwich_01.png", ["food"], None),
        ("animals/mammals/raccoon_ganson.png", ["animals"], ["animals/mammals"]),
        ("people/smilies/smiley001.png", ["people"], ["people/smilies"]),
        (
            "signs_and_symbols/flags/europe/slovakia.png",
            None,
            ["signs_and_symbols/flags"],
        ),
        # Links give a second label, or the only one.
        (
            "tools/weapons/m1_abrams_main_battle_tank_01.png",
            ["tools", "transportation"],
            ["tools/weapons", "transportation/vehicles"],
        ),
        (
            "signs_and_symbols/map_symbols/aiga_up_arrow1.png",
            ["transportation"],
            ["signs_and_symbols/map_symbols"],
        ),
        ("office/fancy_folder_01.png", None, None),
    ],
)
def test_labels_are_the_folder_and_the_folders_of_links(
    names_of, key, classes8, classes34
):
    assert names_of["classes8"].get(key) == classes8
    assert names_of["classes34"].get(key) == classes34


def test_captions_are_there_and_free_of_junk(records):
    texts = [caption for r in records for caption in r.captions]
    assert len(texts) == len(records)
    assert all(t and t == t.strip().lower() and t.isprintable() for t in texts)
    junk = r"hash\(|@|https?:|clipart by|buculei|rollandin|public domain|unsorted|&#|_"
    assert [t for t in texts if re.search(junk, t)] == []
    series = captions.SERIES - {"advertising"}
    assert [t for t in texts if t.split(",")[0] in series] == []
    assert len(set(texts)) > 2800


@pytest.mark.parametrize(
    "title, keywords, expected",
    [
        (
            "Blue Vacuum Cleaner",
            ["tool", "blue", "hash(0x8)"],
            "blue vacuum cleaner, tool",
        ),
        ("Clipart by Nicu Buculei - pear", ["fruit", ""], "green apple, fruit"),
        ("AIGA_Symbol_Signs", ["mapsym"], "green apple"),
        ("Nicu Buculei", [], "green apple"),
        ("CamelCase12", ["signs_and_symbols", "Nicu Buculei"], "camel case"),
        ("Chodovian&#39;s Dog", ["dog"], "chodovian's dog"),
    ],
)
def test_a_caption_is_the_title_or_the_file_name_and_what_keywords_add(
    title, keywords, expected
):
    key = "food/fruit/green_apple_nicu_bucu_01.png"
    assert captions.write_caption(key, title, keywords, ["Nicu Buculei"]) == expected


def test_the_size_table_is_committed_and_right(pictures, records):
    assert len(list(sources.CLIPART.glob("sizes-*.npy"))) == 1
    calls = []
    table = size_table(
        pictures, read_size=lambda data: calls.append(data) or read_size(data)
    )
    assert len(calls) == SAMPLE  # no scan
    assert [read_size(r.image) for r in records] == list(map(tuple, table.tolist()))
    assert table.max() == clipart.SIDE


def test_the_aspect_is_that_of_the_uncapped_picture(pictures):
    table = size_table(pictures)
    original = pictures.original_sizes
    scale = np.minimum(1, clipart.SIDE / original.max(1, keepdims=True))
    assert (np.abs(table - original * scale) <= 1).all()


def test_the_committed_files_have_their_checksums():
    stored = json.loads((sources.CLIPART / "checksums.json").read_text())
    assert stored["files"] == clipart.checksums(sources.CLIPART)["files"]


@pytest.mark.slow
def test_a_rebuild_gives_the_committed_files():
    packages = debian.find(openclipart.PACKAGES, PACKAGES)
    if not packages:
        pytest.skip(
            f"no openclipart packages in {PACKAGES}; "
            "`python -m navit_jax.data.builders.clipart` fetches them"
        )
    # As a program: TFDS writes the name of the module that is run into the set.
    module = "navit_jax.data.builders.clipart"
    command = [sys.executable, "-m", module, "--check", f"--packages={PACKAGES}"]
    found = subprocess.run(command, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr[-2000:]
    assert "equal: 10 files" in found.stdout


def make_tree(root):
    """A tree as in the packages: two near-duplicates, one left out, and a link."""
    colors = {"animals/birds/owl.png": 60, "people/man.png": 200, "unsorted/x.png": 0}
    for key, color in colors.items():
        path = root / "png" / key
        path.parent.mkdir(parents=True)
        image = Image.new("RGBA", (300, 200))
        image.paste((color, 30, 90, 255), (50, 20, 250, 70))
        image.save(path)
    (root / "png" / "food").mkdir()
    (root / "png" / "food" / "owl.png").symlink_to("../animals/birds/owl.png")
    return root


def test_pictures_are_cut_to_their_alpha_box_on_white_and_capped(tmp_path):
    root = make_tree(tmp_path)
    first, second = clipart.make_examples(root, 100, lossless=True)
    assert first["key"] == "animals/birds/owl.png"
    assert first["original_size"] == [50, 200]
    assert read_size(first["image"]) == (25, 100)
    assert [classes.CLASSES8[i] for i in first["classes8"]] == ["animals", "food"]
    assert [classes.CLASSES34[i] for i in first["classes34"]] == ["animals/birds"]
    assert second["group"] == first["group"] == 0  # flat colours look equal


def test_a_picture_is_composited_on_white(tmp_path):
    image = Image.new("RGBA", (2, 1))
    image.putdata([(0, 0, 0, 255), (0, 0, 0, 51)])
    image.save(tmp_path / "a.png")
    picture = openclipart.read_picture(tmp_path / "a.png")
    assert np.asarray(picture).tolist() == [[[0] * 3, [204] * 3]]


def test_a_large_picture_is_read_whatever_limit_pillow_has(tmp_path, monkeypatch):
    image = Image.new("RGBA", (40, 40))
    image.paste("red", (5, 5, 35, 35))
    image.save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    assert openclipart.read_picture(tmp_path / "a.png").size == (30, 30)
    assert Image.MAX_IMAGE_PIXELS == 100


def test_a_picture_too_large_or_invisible_is_left_out_without_decoding(tmp_path):
    Image.new("RGBA", (4, 4)).save(tmp_path / "empty.png")
    assert openclipart.read_picture(tmp_path / "empty.png") is None
    data = bytearray((tmp_path / "empty.png").read_bytes())
    data[16:24] = (20990).to_bytes(4, "big") + (29700).to_bytes(4, "big")
    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    (tmp_path / "bomb.png").write_bytes(data)
    assert openclipart.read_picture(tmp_path / "bomb.png") is None


def test_a_link_out_of_the_packages_is_refused(tmp_path):
    root = make_tree(tmp_path / "packages")
    (root / "png" / "food" / "evil.png").symlink_to("/etc/hostname")
    with pytest.raises(ConfigError, match=r"evil.png points out of .* refused"):
        openclipart.list_entries(root)


def test_groups_are_chains_of_hashes_that_differ_in_at_most_two_bits():
    hashes = [0b0, 0b1110000, 0b11, 0b1111, 2**63]
    assert groups.group_by_hash(hashes).tolist() == [0, 1, 0, 0, 0]
    # Against a loop over pairs.
    drawn = np.random.default_rng(0).integers(0, 256, 60).tolist()
    label = list(range(60))
    for _ in range(60):
        for i in range(60):
            for j in range(60):
                if (drawn[i] ^ drawn[j]).bit_count() <= 2:
                    label[i] = label[j] = min(label[i], label[j])
    assert groups.group_by_hash(drawn).tolist() == label


def test_splits_and_folds_have_their_shares():
    names = [f"picture {i}" for i in range(20_000)]
    splits = collections.Counter(map(groups.split_of, names))
    folds = collections.Counter(map(groups.fold_of, names))
    np.testing.assert_allclose(
        [splits[s] / 20_000 for s in SPLITS], [0.8, 0.1, 0.1], atol=0.01
    )
    np.testing.assert_allclose([folds[f] / 20_000 for f in range(5)], 0.2, atol=0.01)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"split": "val"}, r"split='val' is unknown.*validation"),
        ({"split": "fold5:train"}, r"split='fold5:train' is unknown"),
        ({"split": "train", "labels": "classes9"}, r"labels='classes9'.*classes34"),
        (
            {"split": "train", "path": "/none"},
            r"no clip art in /none;.*builders.clipart`",
        ),
    ],
)
def test_a_wrong_argument_is_named(arguments, message):
    with pytest.raises(ConfigError, match=message):
        sources.clipart(**arguments)


def test_the_full_build_is_looked_for_in_the_cache_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("NAVIT_JAX_CACHE", str(tmp_path))
    with pytest.raises(ConfigError, match=rf"in {tmp_path}/clipart-full;.*--full"):
        sources.clipart("train", full=True)


def test_missing_packages_say_what_to_do(tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match=r"it holds no openclipart-png_"):
        clipart.main(["--packages", str(tmp_path)])
    monkeypatch.setenv("NAVIT_JAX_CACHE", str(tmp_path))
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(ConfigError, match=r"apt-get is not on this .*--packages"):
        clipart.main([])


def test_check_names_the_file_that_differs(tmp_path, monkeypatch):
    committed = tmp_path / "committed"
    shutil.copytree(sources.CLIPART, committed)
    monkeypatch.setattr(
        clipart, "build", lambda _, target, __: shutil.copytree(committed, target)
    )
    clipart.check([], committed)
    (committed / "features.json").write_text("{}")
    with pytest.raises(DataError, match=r"differs in features.json; .* Pillow"):
        clipart.check([], committed)
