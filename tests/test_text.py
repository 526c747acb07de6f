"""Captions become the tokens that the libraries give, whatever the captions are."""

import ast
import dataclasses
import importlib
import io
import pickle
import re
from concurrent.futures import ThreadPoolExecutor

import jaxtyping
import numpy as np
import pytest
import scipy.stats
import sentencepiece
import tokenizers
from test_architecture import MODULES
from test_sources import example, png, write_records

from navit_jax import config
from navit_jax.data import captions, draws, sizes, sources, tables, text
from navit_jax.data.stored import Stored
from navit_jax.data.tokenizer import DEFAULT, clean, open_tokenizer
from navit_jax.errors import ConfigError, DataError

TEXTS = [f"a {kind} of number {i}" for i in range(40) for kind in ("cat", "house")]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("NAVIT_JAX_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A SentencePiece model in the layout of T5: padding 0, end 1, unknown 2."""
    path = tmp_path_factory.mktemp("model") / "spiece.model"
    file = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS),
        model_writer=file,
        vocab_size=30,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        minloglevel=2,
    )
    path.write_bytes(file.getvalue())
    return path


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """A tokenizer.json in the layout of CLIP, which asks to pad and to cut as well."""
    path = tmp_path_factory.mktemp("clip") / "tokenizer.json"
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.normalizer = tokenizers.normalizers.Lowercase()
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<start>", "<end>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(TEXTS, trainer)
    made.post_processor = tokenizers.processors.RobertaProcessing(
        ("<end>", 1), ("<start>", 0), trim_offsets=False, add_prefix_space=False
    )
    made.enable_padding(length=77, pad_id=1, pad_token="<end>")
    made.enable_truncation(3)
    made.save(str(path))
    return path


# ---- tokens are the library's


@pytest.mark.parametrize("length", [3, 8, 50])
def test_tokens_of_a_sentencepiece_model_are_its_own_and_the_end(model, length):
    library = sentencepiece.SentencePieceProcessor(model_file=str(model))
    whole = library.encode("a house of number 17")
    tokenizer = open_tokenizer(str(model), length)
    found = tokenizer.encode("a house of number 17")
    assert found.dtype == np.int32
    assert found.tolist() == [*whole[: length - 1], 1]
    bare = open_tokenizer(str(model), length, marks=False)
    assert bare.encode("a house of number 17").tolist() == whole[:length]
    assert tokenizer.vocab_size == library.vocab_size() == 30


@pytest.mark.parametrize("length", [3, 8, 50])
def test_tokens_of_a_tokenizer_json_are_its_own_between_its_marks(clip, length):
    library = tokenizers.Tokenizer.from_file(str(clip))
    library.no_padding()
    library.no_truncation()
    whole = library.encode("A house of number 17").ids
    assert (whole[0], whole[-1]) == (0, 1)
    tokenizer = open_tokenizer(str(clip), length)
    found = tokenizer.encode("A house of number 17").tolist()
    assert found == (whole if len(whole) <= length else [*whole[: length - 1], 1])
    bare = open_tokenizer(str(clip), length, marks=False)
    assert bare.encode("A house of number 17").tolist() == whole[1:-1][:length]
    assert tokenizer.vocab_size == library.get_vocab_size() == 300


def test_a_mark_that_a_caption_spells_out_is_text(model, clip):
    for path, mark in ((model, "</s>"), (clip, "<end>")):
        tokenizer = open_tokenizer(str(path), 50)
        # Also where it was sent to another process.
        for made in (tokenizer, pickle.loads(pickle.dumps(tokenizer))):
            assert made.encode(f"a {mark} b").tolist().count(1) == 1


@pytest.mark.parametrize("name", ["default", "model", "clip"])
def test_a_tokenizer_gives_the_same_from_threads_and_after_pickle(name, request):
    path = None if name == "default" else str(request.getfixturevalue(name))
    tokenizer = open_tokenizer(path)
    expected = [tokenizer.encode(caption).tolist() for caption in TEXTS]
    again = pickle.loads(pickle.dumps(tokenizer))
    assert again == tokenizer
    assert again.fingerprint == tokenizer.fingerprint
    with ThreadPoolExecutor(8) as pool:
        assert [x.tolist() for x in pool.map(again.encode, TEXTS)] == expected


@pytest.mark.parametrize(
    "caption", ["a red panda", "Größe 42", "犬と猫", "\U0001f600", "שלום"]
)
def test_what_the_default_tokenizer_reads_can_be_read_back(caption):
    tokenizer = open_tokenizer(length=50)
    ids = tokenizer.encode(caption)
    library = sentencepiece.SentencePieceProcessor(model_file=str(DEFAULT))
    assert library.unk_id() not in ids
    assert 0 not in ids
    assert library.decode(ids[:-1].tolist()) == caption.lower()


