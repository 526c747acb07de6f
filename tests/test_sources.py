"""Sources give the records that were stored, and name what is wrong with them."""

import io
import json
import multiprocessing
import os
import pathlib
import pickle
import re
import shutil
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import tensorflow_datasets as tfds_lib
from array_record.python.array_record_module import ArrayRecordWriter
from PIL import Image
from tensorflow_datasets.core import constants

from navit_jax import config
from navit_jax.data import sizes, sources, stored, tables
from navit_jax.data.images import BadImage, read_size
from navit_jax.errors import ConfigError, DataError

SHAPES = [(5, 7), (9, 4), (3, 3), (20, 1), (6, 8)]  # (h, w)


def png(h, w):
    data = io.BytesIO()
    Image.new("RGB", (w, h), (h, w, 0)).save(data, "PNG")
    return data.getvalue()


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("NAVIT_JAX_CACHE", str(tmp_path / "cache"))


class Tiny(tfds_lib.core.GeneratorBasedBuilder):
    """Five pictures, with one label, several labels, a text and nested labels."""

    VERSION = tfds_lib.core.Version("1.0.0")

    def _info(self):
        features = tfds_lib.features
        label = features.ClassLabel(names=["cat", "dog", "owl"])
        return tfds_lib.core.DatasetInfo(
            builder=self,
            features=features.FeaturesDict(
                {
                    "image": features.Image(shape=(None, None, 3)),
                    "label": label,
                    "many": features.Sequence(features.ClassLabel(num_classes=9)),
                    "text": features.Text(),
                    "captions": features.Sequence({"text": features.Text()}),
                    "number": np.int64,
                    "objects": features.Sequence({"label": label}),
                }
            ),
        )

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        for i, shape in enumerate(SHAPES):
            yield (
                i,
                {
                    "image": png(*shape),
                    "label": i % 3,
                    "many": [8, i, 8][:i],
                    "text": f"picture {i} é",
                    "captions": [{"text": f"{j} of {i}"} for j in range(i)],
                    "number": i,
                    "objects": [{"label": 2}, {"label": 0}][: i % 3],
                },
            )


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tfds")
    tfds_lib.disable_progress_bar()
    Tiny(data_dir=folder, file_format="array_record").download_and_prepare()
    return folder


def read(source):
    return [source[i] for i in range(len(source))]


@pytest.mark.parametrize("label", ["label", "many", "objects/label", None])
def test_a_tfds_set_gives_what_tfds_itself_reads(prepared, label):
    source = sources.tfds("tiny", "train", str(prepared), label=label, caption="text")
    builder = tfds_lib.builder_from_directory(prepared / "tiny" / "1.0.0")
    skip = {"image": tfds_lib.decode.SkipDecoding()}
    for record, row in zip(
        read(source), builder.as_data_source("train", decoders=skip), strict=True
    ):
        objects = row["objects"]["label"]
        expected = {**row, "objects/label": objects, None: []}[label]
        assert record.image == row["image"]
        assert record.labels == tuple(sorted(set(np.ravel(expected).tolist())))
        assert record.captions == (row["text"].decode(),)


def test_a_record_has_all_captions_of_a_nested_feature(prepared):
    arguments = {"data_dir": str(prepared), "caption": "captions/text"}
    records = read(sources.tfds("tiny", "train", **arguments))
    expected = {f"picture {i} é": [f"{j} of {i}" for j in range(i)] for i in range(5)}
    names = read(sources.tfds("tiny", "train", str(prepared), key="text"))
    for record, name in zip(records, names, strict=True):
        assert list(record.captions) == expected[name.key]


def test_a_tfds_set_knows_its_classes_keys_and_slices(prepared):
    source = sources.tfds("tiny:1.0.0", "train[1:3]", str(prepared), key="text")
    assert source.class_names == ("cat", "dog", "owl")
    assert len(source.class_names) == 3
    whole = sources.tfds("tiny", "train", str(prepared), key="text")
    assert read(source) == read(whole)[1:3]
    assert sources.tfds("tiny", "train", str(prepared))[2].key == "tiny/train/2"
    assert sources.tfds("tiny", "train", str(prepared), label=None).class_names == ()


