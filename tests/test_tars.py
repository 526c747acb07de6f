"""Tars of image and text become array_record files; what is forged is counted."""

import collections
import io
import json
import random
import tarfile

import commands
import numpy as np
import pytest
from test_sources import own_cache, png

from navit_jax.data import open_sources, record_files, sizes, tables, tar_samples, tars
from navit_jax.errors import ConfigError, DataError

__all__ = ["own_cache"]

PICTURE = png(5, 7)


def member(name, data=b"", **fields):
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for field, value in fields.items():
        setattr(info, field, value)
    return info, data


def sample(name, text, picture=PICTURE):
    return [member(f"{name}.jpg", picture), member(f"{name}.txt", text)]


def write_tar(path, members, format=tarfile.PAX_FORMAT):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=format) as tar:
        for info, data in members:
            tar.addfile(info, io.BytesIO(data))
    return path


def convert(paths, output, **arguments):
    """(records by key, reasons by key, notes)."""
    written = tars.convert(paths, output, **arguments)
    (source,), _ = open_sources({"pairs": written.section})
    records = [source[i] for i in range(len(source))]
    assert written.number == len(records) == len({r.key for r in records})
    return {r.key: r for r in records}, written.skipped, dict(written.notes)


def captions_of(path, output, **arguments):
    records, skipped, _ = convert([path], output, **arguments)
    assert not skipped
    return {key.split("/", 1)[1]: r.captions for key, r in records.items()}


@pytest.mark.parametrize(
    "format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]
)
def test_a_sample_is_what_shares_a_name_up_to_its_first_dot(tmp_path, format):
    long = "folder/" * 12 + "n" * 60
    path = write_tar(
        tmp_path / "00000.tar",
        [
            member("./a.JPG", png(3, 4)),
            member("./a.txt", b"a dog\n"),
            member("x.y/b.left.npy", b"1234"),
            member("x.y/b.png", png(9, 2)),
            member("x.y/b.txt", "猫".encode()),
            member("x.y", type=tarfile.DIRTYPE),
            member("README", b"not a sample"),
            member("._c.jpg", b"not a sample"),
            member("c.json", b"{}"),
            member("c.txt", b""),
            member("c.webp", png(1, 1)),
            *sample(long, b"long"),
        ],
        format,
    )
    records, skipped, notes = convert([path], tmp_path / "out")
    names = ["a", "x.y/b", "c", long]
    assert list(records) == [f"00000.tar/{name}" for name in names]
    found = {key: (r.image, r.captions) for key, r in records.items()}
    assert list(found.values()) == [
        (png(3, 4), ("a dog",)),
        (png(9, 2), ("猫",)),
        (png(1, 1), ("",)),
        (PICTURE, ("long",)),
    ]
    assert (skipped, notes) == ([], {})


def test_captions_are_the_text_its_lines_or_what_the_json_has_under_a_key(tmp_path):
    values = ["one", ["two", "", "tw\u00f6"], None]
    rows = [
        (f"{i}", b"first\r\n\nsecond \n", {"caption": value, "key": i})
        for i, value in enumerate(values)
    ]
    members = [
        one
        for name, text, row in [*rows, ("3", b"", {})]
        for one in (
            *sample(name, text),
            member(f"{name}.json", json.dumps(row).encode()),
        )
    ]
    path = write_tar(tmp_path / "a.tar", members)
    whole = captions_of(path, tmp_path / "1")
    assert whole == {**dict.fromkeys("012", ("first\r\n\nsecond",)), "3": ("",)}
    lines = captions_of(path, tmp_path / "2", lines=True)
    assert lines == {**dict.fromkeys("012", ("first", "second")), "3": ()}
    under = captions_of(path, tmp_path / "3", json_key="caption")
    assert under == {"0": ("one",), "1": ("two", "", "tw\u00f6"), "2": (), "3": ()}
    assert convert([path], tmp_path / "3", json_key="caption")[2] == {
        "without a caption": 2
    }