def test_fingerprints_tell_apart_whatever_gives_other_tokens(model, clip):
    made = [
        open_tokenizer(),
        open_tokenizer(length=23),
        open_tokenizer(marks=False),
        open_tokenizer(empty="keep"),
        open_tokenizer(broken="skip"),
        open_tokenizer(str(model)),
        open_tokenizer(str(clip)),
    ]
    assert len({tokenizer.fingerprint for tokenizer in made}) == len(made)
    assert open_tokenizer().fingerprint == made[0].fingerprint


# ---- the vocabulary of the package


@pytest.fixture(scope="module")
def training_captions():
    return text.read_captions("train")


def test_the_default_vocabulary_is_what_training_gives(training_captions):
    assert text.train(training_captions, text.SIZE) == DEFAULT.read_bytes()


def test_the_default_vocabulary_cuts_few_captions(training_captions):
    # docs/data.md has the figures; `python -m navit_jax.data.text --measure`.
    tokenizer = open_tokenizer(length=1000)
    assert tokenizer.vocab_size == 2048
    held_out = text.read_captions("validation")
    for texts in (training_captions, held_out):
        lengths = np.array([len(tokenizer.encode(caption)) for caption in texts])
        assert 9 < lengths.mean() < 11
        assert (lengths > 24).mean() < 0.03


def test_check_compares_and_says_what_differs(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(text, "read_captions", lambda split: TEXTS * 30)
    monkeypatch.setattr(text, "SIZE", 300)
    monkeypatch.setattr(text, "DEFAULT", tmp_path / "tiny.model")
    text.main([])
    text.main(["--check"])
    assert "equal: " in capsys.readouterr().out
    data = bytearray((tmp_path / "tiny.model").read_bytes())
    data[-1] ^= 1
    (tmp_path / "tiny.model").write_bytes(data)
    with pytest.raises(DataError, match=r"differs from .*this is sentencepiece \d"):
        text.main(["--check"])


# ---- what is wrong is named


@pytest.mark.parametrize(
    "contents",
    [
        b"",
        b"<html>",
        b'{"a": 1}',
        b'{"cat": 0}',
        b"version https://git-lfs",
        b"\x1f\x8b",
    ],
    ids=["empty", "html", "json", "vocab.json", "lfs", "gzip"],
)
def test_a_file_that_is_no_vocabulary_is_refused(tmp_path, contents):
    (tmp_path / "file").write_bytes(contents)
    with pytest.raises(ConfigError, match=r"file' is neither a SentencePiece .model"):
        open_tokenizer(str(tmp_path / "file"))


def test_a_vocabulary_that_is_not_there_is_named(tmp_path):
    for path in (tmp_path / "none.model", tmp_path):
        with pytest.raises(ConfigError, match=rf"'{path}' cannot be read .*: give the"):
            open_tokenizer(str(path))


def test_a_library_that_is_not_installed_is_named(model, clip, monkeypatch):
    def refuse(name):
        raise ImportError(name)

    monkeypatch.setattr(importlib, "import_module", refuse)
    for path, name in ((model, "sentencepiece"), (clip, "tokenizers")):
        message = rf"package {name}: `pip install -e .\[text\]`"
        with pytest.raises(ConfigError, match=message):
            open_tokenizer(str(path))


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"length": 1}, "length=1 has no room for a word beside 1 marks"),
        ({"empty": "drop"}, "empty='drop' is unknown; known: skip, keep"),
        ({"broken": "keep"}, "broken='keep' is unknown; known: replace, skip"),
        ({"marks": False, "empty": "keep"}, "empty='keep' needs a mark"),
        ({"lenght": 3}, "lenght is unknown"),
    ],
)
def test_a_wrong_argument_is_named(arguments, message):
    with pytest.raises(ConfigError, match=message):
        config.call(open_tokenizer, arguments, "data.tokenizer")


def test_marks_are_asked_for_by_true_or_false(monkeypatch):
    # As users call it: without the types that the tests check at every call.
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises(ConfigError, match="marks='no': give True or False"):
        open_tokenizer(marks="no")


def test_no_module_needs_the_libraries_to_be_imported():
    optional = {"sentencepiece", "tokenizers"}
    for path in MODULES:
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Import | ast.ImportFrom):
                continue
            names = [a.name for a in node.names]
            names += [getattr(node, "module", None) or ""]
            assert not optional & {str(name).split(".")[0] for name in names}, path


# ---- captions of any kind