def test_a_tfds_set_is_looked_for_where_tfds_prepares_sets(prepared, monkeypatch):
    monkeypatch.setattr(constants, "DATA_DIR", str(prepared))
    assert len(sources.tfds("tiny", "train")) == 5
    monkeypatch.setenv("HOME", str(prepared.parent))
    assert len(sources.tfds("tiny", "train", f"~/{prepared.name}")) == 5


@pytest.mark.parametrize(
    "arguments, message",
    [
        (
            {"dataset": "huge"},
            "`tfds build huge --file_format=array_record --data_dir=",
        ),
        ({"split": "test"}, r"split='test'.*it has \['train'\]"),
        ({"split": "train[:0]"}, r"split='train\[:0\]' of .*tiny/1.0.0 is empty"),
        (
            {"image": "img"},
            r"image='img': tiny/train has only \['captions/text', 'image'",
        ),
        ({"label": "number"}, "label='number' .* is no ClassLabel"),
        ({"caption": "objects/text"}, "caption='objects/text'"),
        ({"caption": "captions"}, "caption='captions'"),
    ],
)
def test_a_wrong_tfds_argument_is_named_with_its_remedy(prepared, arguments, message):
    given = {"dataset": "tiny", "split": "train", "data_dir": str(prepared)} | arguments
    with pytest.raises(ConfigError, match=message):
        sources.tfds(**given)


def test_a_set_prepared_as_tfrecord_is_refused_with_the_commands(prepared, tmp_path):
    folder = tmp_path / "tiny" / "1.0.0"
    folder.mkdir(parents=True)
    for name in ["features.json", "dataset_info.json"]:
        text = (prepared / "tiny" / "1.0.0" / name).read_text()
        (folder / name).write_text(text.replace("array_record", "tfrecord"))
    with pytest.raises(ConfigError, match=r"as tfrecord.*`tfds build.*`tfds convert_f"):
        sources.tfds("tiny", "train", str(tmp_path))


def test_a_set_converted_from_tfrecord_is_read(prepared, tmp_path):
    shutil.copytree(prepared / "tiny", tmp_path / "tiny")
    path = tmp_path / "tiny" / "1.0.0" / "dataset_info.json"
    text = path.read_text()
    added = '"alternativeFileFormats": ["array_record"], "fileFormat": "tfrecord"'
    path.write_text(text.replace('"fileFormat": "array_record"', added))
    assert path.read_text() != text
    whole = sources.tfds("tiny", "train", str(prepared))
    assert read(sources.tfds("tiny", "train", str(tmp_path))) == read(whole)


def test_a_tfds_set_whose_files_are_gone_is_refused(prepared, tmp_path):
    folder = tmp_path / "tiny" / "1.0.0"
    folder.mkdir(parents=True)
    for name in ["features.json", "dataset_info.json", "label.labels.txt"]:
        (folder / name).write_text((prepared / "tiny" / "1.0.0" / name).read_text())
    with pytest.raises(ConfigError, match=r"lacks 1 files, first .*array_record-00000"):
        sources.tfds("tiny", "train", str(tmp_path), label=None)


def write_records(path, records):
    writer = ArrayRecordWriter(str(path), "group_size:1")
    for record in records:
        writer.write(record)
    writer.close()


def example(**features):
    from tensorflow_datasets.proto import tf_example_pb2

    message = tf_example_pb2.Example()
    for name, values in features.items():
        kind = "bytes_list" if isinstance(values[0], bytes) else "int64_list"
        getattr(message.features.feature[name], kind).value.extend(values)
    return message.SerializeToString()


def test_array_record_files_of_pictures_are_read_in_order(tmp_path):
    images = [png(*shape) for shape in SHAPES]
    write_records(tmp_path / "b.array_record", images[:2])
    write_records(tmp_path / "a.array_record", images[2:])
    source = sources.array_record(str(tmp_path / "*.array_record"))
    assert [r.image for r in read(source)] == images[2:] + images[:2]
    assert [r.labels for r in read(source)] == [()] * 5
    assert len({r.key for r in read(source)}) == 5
    chosen = sources.array_record([str(tmp_path / "b.array_record")])
    assert [r.image for r in read(chosen)] == images[:2]