def test_captions_that_are_no_utf8_are_kept_for_the_tokenizer(tmp_path):
    odd = [b"caf\xe9", b"a\0b", "🐈 \u202eא".encode(), b"x" * 100_000]
    path = write_tar(
        tmp_path / "a.tar",
        [one for i, t in enumerate(odd) for one in sample(str(i), t)],
    )
    found = captions_of(path, tmp_path / "out")
    assert found == {
        str(i): (text.decode("utf-8", "replace"),) for i, text in enumerate(odd)
    }
    broken = [b'{"t": "caf\xe9"}', b'\xef\xbb\xbf{"t": "bom"}', b'{"t": "\\ud800"}']
    members = [
        one
        for i, row in enumerate(broken)
        for one in (member(f"{i}.jpg", PICTURE), member(f"{i}.json", row))
    ]
    path = write_tar(tmp_path / "b.tar", members)
    found = captions_of(path, tmp_path / "json", json_key="t")
    assert found["0"] == ("caf\ufffd",)
    assert found["1"] == ("bom",)
    assert set(found["2"][0]) == {"\ufffd"}


def test_what_leads_out_of_a_folder_links_and_devices_are_refused(tmp_path):
    victim = tmp_path / "victim.jpg"
    victim.write_bytes(PICTURE)
    link = {"type": tarfile.SYMTYPE, "linkname": str(victim)}
    hard = {"type": tarfile.LNKTYPE, "linkname": "good.jpg"}
    path = write_tar(
        tmp_path / "in" / "a.tar",
        [
            *sample("good", b"good"),
            *sample("../up", b"up"),
            *sample(str(tmp_path / "absolute"), b"absolute"),
            *sample("x/../../deep", b"deep"),
            member("sym.jpg", **link),
            member("sym.txt", b"sym"),
            member("hard.jpg", **hard),
            member("hard.txt", b"hard"),
            member("fifo.jpg", type=tarfile.FIFOTYPE),
            member("..", type=tarfile.DIRTYPE),
            member("folder", **link),
            *sample("folder/inside", b"inside"),
        ],
    )
    before = {p for p in tmp_path.rglob("*") if p != path}
    records, skipped, _ = convert([path], tmp_path / "out")
    assert list(records) == ["a.tar/good", "a.tar/folder/inside"]
    assert collections.Counter(reason for _, reason in skipped) == {
        "unsafe_name": 4,
        "link": 3,
        "special_file": 1,
    }
    assert ("a.tar/../up", "unsafe_name") in skipped
    outside = {p for p in tmp_path.rglob("*") if tmp_path / "out" not in p.parents}
    assert outside - {path, tmp_path / "out"} == before
    assert not any("up" in p.name or "inside" in p.name for p in tmp_path.rglob("*"))


def test_samples_that_can_not_be_used_are_skipped_counted_and_named(tmp_path):
    reasons = {
        "no_picture": [member("a.txt", b"a")],
        "several_pictures": [*sample("b", b"b"), member("b.png", PICTURE)],
        "not_image": sample("c", b"c", b"<html>"),
        "empty": sample("d", b"d", b""),
        "duplicate": [*sample("e", b"e"), member("e.JPG", PICTURE)],
        "bad_json": [member("f.jpg", PICTURE), member("f.json", b"{")],
    }
    members = [one for some in reasons.values() for one in some]
    path = write_tar(tmp_path / "a.tar", [*members, *sample("z", b"z")])
    records, skipped, _ = convert([path], tmp_path / "out")
    expected = {
        (f"a.tar/{key}", reason) for key, reason in zip("abcde", reasons, strict=False)
    }
    assert set(skipped) == expected
    assert records["a.tar/f"].captions == ()
    _, skipped, _ = convert([path], tmp_path / "json", json_key="caption")
    assert set(skipped) == {*expected, ("a.tar/f", "bad_json")}
    for row in (b"[1]", b"[" * 100_000, b'{"t": 1}', b'{"t": ["a", {}]}'):
        with pytest.raises(ValueError, match=r"."):
            tars.read_captions({"json": row}, "t", lines=False)


def test_a_key_that_comes_again_is_skipped_and_the_rest_read(tmp_path):
    members = [*sample("a", b"1"), *sample("b", b"2"), *sample("a", b"3")]
    path = write_tar(tmp_path / "1.tar", [*members, *sample("c", b"4")])
    other = write_tar(tmp_path / "2.tar", sample("a", b"5"))
    records, skipped, _ = convert([path, other], tmp_path / "out")
    assert {key: r.captions for key, r in records.items()} == {
        "1.tar/a": ("1",), "1.tar/b": ("2",), "1.tar/c": ("4",), "2.tar/a": ("5",),
    }  # fmt: skip
    assert skipped == [("1.tar/a", "duplicate")]