ODD = {
    "nothing": ("", ""),
    "blanks": (" \t\n\u3000\u00a0", ""),
    "invisible": ("\u200b\u202e\ufeff", ""),
    "NUL": ("a\0cat", "a cat"),
    "only NUL": ("\0\0", ""),
    "controls": ("a\x1b[31m\x85cat\x7f", "a [31m cat"),
    "half a surrogate": ("a \ud83d cat", "a \ufffd cat"),
    "only broken": ("\ufffd \udcff", ""),
    "emoji": ("a \U0001f600", "a \U0001f600"),
    "family": ("\U0001f468\u200d\U0001f469", "\U0001f468\u200d\U0001f469"),
    "right to left": ("שלום \u202etfel", "שלום \u202etfel"),
    "lines": ("a\r\n  cat ", "a cat"),
}


@pytest.mark.parametrize("name", ODD)
@pytest.mark.parametrize("kind", ["default", "model", "clip"])
def test_any_caption_has_tokens_or_is_left_out(name, kind, request):
    caption, cleaned = ODD[name]
    assert clean(caption) == cleaned
    path = None if kind == "default" else str(request.getfixturevalue(kind))
    ids = open_tokenizer(path).encode(caption)
    assert ids.tolist() == open_tokenizer(path).encode(cleaned).tolist()
    assert (len(ids) == 0) == (cleaned == "")
    kept = open_tokenizer(path, empty="keep").encode(caption).tolist()
    marks = {"default": [1], "model": [1], "clip": [0, 1]}[kind]
    assert kept == (ids.tolist() if cleaned else marks)


@pytest.mark.parametrize("kind", ["default", "model", "clip"])
@pytest.mark.parametrize(
    "caption",
    ["o" * 100_000, "a cat " * 20_000, "\0" * 100_000 + "a cat " * 40, "é" * 100_000],
    ids=["one word", "words", "late", "not ascii"],
)
def test_a_caption_of_100_kb_is_cut_to_the_tokens_of_its_beginning(
    kind, caption, request
):
    path = None if kind == "default" else str(request.getfixturevalue(kind))
    ids = open_tokenizer(path).encode(caption)
    # What a model does not know at all is one piece, however long.
    assert len(ids) == (3 if kind == "model" and caption[0] == "é" else 24)
    beginning = open_tokenizer(path).encode(clean(caption)[:600])
    assert ids.tolist() == beginning.tolist()


def test_a_caption_is_found_behind_any_number_of_characters_without_width():
    tokenizer = open_tokenizer()
    expected = tokenizer.encode("cat").tolist()
    assert tokenizer.encode("\u200b" * 70_000 + "cat").tolist() == expected


def test_captions_that_were_no_utf8_are_replaced_or_skipped(tmp_path):
    path = tmp_path / "a.array_record"
    write_records(path, [example(jpg=[png(2, 3)], txt=[b"a \xff cat", b"a cat"])])
    source = sources.array_record(str(path), image="jpg", caption="txt")
    read, good = source[0].captions
    assert read == "a \ufffd cat"
    expected = open_tokenizer().encode(good).tolist()
    assert open_tokenizer().encode(read).tolist() == expected
    strict = open_tokenizer(broken="skip")
    assert strict.encode(read).tolist() == []
    assert strict.encode(good).tolist() == expected


def test_no_folder_is_part_of_an_embedded_caption():
    source = sources.clipart("validation", "none")
    folders, said = 0, 0
    for i in range(len(source)):
        *path, _ = source[i].key.split("/")
        for word in re.findall(r"\w{4,}", " ".join(path)):
            folders += 1
            said += word in source[i].captions[0]
    # Authors say "animal" of animals; were folders written in, all would be said.
    assert said < 0.5 * folders


# ---- the table of lengths

STORED = [
    [b"a cat", b"a house of number 7"],
    [],
    [b""],
    [b"\0", b"a cat of number 1"],
    [b"a house"] * 3,
    [b"x" * 100_000],
    [b"a cat"],
]


def write_source(folder, rows=STORED, name="a.array_record"):
    folder.mkdir(exist_ok=True)
    made = [example(jpg=[png(2, 3)], txt=row) if row else example(jpg=[png(2, 3)])
            for row in rows]  # fmt: skip
    write_records(folder / name, made)
    return open_source(folder)


def open_source(folder, caption="txt"):
    path = str(folder / "*.array_record")
    return sources.array_record(path, image="jpg", caption=caption)


def loop(source, tokenizer):
    """The table, one caption after the other."""
    rows = [[len(tokenizer.encode(c)) for c in source[i].captions]
            for i in range(len(source))]  # fmt: skip
    width = max(map(len, rows))
    return [row + [0] * (width - len(row)) for row in rows]