def test_array_record_files_of_examples_give_labels_captions_and_keys(tmp_path):
    rows = [
        example(jpg=[png(2, 3)], cls=[2, 0, 2], txt=["über".encode()], id=[b"x"]),
        example(jpg=[png(2, 3)], cls=[1], txt=[b"bad \xff"], id=[b"y"]),
        example(jpg=[png(2, 3)], cls=[3], txt=[b""], id=[b"z"]),
        example(cls=[3], txt=[b""], id=[b"z"]),
        b"\xff\xff\xff",
    ]
    write_records(tmp_path / "a.array_record", rows)
    source = sources.array_record(
        str(tmp_path / "a.array_record"),
        image="jpg",
        label="cls",
        caption="txt",
        key="id",
        num_classes=3,
    )
    assert source[0] == sources.Record("x", png(2, 3), (0, 2), ("über",))
    assert source[1] == sources.Record("y", png(2, 3), (1,), ("bad \ufffd",))
    with pytest.raises(DataError, match=r"z has label 3, outside 0\.\.2"):
        source[2]
    with pytest.raises(DataError, match=r"a.array_record/3 has no feature 'jpg'"):
        source[3]
    with pytest.raises(DataError, match=r"a.array_record/4 is no tf.train.Example"):
        source[4]
    with pytest.raises(IndexError):
        source[5]


@pytest.mark.parametrize(
    "caption",
    [
        "",
        "nul \0 inside",
        "\U0001f600",
        "\u05e9\u05dc\u05d5\u05dd \u202etfel",
        "x" * 100_000,
    ],
    ids=["empty", "NUL", "emoji", "right to left", "100 kB"],
)
def test_a_caption_of_any_kind_comes_through_as_it_is(tmp_path, caption):
    rows = [example(jpg=[png(2, 3)], txt=[caption.encode()])]
    write_records(tmp_path / "a.array_record", rows)
    path = str(tmp_path / "a.array_record")
    source = sources.array_record(path, image="jpg", caption="txt")
    assert source[0].captions == (caption,)


def test_an_example_may_have_several_captions_or_none(tmp_path):
    path = tmp_path / "a.array_record"
    rows = [{"txt": [b"a", b"", b"\xff"]}, {}, {"txt": [b"b"]}, {"txt": [1]}]
    write_records(path, [example(jpg=[png(2, 3)], **row) for row in rows])
    source = sources.array_record(str(path), image="jpg", caption="txt")
    found = [source[i].captions for i in range(3)]
    assert found == [("a", "", "\ufffd"), (), ("b",)]
    with pytest.raises(DataError, match=r"a.array_record/3 has numbers in 'txt'"):
        source[3]


def test_a_mask_beside_a_picture_says_the_classes_of_its_pixels(tmp_path):
    path, file = tmp_path / "a.array_record", io.BytesIO()
    Image.fromarray(np.array([[0, 3], [150, 255]], np.uint8)).save(file, "PNG")
    write_records(path, [example(jpg=[png(2, 2)], seg=[file.getvalue()])])
    source = sources.array_record(str(path), "jpg", mask="seg", num_classes=150)
    assert len(source.class_names) == 150
    assert source[0].labels == ()
    assert source[0].objects.labels.tolist() == [2, 149, -1]
    assert source[0].objects.instances.tolist() == [[0, 1], [2, 3]]
    few = sources.array_record(str(path), "jpg", mask="seg", num_classes=149)
    with pytest.raises(DataError, match=r"/0, mask has label 149, outside 0..148"):
        few[0]
    with pytest.raises(ConfigError, match="mask='seg' and num_classes=0"):
        sources.array_record(str(path), "jpg", mask="seg")