def test_of_a_cut_tar_all_whole_samples_are_read_wherever_it_is_cut(tmp_path):
    members = [one for name in "abc" for one in sample(name, name.encode() * 600)]
    data = write_tar(tmp_path / "whole.tar", members).read_bytes()
    # Where the data of each sample end, and the end mark begins.
    ends = [2560, 5120, 7680]
    whole = [end + n for end in ends for n in (-1, 0, 511)]
    for cut in [*range(1, ends[-1] + 512, 73), 511, 512, 1024, *whole]:
        path = tmp_path / "cut.tar"
        path.write_bytes(data[:cut])
        entries = list(tars.read_entries(path, None, False, lambda n: None))
        good = [e.key[-1] for e in entries if not e.reason]
        # Of the last one it is not known that it is whole, but by what follows it.
        sure = sum(end + 512 <= cut for end in ends)
        assert good == ["a", "b", "c"][:sure], cut
        reasons = [e.reason for e in entries if e.reason]
        assert reasons in (["cut"], ["not_tar"]), cut
        assert (reasons == ["not_tar"]) == (cut < 512)
    entries = list(tars.read_entries(tmp_path / "whole.tar", None, False, lambda n: 0))
    assert [e.reason for e in entries] == ["", "", ""]


def test_no_damage_raises_or_hangs_and_what_is_before_it_is_read(tmp_path):
    members = [one for name in "abcd" for one in sample(name, name.encode() * 9)]
    members[4][0].name = "c" * 200 + ".jpg"  # with an extended header
    data = bytearray(write_tar(tmp_path / "a.tar", members).read_bytes())
    rng = random.Random(0)
    for _ in range(300):
        damaged = bytearray(data)
        at = 512 * rng.randrange(6, len(data) // 512) + rng.choice(
            [0, 124, 135, 156, 200]
        )
        for place in range(at, min(at + rng.choice([1, 4, 12]), len(data))):
            damaged[place] = rng.choice(
                [0, 0x20, 0x30, 0x37, 0x80, 0xFF, rng.randrange(256)]
            )
        if rng.random() < 0.8:  # A forged header has a right checksum.
            block = damaged[at // 512 * 512 :][:512]
            total = 256 + sum(block[:148]) + sum(block[156:])
            start = at // 512 * 512 + 148
            damaged[start : start + 8] = b"%06o\0 " % total
        path = tmp_path / "damaged.tar"
        path.write_bytes(damaged)
        entries = list(tars.read_entries(path, None, False, lambda n: None))
        assert entries[0].key == "damaged.tar/a"
        assert not entries[0].reason


def test_a_size_that_leads_back_ends_the_tar(tmp_path):
    path = write_tar(tmp_path / "a.tar", [*sample("a", b"a"), *sample("b", b"b")])
    data = bytearray(path.read_bytes())
    start = 4 * 512  # the third header
    data[start + 124 : start + 136] = b"\xff" * 10 + b"\xfc\x00"  # -1024, in base 256
    total = 256 + sum(data[start : start + 148]) + sum(data[start + 156 : start + 512])
    data[start + 148 : start + 156] = b"%06o\0 " % total
    path.write_bytes(data)
    members = list(tar_samples.read_members(path, {"jpg", "txt"}, lambda n: None))
    assert [m.reason for m in members] == ["", "", "cut"]


def test_a_member_that_says_to_be_huge_is_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr(tar_samples, "MAX_BYTES", 2000)
    members = [*sample("a", b"a"), *sample("b", b"x" * 3000), *sample("c", b"c")]
    records, skipped, _ = convert(
        [write_tar(tmp_path / "a.tar", members)], tmp_path / "o"
    )
    assert list(records) == ["a.tar/a", "a.tar/c"]
    assert skipped == [("a.tar/b", "too_large")]


def test_memory_does_not_grow_with_the_files_of_a_tar(tmp_path, monkeypatch):
    path = write_tar(tmp_path / "a.tar", [member(f"{i}.txt") for i in range(9)])
    open_, opened = tarfile.open, []
    monkeypatch.setattr(
        tarfile, "open", lambda *a, **k: opened.append(open_(*a, **k)) or opened[-1]
    )
    read = tar_samples.read_members(path, (), lambda n: None)
    # `tarfile` alone would keep all that it has met.
    assert [len(opened[0].members) for _ in read] == [0] * 9


def test_a_file_that_is_no_tar_is_counted_and_the_others_read(tmp_path):
    good = write_tar(tmp_path / "good.tar", sample("a", b"a"))
    bad = tmp_path / "bad.tar"
    bad.write_bytes(b"<html>" * 500)
    empty = tmp_path / "empty.tar"
    empty.write_bytes(b"")
    records, skipped, _ = convert([bad, empty, good], tmp_path / "out")
    assert list(records) == ["good.tar/a"]
    assert skipped == [("bad.tar", "not_tar"), ("empty.tar", "not_tar")]
    with pytest.raises(
        DataError, match=r"no picture of 1 tar can .*'bad.tar', 'not_tar'"
    ):
        tars.convert([bad], tmp_path / "none")


@pytest.fixture
def three(tmp_path):
    return [
        write_tar(
            tmp_path / f"{n}.tar", [*sample(f"{n}a", b"a"), *sample(f"{n}b", b"b")]
        )
        for n in range(3)
    ]


def test_sizes_are_known_without_reading_what_was_converted(
    three, tmp_path, monkeypatch
):
    written = tars.convert(three, tmp_path / "out")
    (source,), _ = open_sources({"pairs": written.section})
    monkeypatch.setattr(tables, "scan", None)
    np.testing.assert_array_equal(sizes.size_table(source), [(5, 7)] * 6)


def files(folder):
    return {p.name: p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_after_a_stop_it_goes_on_and_the_files_are_the_same(
    three, tmp_path, monkeypatch
):
    tars.convert(three, tmp_path / "whole")
    make, calls = record_files.make_example, []

    def stop(key, *arguments):
        calls.append(key)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return make(key, *arguments)

    monkeypatch.setattr(record_files, "make_example", stop)
    with pytest.raises(KeyboardInterrupt):
        tars.convert(three, tmp_path / "out")
    whole, begun = files(tmp_path / "whole"), files(tmp_path / "out")
    # It stopped in the second of three; what has a name of its own is whole.
    assert sum("array_record" in name for name in begun) == 1
    assert begun.items() - {("part", begun.get("part"))} <= whole.items()
    tars.convert(three, tmp_path / "out")
    assert calls[4:] == ["1.tar/1a", "1.tar/1b", "2.tar/2a", "2.tar/2b"]
    assert files(tmp_path / "out") == whole
    with pytest.raises(ConfigError, match=r"is begun, or done, as .*not as"):
        tars.convert(three, tmp_path / "out", lines=True)


def test_the_command_tells_how_to_open_the_set_and_counts(three, tmp_path):
    write_tar(three[0], [*sample("a", b"a"), member("../b.jpg", PICTURE)])
    arguments = [f"--tars={tmp_path}/*.tar", f"--output={tmp_path}/out"]
    done = commands.run("navit_jax.data.tars", *arguments)
    assert done.returncode == 0, done.stderr
    assert "left out, unsafe_name: 0.tar/../b" in done.stdout
    assert (
        f"5 pictures in {tmp_path}/out; left out: {{'unsafe_name': 1}}" in done.stdout
    )
    assert "B/s" in done.stderr
    assert "100%" in done.stderr
    line = done.stdout.splitlines()[-1].removeprefix("data.sources = ")
    section = json.loads(line.replace("'", '"').replace("None", "null"))["pairs"]
    (source,), _ = open_sources({"pairs": section})
    assert source[0].captions == ("a",)


def test_tars_that_are_not_there_or_share_a_name_are_refused(three, tmp_path):
    assert tars.find([f"{tmp_path}/[12].tar", str(three[0]), str(three[2])]) == three
    with pytest.raises(ConfigError, match=r"--tars: no file matches '/none/\*.tar'"):
        tars.find(["/none/*.tar"])
    write_tar(tmp_path / "other" / "0.tar", sample("a", b"a"))
    with pytest.raises(ConfigError, match=r"share a name"):
        tars.find([f"{tmp_path}/*.tar", f"{tmp_path}/other/*.tar"])
