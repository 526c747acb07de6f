"""A folder of pictures and the file of their captions."""

import csv
import json
import os
import pickle

import numpy as np
import pytest
from test_sources import make_folder, own_cache, png

from navit_jax.data import sources
from navit_jax.data import tables as tables_lib
from navit_jax.data.captions import caption_lengths
from navit_jax.data.sizes import size_table
from navit_jax.data.tokenizer import open_tokenizer
from navit_jax.errors import ConfigError

__all__ = ["own_cache"]

NAMES = ["0.png", "1.png", "deep/2.png"]
# As they stand in each format: a quote, a separator, a line break, another script.
CAPTIONS = {
    "0.png": ["a dog", 'a "big", brown\tdog'],
    "1.png": ["two\nlines", "猫 🐈"],
    "deep/2.png": ["an owl"],
}
PAIRS = [(file, text) for file, texts in CAPTIONS.items() for text in texts]


def quote(text):
    return '"' + text.replace('"', '""') + '"'


def table(separator, file="file", caption="caption"):
    rows = [(file, "id", caption), *((f, "7", quote(text)) for f, text in PAIRS)]
    return "\r\n".join(separator.join(row) for row in rows) + "\r\n"


def lines(rows):
    return "\n".join(json.dumps(row) for row in rows)


FILES = {
    "c.csv": table(","),
    "bom.csv": "\ufeff" + table(",", "file_name", "text"),
    "c.tsv": table("\t", "filepath", "title"),
    "one.jsonl": lines({"file": f, "caption": text} for f, text in PAIRS),
    "many.jsonl": lines({"file_name": f, "captions": t} for f, t in CAPTIONS.items()),
    "nulls.jsonl": lines(
        {"file": f, "caption": None, "text": t} for f, t in CAPTIONS.items()
    ),
    "captions_val2017.json": json.dumps(
        {
            "info": {},
            "images": [{"id": 10 + i, "file_name": f} for i, f in enumerate(NAMES)],
            "annotations": [
                {"id": i, "image_id": 10 + NAMES.index(f), "caption": text}
                for i, (f, text) in enumerate(PAIRS)
            ],
        }
    ),
}


# As spreadsheets write "Unicode text".
FILES["little.tsv"] = b"\xff\xfe" + FILES["c.tsv"].encode("utf-16-le")
FILES["big.csv"] = b"\xfe\xff" + FILES["c.csv"].encode("utf-16-be")


@pytest.fixture
def root(tmp_path):
    return make_folder(tmp_path / "set", NAMES)


def open_captioned(root, name, text, **arguments):
    path = root.parent / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    arguments = {"labels": False} | arguments
    return sources.folder(str(root), captions=str(path), **arguments)


def captions_of(source):
    records = [source[i] for i in range(len(source))]
    return {record.key: list(record.captions) for record in records}


@pytest.mark.parametrize("name", FILES)
def test_every_format_gives_all_captions_of_each_picture(root, name):
    source = open_captioned(root, name, FILES[name])
    assert captions_of(source) == CAPTIONS
    assert captions_of(pickle.loads(pickle.dumps(source))) == CAPTIONS
    assert source[0].image == png(5, 7)


def test_without_a_file_a_folder_has_no_captions_and_the_tables_it_had(root):
    plain = sources.folder(str(root), labels=False)
    assert captions_of(plain) == {name: [] for name in NAMES}
    captioned = open_captioned(root, "c.csv", FILES["c.csv"])
    other = open_captioned(root, "c.csv", FILES["c.csv"].replace("owl", "cat"))
    prints = [source.fingerprint() for source in (plain, captioned, other)]
    assert len(set(prints)) == 3


@pytest.fixture
def scanned(monkeypatch):
    """The tables that are scanned from now on."""
    scan, found = tables_lib.scan, []
    note = lambda source, kind, n: found.append(kind.name) or scan(source, kind, n)  # noqa: E731
    monkeypatch.setattr(tables_lib, "scan", note)
    return found