def test_the_table_is_that_of_a_loop_over_all_captions(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "CHUNK", 2)  # of different widths
    source, tokenizer = write_source(tmp_path / "set"), open_tokenizer()
    table = captions.caption_lengths(source, tokenizer)
    assert table.dtype == np.uint16
    assert table.tolist() == loop(source, tokenizer)
    assert table.shape == (7, 3)
    assert table[5, 0] == 24
    assert (table[[1, 2]] == 0).all()
    assert (table[3] > 0).tolist() == [False, True, False]


def test_the_table_of_the_embedded_set_is_shared_by_its_splits(monkeypatch, tmp_path):
    monkeypatch.setattr(tables, "_paths", lambda *_: [tmp_path / "embedded.npy"])
    tokenizer = open_tokenizer()
    whole = captions.caption_lengths(sources.clipart("all", "none"), tokenizer)
    part = sources.clipart("test")
    calls = count_calls(monkeypatch)
    found = captions.caption_lengths(part, tokenizer)
    assert sum(calls.values()) == tables.SAMPLE
    np.testing.assert_array_equal(found, whole[part.indices])
    assert found.tolist() == loop(part, tokenizer)
    section = {"name": "clipart", "split": "test"}
    shown = captions.caption_lengths(sources.padded(section), tokenizer)
    np.testing.assert_array_equal(shown, found)


def count_calls(monkeypatch):
    """How often each record is read from now on."""
    calls = {}
    read = Stored.__getitem__

    def counted(self, index):
        calls[index] = calls.get(index, 0) + 1
        return read(self, index)

    monkeypatch.setattr(Stored, "__getitem__", counted)
    return calls


def test_the_table_is_kept_for_each_tokenizer_beside_the_data(tmp_path, monkeypatch):
    folder = tmp_path / "set"
    write_source(folder)
    long, short = open_tokenizer(), open_tokenizer(length=3)
    first = captions.caption_lengths(open_source(folder), long)
    other = captions.caption_lengths(open_source(folder), short)
    assert other.max() == 3
    assert len(list(folder.glob("captions-*.npy"))) == 2
    assert not (tmp_path / "cache").exists()
    calls = count_calls(monkeypatch)
    again = captions.caption_lengths(open_source(folder), open_tokenizer())
    assert isinstance(again, np.memmap)
    assert sum(calls.values()) == tables.SAMPLE
    np.testing.assert_array_equal(again, first)


def test_a_stale_table_is_noticed_and_replaced(tmp_path, caplog):
    folder, tokenizer = tmp_path / "set", open_tokenizer()
    captions.caption_lengths(write_source(folder), tokenizer)
    changed = write_source(folder, [[b"a house of number 3"], *STORED[1:]])
    with caplog.at_level("WARNING", logger="absl"):
        table = captions.caption_lengths(changed, tokenizer)
    assert "no longer fits the data: scanning again" in caplog.text
    assert "2 pictures have no caption of use" in caplog.text
    assert table.tolist() == loop(changed, tokenizer)
    assert len(list(folder.glob("captions-*.npy"))) == 1


def test_a_change_of_a_record_that_no_sample_reads_is_noticed_too(tmp_path):
    tokenizer, rows = open_tokenizer(), [[b"a cat"]] * 300
    captions.caption_lengths(write_source(tmp_path, rows), tokenizer)
    read = np.random.default_rng(300).integers(300, size=tables.SAMPLE)
    changed = next(i for i in range(300) if i not in read)
    rows[changed] = [b"a house of number 7"]
    found = captions.caption_lengths(write_source(tmp_path, rows), tokenizer)
    assert found[changed] != found[read[0]]


def test_a_table_of_another_version_is_not_used(tmp_path, monkeypatch):
    source, tokenizer = write_source(tmp_path / "set"), open_tokenizer()
    for module, make in (
        (captions, lambda: captions.caption_lengths(source, tokenizer)),
        (sizes, lambda: sizes.size_table(source)),
    ):
        make()
        with monkeypatch.context() as patch:
            calls = count_calls(patch)
            make()
            assert sum(calls.values()) == tables.SAMPLE
            patch.setattr(module, "VERSION", module.VERSION + 1)
            calls.clear()
            make()
            assert calls == dict.fromkeys(range(len(source)), 1)