def test_a_scan_of_sizes_decodes_no_mask(tmp_path, monkeypatch):
    path, file = tmp_path / "a.array_record", io.BytesIO()
    Image.new("L", (3, 5)).save(file, "PNG")
    write_records(path, [example(jpg=[png(5, 3)], seg=[file.getvalue()])])
    source = sources.array_record(str(path), "jpg", mask="seg", num_classes=2)
    decoded = []
    monkeypatch.setattr(stored, "read_mask", lambda *given: decoded.append(given))
    # The first call scans, the second reads samples.
    assert [sizes.size_table(source).tolist() for _ in range(2)] == [[[5, 3]]] * 2
    assert not decoded


def test_a_corrupt_record_is_an_os_error_that_names_it(tmp_path):
    path = tmp_path / "a.array_record"
    noise = np.random.default_rng(0).bytes(200_000)
    write_records(path, [noise, noise])
    source = sources.array_record(str(path))
    data = bytearray(path.read_bytes())
    data[100_000] ^= 255
    path.write_bytes(data)
    with pytest.raises(OSError, match=r"a.array_record/0 cannot be read"):
        source[0]
    assert source[1].image == noise


def test_wrong_array_record_arguments_are_named(tmp_path):
    write_records(tmp_path / "empty.array_record", [])
    (tmp_path / "text").write_text("no records")
    with pytest.raises(ConfigError, match=r"no file matches '/none/"):
        sources.array_record("/none/*.array_record")
    with pytest.raises(ConfigError, match=r"hold no record"):
        sources.array_record(str(tmp_path / "empty.array_record"))
    with pytest.raises(ConfigError, match=r"text is no array_record file"):
        sources.array_record(str(tmp_path / "text"))
    with pytest.raises(ConfigError, match=r"label='y' and num_classes=0: give both"):
        sources.array_record("x", image="jpg", label="y")
    with pytest.raises(ConfigError, match=r"need image"):
        sources.array_record("x", label="y", num_classes=2)


def make_folder(root, names):
    for i, name in enumerate(names):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(*SHAPES[i % 5]) if name[-1] != "t" else b"text")
    return root


def test_a_class_of_a_folder_is_a_sub_folder(tmp_path):
    names = ["owl/a.png", "cat/deep/er/b.PNG", "cat/c.jpeg", "cat/notes.txt", "x/l.txt"]
    source = sources.folder(str(make_folder(tmp_path / "set", names)))
    assert source.class_names == ("cat", "owl")
    found = {r.key: r.labels for r in read(source)}
    assert found == {"cat/c.jpeg": (0,), "cat/deep/er/b.PNG": (0,), "owl/a.png": (1,)}
    assert list(found) == sorted(found)
    assert source[2].image == png(*SHAPES[0])


def test_what_a_folder_ignores_is_counted_and_logged(tmp_path, caplog):
    names = ["a/1.png", "a/2.txt", "b/3.txt", "b/4", "b/5.png", ".DS_Sto.t"]
    root = make_folder(tmp_path / "set", names)
    (root / "a" / "loop").symlink_to(root, target_is_directory=True)
    with caplog.at_level("WARNING", logger="absl"):
        source = sources.folder(str(root))
    expected = {".txt": 2, "no extension": 1, ".t": 1, "linked folders": 1}
    assert source.ignored == expected
    assert "2 .txt" in caplog.text
    assert len(source) == 2


def test_a_flat_folder_has_no_labels(tmp_path):
    source = sources.folder(str(make_folder(tmp_path / "set", ["b.png", "a.png"])))
    assert [r.key for r in read(source)] == ["a.png", "b.png"]
    assert source.class_names == ()
    assert source[0].labels == ()


def test_a_folder_that_gives_no_clear_answer_is_refused(tmp_path):
    root = make_folder(tmp_path / "set", ["a/1.png", "stray.png"])
    with pytest.raises(ConfigError, match=r"1 pictures, such as 'stray.png'.*labels=F"):
        sources.folder(str(root))
    assert len(sources.folder(str(root), labels=False)) == 2
    with pytest.raises(ConfigError, match=r"path='/none' cannot be read"):
        sources.folder("/none")
    with pytest.raises(ConfigError, match=r"holds no picture.*1 other files"):
        sources.folder(str(make_folder(tmp_path / "texts", ["a/1.txt"])))