def test_another_file_of_captions_scans_no_size_again(root, scanned):
    first = open_captioned(root, "c.csv", FILES["c.csv"])
    other = open_captioned(root, "other.csv", "file,caption\n0.png,a card\n")
    plain = sources.folder(str(root), labels=False)
    for source in (first, other, first, plain, other):
        np.testing.assert_array_equal(size_table(source), [(5, 7), (9, 4), (3, 3)])
    assert scanned == ["sizes"]
    os.utime(root / "0.png", (1, 1))
    size_table(other)
    assert scanned == ["sizes"] * 2


def test_lengths_of_captions_are_of_the_captions_and_the_tokenizer(root, scanned):
    first = open_captioned(root, "c.csv", FILES["c.csv"])
    other = open_captioned(root, "other.csv", "file,caption\n0.png,a card\n")
    tokenizer, short = open_tokenizer(), open_tokenizer(length=3)
    expected = [np.array(caption_lengths(s, tokenizer)) for s in (first, other)]
    # Neither the pictures nor what else is counted in between make a difference.
    for name in NAMES:
        (root / name).write_bytes(b"")
    assert caption_lengths(first, short).max() == 3
    for i in (0, 1, 0):
        found = caption_lengths((first, other)[i], tokenizer)
        np.testing.assert_array_equal(found, expected[i])
    assert scanned == ["captions"] * 3
    changed = open_captioned(root, "c.csv", FILES["c.csv"].replace("an owl", "cat"))
    found = caption_lengths(changed, tokenizer)[2, 0]
    assert found == len(tokenizer.encode("cat")) != expected[0][2, 0]
    assert scanned == ["captions"] * 4


def test_the_captions_of_a_folder_are_scanned_for_their_lengths(root):
    source = open_captioned(root, "c.csv", FILES["c.csv"])
    tokenizer = open_tokenizer()
    expected = [[len(tokenizer.encode(t)) for t in CAPTIONS[name]] for name in NAMES]
    expected = [row + [0] * (2 - len(row)) for row in expected]
    np.testing.assert_array_equal(caption_lengths(source, tokenizer), expected)


def test_what_has_no_partner_is_counted(root, caplog):
    text = "file,caption\n0.png,a\n./deep//2.png,\ngone.png,b\n../set/gone.txt,c\n"
    with caplog.at_level("WARNING", logger="absl"):
        source = open_captioned(root, "c.csv", text)
    assert captions_of(source) == {"0.png": ["a"], "1.png": [], "deep/2.png": [""]}
    assert "1 pictures have no caption in" in caplog.text
    assert "it names 2 that are not there, as '../set/gone.txt'" in caplog.text
    caplog.clear()
    rows = [{"file": str(root / name), "caption": None} for name in NAMES[1:]]
    with caplog.at_level("WARNING", logger="absl"):
        source = open_captioned(
            root, "a.jsonl", lines([{"image": "0.png", "text": "x"}, *rows])
        )
    assert captions_of(source) == {"0.png": ["x"], "1.png": [], "deep/2.png": []}
    assert "2 pictures have no caption" in caplog.text
    assert "it names 0 that are not there" in caplog.text


def test_a_path_may_be_absolute_and_a_name_no_utf8(root):
    (root / "0.png").rename(root / "\udcff.png")
    rows = b"file,caption\n\xff.png,caf\xe9\n" + f"{root}/1.png,b\n".encode()
    source = open_captioned(root, "c.csv", rows)
    found = {r.captions for r in map(source.__getitem__, range(3))}
    assert found == {("caf\ufffd",), ("b",), ()}
    rows = f"file,caption\n1.png,a\n{root}/1.png,b\n"
    assert captions_of(open_captioned(root, "c.csv", rows))["1.png"] == ["a", "b"]