def test_captions_that_changed_behind_the_same_fingerprint_are_noticed(tmp_path):
    folder, tokenizer = tmp_path / "set", open_tokenizer()
    source = write_source(folder)
    first = captions.caption_lengths(source, tokenizer)
    other = write_source(tmp_path / "other", [row[:1] for row in STORED])
    same = dataclasses.replace(source, parts=other.parts)
    assert same.fingerprint() == source.fingerprint()
    table = captions.caption_lengths(same, tokenizer)
    assert table.tolist() == loop(same, tokenizer) != first.tolist()


def test_each_feature_of_captions_has_its_own_table(tmp_path):
    made = [example(jpg=[png(2, 3)], txt=[b"a cat"], alt=[b"a house of number 1"])]
    write_records(tmp_path / "a.array_record", made)
    tokenizer = open_tokenizer()
    for feature in ("txt", "alt", "txt"):
        source = open_source(tmp_path, feature)
        table = captions.caption_lengths(source, tokenizer)
        assert table.tolist() == loop(source, tokenizer)
    assert len(list(tmp_path.glob("captions-*.npy"))) == 2


def test_a_table_with_records_out_of_reach_is_used_but_not_kept(tmp_path, monkeypatch):
    source, tokenizer = write_source(tmp_path / "set"), open_tokenizer()
    read = Stored.__getitem__

    def fail(self, index):
        if index == 4:
            raise OSError("gone")
        return read(self, index)

    with monkeypatch.context() as patch:
        patch.setattr(Stored, "__getitem__", fail)
        table = captions.caption_lengths(source, tokenizer)
    assert not table[4].any()
    assert table[0].all() or table[0, :2].all()
    assert list((tmp_path / "set").glob("captions-*")) == []
    assert captions.caption_lengths(source, tokenizer)[4].all()


@pytest.mark.parametrize("caption", [None, "text"])
def test_a_source_without_captions_is_refused_with_the_remedy(tmp_path, caption):
    write_source(tmp_path / "set")
    source = open_source(tmp_path / "set", caption)
    with pytest.raises(ConfigError, match=r"no caption of use: name the feature"):
        captions.caption_lengths(source, open_tokenizer())


def test_a_record_with_too_many_captions_ends_the_scan_with_its_key(tmp_path):
    source = write_source(tmp_path / "set", [[b"a"], [b"a"] * (captions.MOST + 1)])
    with pytest.raises(DataError, match=r"a.array_record/1 has 1025 captions: 1024"):
        captions.caption_lengths(source, open_tokenizer())


# ---- the caption of an epoch

LENGTHS = np.array([[3, 0, 4, 5], [0, 0, 0, 0], [0, 7, 0, 0], [2, 2, 0, 0]])


def draw(seed, epoch, indices):
    u = draws.uniform(seed, epoch, indices, "caption")
    return captions.choose(u, LENGTHS[indices % 4])


def test_each_caption_of_use_is_drawn_equally_often_and_no_other():
    indices = np.arange(40_000)
    chosen = draw(7, 3, indices)
    for row, lengths in enumerate(LENGTHS):
        counts = np.bincount(chosen[row::4] + 1, minlength=5)
        of_use = np.flatnonzero(lengths)
        if not len(of_use):
            of_use = np.array([-1])
        assert counts[of_use + 1].sum() == 10_000
        # Seeds are fixed, so it either always holds or never does.
        if len(of_use) > 1:
            assert scipy.stats.chisquare(counts[of_use + 1]).pvalue > 0.01


def test_the_caption_drawn_is_a_function_of_seed_epoch_and_index():
    indices = np.arange(4000)
    chosen = draw(1, 5, indices)
    order = np.random.default_rng(0).permutation(4000)
    np.testing.assert_array_equal(draw(1, 5, order), chosen[order])
    alone = [draw(1, 5, indices[i : i + 1])[0] for i in range(64)]
    np.testing.assert_array_equal(alone, chosen[:64])
    several = indices % 4 == 0
    for seed, epoch in ((2, 5), (1, 6)):
        # Of three captions another draw gives the same one in a third of all cases.
        same = (draw(seed, epoch, indices) == chosen)[several].mean()
        assert 0.28 < same < 0.39


def test_an_image_of_a_table_without_captions_brings_none():
    chosen = captions.choose(np.array([0.0, 0.9]), np.zeros((2, 0), np.int64))
    assert chosen.tolist() == [-1, -1]


def test_over_many_epochs_an_image_brings_all_its_captions():
    epochs = np.arange(3000)
    u = draws.uniform(0, epochs, np.zeros(3000, np.int64), "caption")
    chosen = captions.choose(u, np.tile(LENGTHS[0], (3000, 1)))
    counts = np.bincount(chosen, minlength=4)
    assert counts[1] == 0
    assert scipy.stats.chisquare(counts[[0, 2, 3]]).pvalue > 0.01