def test_a_folder_is_split_by_its_file_names_alone(tmp_path):
    names = [f"{'ab'[i % 2]}/{i}.png" for i in range(400)]
    root = make_folder(tmp_path / "set", names)
    train, validation = (
        sources.folder(str(root), split=split) for split in ("train", "validation")
    )
    whole = sources.folder(str(root))
    assert sorted(train.files + validation.files) == list(whole.files)
    assert 20 < len(validation) < 60
    assert train.class_names == validation.class_names == ("a", "b")
    assert {f[0] for f in validation.files} == {"a", "b"}
    # What is added or removed moves no other picture.
    make_folder(root, [f"b/new{i}.png" for i in range(40)])
    (root / "a" / "0.png").unlink()
    again = sources.folder(str(root), split="validation").files
    assert {f for f in again if "new" not in f} == {*validation.files} - {"a/0.png"}
    # Each part keeps a size table of its own.
    for part in (train, validation):
        sizes.size_table(sources.folder(str(root), split=part.name.split(":")[1]))
    assert len(list(root.glob("sizes-*.npy"))) == 2


@pytest.mark.parametrize("held_out", ["validation", "val"])
def test_a_folder_whose_sub_folders_are_splits_is_split_by_them(tmp_path, held_out):
    names = ["train/a/1.png", "train/b/2.png", f"{held_out}/a/3.png", "test/b/4.png"]
    root = str(make_folder(tmp_path / "set", names))
    assert sources.folder(root, split="train").files == ("a/1.png", "b/2.png")
    assert sources.folder(root, split="train").class_names == ("a", "b")
    assert sources.folder(root, split="validation").files == ("a/3.png",)
    assert sources.folder(root, split="test").files == ("b/4.png",)
    assert len(sources.folder(os.path.join(root, "train"), split="train")) == 2


@pytest.mark.parametrize(
    "folders, split, message",
    [
        (("train", "test"), "train", "sub-folders test, train, which are splits"),
        (("train", "test"), "validation", "which are splits, not classes"),
        (("train", "valid"), "all", "which are splits, not classes"),
    ],
)
def test_splits_are_never_taken_for_classes(tmp_path, folders, split, message):
    for name in folders:
        (tmp_path / name / "ant").mkdir(parents=True)
        (tmp_path / name / "ant" / "1.png").write_bytes(b"")
    with pytest.raises(ConfigError, match=message):
        sources.folder(str(tmp_path), split=split)
    # Without labels they are folders like others.
    assert len(sources.folder(str(tmp_path), labels=False)) == 2


def test_a_split_of_a_folder_that_can_not_be_is_refused(tmp_path):
    root = str(make_folder(tmp_path / "set", ["a/1.png", "b/2.png"]))
    for split in ("val", "test"):
        with pytest.raises(ConfigError, match=f"split='{split}' of .*known are all"):
            sources.folder(root, split=split)
    with pytest.raises(ConfigError, match=r"split='validation' of .*too few"):
        sources.folder(root, split="validation")


def test_a_file_name_that_is_no_utf8_gives_a_key_that_json_can_hold(tmp_path):
    root = make_folder(tmp_path / "set", ["a/1.png"])
    os.rename(root / "a" / "1.png", os.fsencode(root / "a") + b"/\xff.png")
    record = sources.folder(str(root))[0]
    assert json.dumps(record.key).encode() == rb'"a/\\xff.png"'
    assert record.image == png(*SHAPES[0])


@pytest.fixture(params=["tfds", "folder", "array_record", "clipart"])
def any_source(request, prepared, tmp_path):
    if request.param == "tfds":
        return sources.tfds("tiny", "train", str(prepared))
    if request.param == "folder":
        names = [f"{i % 2}/{i}.png" for i in range(5)]
        return sources.folder(str(make_folder(tmp_path / "pictures", names)))
    if request.param == "clipart":
        return sources.clipart("validation")
    write_records(tmp_path / "a.array_record", [png(*s) for s in SHAPES])
    return sources.array_record(str(tmp_path / "a.array_record"))