def test_half_a_surrogate_is_replaced_and_a_long_caption_kept(root):
    long = "word " * 20_000
    rows = [
        {"file": "0.png", "caption": "x\ud800y"},
        {"file": "1.png", "caption": long},
    ]
    found = captions_of(open_captioned(root, "c.jsonl", lines(rows)))
    assert found == {"0.png": ["x\ufffdy"], "1.png": [long], "deep/2.png": []}
    # More than the csv module takes by itself.
    longer, limit = 2 * long, csv.field_size_limit()
    assert len(longer) > limit
    table = f"file\tcaption\n1.png\t{longer}\n"
    assert captions_of(open_captioned(root, "c.tsv", table))["1.png"] == [longer]
    assert csv.field_size_limit() == limit


def test_parts_of_a_folder_share_a_file(tmp_path, caplog):
    names = [f"{part}/{i}.png" for part in ("train", "val") for i in range(3)]
    root = make_folder(tmp_path / "parts", names)
    text = "file,caption\n" + "".join(f"{name},of {name}\n" for name in names)
    with caplog.at_level("WARNING", logger="absl"):
        source = open_captioned(root, "c.csv", text, split="validation", labels=True)
    assert captions_of(source) == {f"{i}.png": [f"of val/{i}.png"] for i in range(3)}
    names = [f"{i}.png" for i in range(40)]
    root = make_folder(tmp_path / "hashed", names)
    text = "file,caption\n" + "".join(f"{name},of {name}\n" for name in names)
    with caplog.at_level("WARNING", logger="absl"):
        source = open_captioned(root, "c.csv", text, split="validation")
    assert 0 < len(source) < 20
    assert captions_of(source) == {file: [f"of {file}"] for file in source.files}
    assert not caplog.text


@pytest.mark.parametrize(
    "name, text, message",
    [
        ("c.txt", "", r"captions='.*c.txt': known are .csv, .tsv, .jsonl, .json"),
        ("c.csv", "", r"c.csv has \[\], and none of file, file_name"),
        ("c.csv", "name,caption\n", r"c.csv has \['name', 'caption'\], and none of"),
        ("c.csv", "file;caption\n0.png;a\n", "and none of"),
        ("c.csv", "file,caption\n", "c.csv' is empty: it names no picture"),
        ("c.csv", "file,caption\n0.png,a, b\n", r"c.csv:2 has 3 columns, the header 2"),
        ("c.csv", "file,caption\n,a\n", "c.csv:2 names no picture: '' is no path"),
        ("c.tsv", 'file\tcaption\n0.png\t"a" b\n1.png\tc\n', r"c.tsv:2: .*doubled"),
        ("c.tsv", 'file\tcaption\n0.png\t"a\n1.png\tb\n', r"c.tsv:3: .*doubled"),
        ("c.jsonl", '{"file": "0.png"}\n\n{"file"\n', "c.jsonl:3 is no JSON"),
        ("c.jsonl", "[1]", "c.jsonl:1 is no object"),
        ("c.jsonl", "[" * 100_000, "c.jsonl:1 is no JSON"),
        ("c.jsonl", '{"path": "0.png"}', r"c.jsonl:1 has \['path'\], and none"),
        ("c.jsonl", '{"file": 7}', "c.jsonl:1 names no picture: 7 is no path"),
        ("c.jsonl", '{"file": "0.png", "text": 7}', "c.jsonl:1 has 7 for a caption"),
        ("c.json", "{", "c.json is no JSON"),
        ("c.json", "[]", "not laid out as COCO's captions"),
        ("c.json", '{"images": []}', "not laid out .* KeyError.'annotations'"),
        (
            "c.json",
            '{"images": [], "annotations": [{"image_id": 3, "caption": "a"}]}',
            r"c.json:annotations\[0\]: no image has id 3",
        ),
        (
            "c.csv",
            "file,caption\nset/0.png,a\n",
            "of none of the 3 .* of set: it names 'set/0.png', .* there is '0.png'",
        ),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named_with_file_line_and_remedy(root, name, text, message):
    with pytest.raises(ConfigError, match=message):
        open_captioned(root, name, text)


def test_a_file_that_is_not_there_is_named(root):
    with pytest.raises(ConfigError, match=r"captions='/none.csv' cannot be read"):
        sources.folder(str(root), labels=False, captions="/none.csv")