def test_a_source_is_small_when_pickled_and_reads_the_same(any_source):
    before = read(any_source)
    data = pickle.dumps(any_source)
    assert len(data) < 20_000
    assert read(pickle.loads(data)) == before


def test_a_source_can_be_read_from_several_threads(any_source):
    expected = read(any_source)
    fresh = pickle.loads(pickle.dumps(any_source))
    places = np.random.default_rng(0).integers(len(expected), size=200).tolist()
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(fresh.__getitem__, places))
    assert found == [expected[i] for i in places]


def test_a_source_can_be_read_in_a_spawned_process():
    source = sources.clipart("test")
    expected = [source[0], source[5]]  # opened here first
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.map(source.__getitem__, [0, 5]) == expected


def test_every_registered_source_is_built_by_its_name(tmp_path):
    section = {"name": "clipart", "split": "train", "labels": "classes34"}
    source = config.build(section, sources.SOURCES, "data.sources.a")
    assert len(source.class_names) == 34
    with pytest.raises(ConfigError, match=r"config.data.sources.a.splt is unknown"):
        config.build(section | {"splt": 1}, sources.SOURCES, "data.sources.a")


def test_the_size_table_is_that_of_each_header(any_source):
    expected = [Image.open(io.BytesIO(r.image)).size[::-1] for r in read(any_source)]
    table = sizes.size_table(any_source)
    assert table.dtype == np.uint16
    assert list(map(tuple, table.tolist())) == expected


def test_the_size_table_is_kept_beside_the_data_and_mapped(tmp_path):
    root = make_folder(tmp_path / "set", [f"{i}.png" for i in range(40)])
    first = sizes.size_table(sources.folder(str(root)))
    (kept,) = root.glob("sizes-*.npy")
    calls = []
    again = sizes.size_table(
        sources.folder(str(root)), read_size=lambda d: calls.append(d) or read_size(d)
    )
    assert isinstance(again, np.memmap)
    assert len(calls) == tables.SAMPLE
    np.testing.assert_array_equal(first, again)
    assert kept.exists()
    assert not (tmp_path / "cache").exists()


def replace_picture(root):
    (root / "1.png").write_bytes(png(50, 60))
    return 1


def add_picture(root):
    (root / "000.png").write_bytes(png(50, 60))
    return 0


def keep_name_size_and_time(root):
    old = (root / "1.png").stat()
    data = png(*SHAPES[1])
    for h in range(1, 200):  # another picture of as many bytes
        if len(png(h, 7)) == len(data) and (h, 7) != SHAPES[1]:
            (root / "1.png").write_bytes(png(h, 7))
            os.utime(root / "1.png", ns=(old.st_atime_ns, old.st_mtime_ns))
            return 1
    raise AssertionError("no such picture")


@pytest.mark.parametrize(
    "change", [replace_picture, add_picture, keep_name_size_and_time]
)
def test_a_stale_size_table_is_noticed_and_replaced(tmp_path, caplog, change):
    root = make_folder(tmp_path / "set", [f"{i}.png" for i in range(3)])
    sizes.size_table(sources.folder(str(root)))
    changed = change(root)
    with caplog.at_level("WARNING", logger="absl"):
        table = sizes.size_table(sources.folder(str(root)))
    assert "no longer fits the data: scanning again" in caplog.text
    image = sources.folder(str(root))[changed].image
    assert tuple(table[changed]) == Image.open(io.BytesIO(image)).size[::-1]
    assert len(list(root.glob("sizes-*.npy"))) == 1


def test_a_torn_size_table_is_replaced(tmp_path):
    root = make_folder(tmp_path / "set", ["1.png", "2.png"])
    first = np.array(sizes.size_table(sources.folder(str(root))))
    (kept,) = root.glob("sizes-*.npy")
    kept.write_bytes(kept.read_bytes()[:-3])
    np.testing.assert_array_equal(sizes.size_table(sources.folder(str(root))), first)


def test_a_folder_that_cannot_be_written_keeps_its_table_in_the_cache(
    tmp_path, monkeypatch
):
    root = make_folder(tmp_path / "set", ["1.png", "2.png"])
    save = tables._save

    def refuse(path, table, stem):
        if path.is_relative_to(root):
            raise PermissionError(path)
        save(path, table, stem)

    monkeypatch.setattr(tables, "_save", refuse)
    first = sizes.size_table(sources.folder(str(root)))
    assert list(root.glob("sizes-*")) == []
    assert len(list((tmp_path / "cache").rglob("sizes-*.npy"))) == 1
    calls = []
    again = sizes.size_table(
        sources.folder(str(root)), read_size=lambda d: calls.append(d) or read_size(d)
    )
    np.testing.assert_array_equal(first, again)
    assert len(calls) == tables.SAMPLE  # the sample, no scan


def test_a_picture_without_a_usable_header_has_size_zero(tmp_path, caplog):
    root = make_folder(tmp_path / "set", ["1.png", "2.png", "3.png", "4.png"])
    (root / "1.png").write_bytes(b"<html>")
    (root / "2.png").write_bytes(b"")
    source = sources.folder(str(root))
    (root / "4.png").unlink()

    def read_wide(data):
        return (3, 70_000) if data == png(*SHAPES[2]) else read_size(data)

    with caplog.at_level("WARNING", logger="absl"):
        table, unreadable = sizes.scan(source, 2, read_wide)
    assert unreadable == 1  # the picture that is gone
    assert table.tolist() == [[0, 0]] * 4
    assert "4 pictures have no usable size" in caplog.text
    with pytest.raises(BadImage):
        read_size(b"<html>")


def test_a_table_with_pictures_that_could_not_be_read_is_used_but_not_kept(tmp_path):
    root = make_folder(tmp_path / "set", ["a/1.png", "a/2.png"])
    (root / "a" / "0.png").symlink_to("/nowhere.png")
    source = sources.folder(str(root))
    table = sizes.size_table(source)
    np.testing.assert_array_equal(table[0], 0)
    assert (table[1:] > 0).all()
    # What was out of reach for a moment is there again the next time.
    (root / "a" / "0.png").unlink()
    (root / "a" / "0.png").write_bytes(png(*SHAPES[0]))
    assert (sizes.size_table(sources.folder(str(root))) > 0).all()


def test_a_label_out_of_range_ends_the_scan_with_its_key(tmp_path):
    rows = [example(image=[png(2, 3)], label=[i]) for i in range(5)]
    write_records(tmp_path / "a.array_record", rows)
    source = sources.array_record(
        str(tmp_path / "a.array_record"), image="image", label="label", num_classes=4
    )
    with pytest.raises(DataError, match=r"a.array_record/4 has label 4") as error:
        sizes.size_table(source)
    assert error.value.exit_code == 3


def test_a_selection_takes_its_rows_of_the_table_of_the_whole():
    whole = sizes.size_table(sources.clipart("all", labels="none"))
    part = sources.clipart("fold2:test", labels="classes34")
    np.testing.assert_array_equal(sizes.size_table(part), whole[part.indices])


def test_the_source_of_the_documentation_works(tmp_path):
    text = (pathlib.Path(__file__).parent.parent / "docs" / "data.md").read_text()
    code = re.findall(r"```python\n(.*?)```", text, re.DOTALL)[-1]
    scope = {"__name__": __name__}
    exec(code, scope)
    make_folder(tmp_path, ["1.png", "2.png"])
    (tmp_path / "list.txt").write_text("")
    files = (str(tmp_path / "2.png"), str(tmp_path / "1.png"))
    source = scope["Listed"](str(tmp_path / "list.txt"), files)
    assert isinstance(source, sources.Source)
    assert sizes.size_table(source).tolist() == [list(SHAPES[1]), list(SHAPES[0])]
    assert isinstance(sizes.size_table(source), np.memmap)
