import csv
import dataclasses
import io
import math
import os
import re
import shutil
import subprocess

import commands
import jax
import jaxtyping
import numpy as np
import oracle
import orbax.checkpoint as ocp
import pytest
import tiny
from etils import epath
from PIL import Image

import navit_jax
from navit_jax import experiment, predict, sharding, train
from navit_jax.errors import ConfigError

SIZES = [(32, 64), (48, 48), (64, 32), (16, 80), (33, 70), (90, 20), (5, 5), (64, 64)]


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """A run with the checkpoints 1 and 2, each with parameters and their mean."""
    folder = tmp_path_factory.mktemp("run")
    config = tiny.config(steps=2, train__ema=0.5, train__save_every=1)
    assert train.train(config, folder) == 0
    return folder


@pytest.fixture(scope="module")
def predictor(workdir):
    return navit_jax.load(workdir)


@pytest.fixture
def as_users_call(monkeypatch):
    """Without the types that the tests check at every call."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


@pytest.fixture(scope="module")
def pictures():
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, (h, w, 3), np.uint8) for h, w in SIZES]


@pytest.mark.parametrize("picture", [0, 1, 2])
def test_a_picture_of_whole_patches_gives_what_the_plain_model_does(
    predictor, pictures, picture
):
    h, w = SIZES[picture]
    blocks = pictures[picture].reshape(h // 16, 16, w // 16, 16, 3).swapaxes(1, 2)
    patches = blocks.reshape(-1, 768) / 127.5 - 1
    coords = np.argwhere(np.ones((h // 16, w // 16)))
    params = jax.tree.map(lambda x: np.asarray(x, np.float64), predictor.params)
    tokens, pooled = oracle.forward(
        params["encoder"], patches, coords, (h // 16, w // 16),
        num_heads=2, positions={"name": "factorized", "length": 32},
    )  # fmt: skip
    logits = oracle.dense(params["head"]["dense"], pooled)
    side = math.sqrt(h * w)
    given = pictures[picture : picture + 1]
    found = predictor.tokens(given, side=side)[0]
    assert found.shape == (h // 16, w // 16, 32)
    np.testing.assert_allclose(found.reshape(-1, 32), tokens, atol=1e-5)
    np.testing.assert_allclose(predictor.embed(given, side=side)[0], pooled, atol=1e-5)
    expected = 1 / (1 + np.exp(-logits))
    np.testing.assert_allclose(
        predictor.predict(given, side=side)[0], expected, atol=1e-6
    )


@pytest.mark.filterwarnings("ignore:Sharding info not provided")
@pytest.mark.parametrize("step, folder", [(None, "2"), (2, "2"), (1, "1")])
def test_a_model_is_the_running_mean_of_the_step_that_is_asked_for(
    workdir, step, folder
):
    state = ocp.PyTreeCheckpointer().restore(workdir / "checkpoints" / folder / "state")
    found = navit_jax.load(workdir, step)
    assert found.step == int(folder)
    jax.tree.map(np.testing.assert_array_equal, found.params, state["ema"])
    other = state["params"]["head"]["dense"]["kernel"]
    assert (found.params["head"]["dense"]["kernel"] != other).any()


def change(predictor, **data):
    """The predictor of a run with another section `data`."""
    section = {**predictor.config["data"], **data}
    return dataclasses.replace(predictor, config={**predictor.config, "data": section})


@pytest.mark.parametrize(
    "data, grids",
    [
        ({}, [(2, 5), (4, 4)]),
        ({"upscale": False}, [(2, 4), (3, 3)]),  # of 32 x 64 and 48 x 48
        ({"square": True}, [(4, 4), (4, 4)]),
    ],
)
def test_pictures_are_seen_as_the_run_saw_its_own(predictor, pictures, data, grids):
    found = change(predictor, **data).tokens(pictures[:2])
    assert [tokens.shape[:2] for tokens in found] == grids


def test_pictures_are_decoded_as_those_of_the_run(predictor, pictures):
    with pytest.raises(ValueError, match=r"data\.codec='pilow'"):
        change(predictor, codec="pilow").predict(pictures[:1])


def test_neighbours_and_order_change_nothing_but_rounding(predictor, pictures):
    together = predictor.predict(pictures * 5)
    alone = np.concatenate([predictor.predict([picture]) for picture in pictures])
    np.testing.assert_allclose(together, np.tile(alone, (5, 1)), atol=1e-6)
    backwards = predictor.predict(pictures[::-1])
    np.testing.assert_allclose(backwards[::-1], alone, atol=1e-6)
    assert np.ptp(alone, axis=0).max() > 1e-4  # they do differ from each other


def test_in_bfloat16_neighbours_change_less_than_a_hundredth(predictor, pictures):
    # So large that some values are rounded otherwise, on a device that gets other
    # numbers of rows.
    changes = {"size": "Ti/8", "width": 192, "depth": 4, "num_heads": 3, "mlp": 768}
    model = predictor.config["model"] | changes | {"dtype": "bfloat16"}
    section = {**predictor.config["data"], "tokens": 256}
    config = {**predictor.config, "model": model, "data": section}
    task = experiment.build_task(config, len(predictor.class_names))
    example = experiment.build_stream(config).example()
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    with jax.set_mesh(mesh):
        params = jax.jit(task.init)(jax.random.key(0), example)
    head = np.random.default_rng(0).normal(0, 0.1, (192, 8)).astype(np.float32)
    params["head"]["dense"]["kernel"] = head
    rough = dataclasses.replace(
        predictor, config=config, task=task, params=params, mesh=mesh
    )
    for ask in (rough.embed, rough.predict):
        # 81 patches: neighbours move a picture against the blocks of attention.
        together = ask(pictures * 3, side=72)
        alone = np.concatenate([ask([picture], side=72) for picture in pictures])
        difference = np.abs(together - np.tile(alone, (3, 1))).max()
        assert 0 < difference < 1e-2 * np.abs(alone).max()
        assert np.ptp(alone, axis=0).max() > 3e-2 * np.abs(alone).max()


def test_paths_arrays_and_pillow_images_are_the_same_pictures(
    predictor, pictures, tmp_path
):
    files = []
    for number, picture in enumerate(pictures):
        files.append(tmp_path / f"{number}.png")
        Image.fromarray(picture).save(files[-1])
    expected = predictor.predict(pictures)
    with_alpha = [np.dstack([p, np.full(p.shape[:2], 255, np.uint8)]) for p in pictures]
    for given in (files, [str(f) for f in files], map(Image.open, files), with_alpha):
        np.testing.assert_array_equal(predictor.predict(list(given)), expected)
    grey = pictures[0][..., 0]
    np.testing.assert_array_equal(
        predictor.predict([grey]), predictor.predict([np.dstack([grey] * 3)])
    )
    np.testing.assert_array_equal(
        predictor.predict([grey[..., None]]), predictor.predict([grey])
    )


def test_a_pillow_image_is_turned_upright_and_made_rgb(predictor, pictures, tmp_path):
    turned = Image.fromarray(np.rot90(pictures[0]).copy())
    exif = turned.getexif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    turned.save(tmp_path / "turned.png", exif=exif)
    given = [Image.open(tmp_path / "turned.png"), tmp_path / "turned.png"]
    expected = predictor.predict(pictures[:1] * 2)
    np.testing.assert_array_equal(predictor.predict(given), expected)
    cmyk = Image.fromarray(pictures[0]).convert("CMYK")
    np.testing.assert_array_equal(
        predictor.predict([cmyk]), predictor.predict([cmyk.convert("RGB")])
    )


@pytest.mark.parametrize(
    "dial, grids",
    [
        ({"side": 32}, [(1, 2), (2, 2), (2, 1), (1, 4)]),
        ({"tokens": 9}, [(2, 4), (3, 3), (4, 2), (1, 9)]),
        ({"tokens": np.int64(9)}, [(2, 4), (3, 3), (4, 2), (1, 9)]),
        ({"side": np.int64(32)}, [(1, 2), (2, 2), (2, 1), (1, 4)]),
        ({"side": 500, "upscale": False}, [(2, 4), (3, 3), (4, 2), (1, 5)]),
        ({}, [(2, 5), (4, 4), (5, 2), (1, 8)]),  # the largest of training, 64
    ],
)
def test_the_dial_sets_the_grids(predictor, pictures, dial, grids, as_users_call):
    found = predictor.tokens(pictures[:4], **dial)
    assert [tokens.shape[:2] for tokens in found] == grids


def test_a_picture_longer_than_a_row_of_training_is_seen_whole(predictor, pictures):
    tokens = predictor.tokens(pictures[:2], side=200)
    assert [t.shape[:2] for t in tokens] == [(8, 17), (12, 12)]  # of rows of 32


@pytest.mark.parametrize("dial", [{"side": 400}, {"tokens": 900}])
def test_a_panorama_or_a_bad_picture_alone_is_no_error_of_the_run(
    predictor, dial, caplog
):
    panorama = np.zeros((16, 500, 3), np.uint8)
    rows, columns, _ = predictor.tokens([panorama], **dial)[0].shape
    assert columns == 32  # all that the positions reach
    assert rows == 1
    assert re.search(r"smaller than drawn, .*: pictures:\[0\]$", caplog.text.strip())
    caplog.clear()
    predictor.tokens([np.zeros((64, 64, 3), np.uint8)], **dial)
    assert not caplog.records
    with pytest.raises(ValueError, match=r"images\[0\] \(bytes\).*not_image"):
        predictor.predict([b"no picture"], **dial)


@pytest.mark.parametrize("mode", ["I", "F", "La", "PA", "RGBa", "HSV", "YCbCr", "1"])
def test_any_mode_of_pillow_is_seen_as_a_file_of_its_pixels_would_be(predictor, mode):
    levels = np.linspace(0, 255, 1024).reshape(32, 32)
    alpha = np.dstack([*[levels.astype(np.uint8)] * 3, 255 - levels.astype(np.uint8)])
    if mode in ("I", "F"):
        picture = Image.fromarray(
            levels / 255 if mode == "F" else levels.astype(np.int32)
        )
        expected = np.dstack([levels.round().astype(np.uint8)] * 3)
    elif mode in ("La", "PA", "RGBa"):
        plain = Image.fromarray(alpha).convert({"La": "LA"}.get(mode, "RGBA"))
        picture = (
            plain.convert(mode) if mode != "PA" else plain.convert("P").convert("PA")
        )
        white = Image.new("RGBA", plain.size, "white")
        seen = picture.convert("LA" if mode == "La" else "RGBA").convert("RGBA")
        expected = np.asarray(Image.alpha_composite(white, seen).convert("RGB"))
    else:
        picture = Image.fromarray(alpha[..., :3]).convert(mode)
        expected = np.asarray(picture.convert("RGB"))
    found = predictor.predict([picture, expected])
    np.testing.assert_allclose(found[0], found[1], atol=1e-4)


def test_who_asks_is_not_left_under_the_mesh_of_the_predictor(predictor, pictures):
    results = predictor.results("pooled", pictures, predictor.law())
    next(results)
    assert jax.sharding.get_abstract_mesh().empty


def test_a_predictor_is_shown_in_a_line(predictor):
    assert len(repr(predictor)) < 500


def test_no_pictures_give_no_numbers(predictor):
    assert predictor.predict([]).shape == (0, 8)
    assert predictor.embed([]).shape == (0, 32)
    assert predictor.tokens([]) == []


@pytest.mark.parametrize(
    "images, dial, message",
    [
        ([np.zeros((4, 4))], {}, r"images\[0\] is a ndarray of dtype float64"),
        ([np.zeros((4, 4, 2), np.uint8)], {}, r"shape \(4, 4, 2\)"),
        ([np.zeros((0, 4, 3), np.uint8)], {}, "it has no pixel"),
        (["nowhere.png"], {}, r"images\[0\] \(nowhere.png\).*unreadable"),
        ("one.png", {}, "images is one str: give a list"),
        (np.zeros((4, 4, 3), np.uint8), {}, "images is one ndarray: give a list"),
        (np.zeros((4, 4), np.uint8), {}, "images is one ndarray: give a list"),
        (b"GIF", {}, "images is one bytes: give a list"),
        (Image.new("L", (4, 4)), {}, "images is one Image: give a list"),
        (None, {}, "images is one NoneType: give a list"),
        ({"a.png"}, {}, "images is one set: give a list"),
        ({0: "a.png"}, {}, "images is one dict: give a list"),
        (iter(["a.png"]), {}, "images is one list_iterator: give a list of pictures "),
        (["a\0.png"], {}, r"images\[0\] \(a\0.png\) can not be used: unreadable"),
        ([], {"tokens": 4.5}, "tokens=4.5: give a whole number"),
        ([], {"tokens": True}, "tokens=True: give a whole number"),
        ([], {"side": True}, "side=True: give pixels, or 'native'"),
        ([], {"side": "64"}, "side='64': give pixels, or 'native'"),
        ([], {"side": [64]}, r"side=\[64\]: give pixels, or 'native'"),
        ([], {"upscale": "no"}, "upscale='no': give True, False or None"),
        ([], {"side": 9, "tokens": 9}, "give one of them"),
        ([], {"side": 528}, "side=528.*at most side=512 or tokens=1024"),
        ([], {"tokens": 1089}, "tokens=1089.*at most side=512 or tokens=1024"),
        ([], {"tokens": 0}, "tokens=0: needs at least 1"),
        ([], {"side": 0}, "side=0: needs a side > 0"),
    ],
)
def test_what_can_not_be_used_is_named(predictor, images, dial, message, as_users_call):
    with pytest.raises(ValueError, match=message):
        predictor.predict(images, **dial)


def test_one_path_is_no_list_of_the_paths_of_its_letters(predictor):
    with pytest.raises(ValueError, match="images is one str: give a list"):
        list(predictor.results("pooled", "abc", predictor.law()))


def test_a_pillow_image_that_can_not_be_loaded_has_the_reason_of_its_file(
    predictor, pictures
):
    file = io.BytesIO()
    Image.fromarray(pictures[0]).save(file, format="png")
    cut = file.getvalue()[:3000]
    closed = Image.fromarray(pictures[0])
    closed.close()
    given = [cut, Image.open(io.BytesIO(cut)), closed, pictures[0]]
    *bad, good = sorted(predictor.results("pooled", given, predictor.law()))
    assert [b.value.reason for b in bad] == ["truncated", "truncated", "undecodable"]
    np.testing.assert_allclose(good.value, predictor.embed(given[3:])[0], atol=1e-5)
    with pytest.raises(ValueError, match=r"images\[1\] \(Image\) can.*undecodable"):
        predictor.predict([pictures[0], closed])


def test_a_run_without_classes_says_what_it_gives(tmp_path):
    config = tiny.config(steps=1, task={"name": "masked_patches"}, **tiny.PLAIN)
    config["model"]["pooling"] = "none"
    assert train.train(config, tmp_path) == 0
    predictor = navit_jax.load(tmp_path)
    picture = np.zeros((32, 32, 3), np.uint8)
    with pytest.raises(ValueError, match=r"gives no 'probabilities'; .*pixels, tokens"):
        predictor.predict([picture])
    assert predictor.tokens([picture], side=32)[0].shape == (2, 2, 32)


def run_command(workdir, images, output, *flags):
    given = [f"--workdir={workdir}", f"--images={images}", f"--output={output}"]
    return commands.run("navit_jax.predict", *given, *flags)


def test_the_command_writes_a_line_a_picture_in_order(
    workdir, pictures, tmp_path, monkeypatch
):
    folder = tmp_path / "pictures"
    (folder / "deeper").mkdir(parents=True)
    names = ["a.png", "b.png", "deeper/c, of commas.png"]
    for name, picture in zip(names, pictures, strict=False):
        Image.fromarray(picture).save(folder / name)
    (folder / "bad.jpg").write_bytes(b"<html>")
    (folder / os.fsdecode(b"z\xff.png")).write_bytes((folder / "a.png").read_bytes())
    out = tmp_path / "out.csv"
    monkeypatch.setattr(predict, "CHUNK", 2)  # It reads fewer at once than there are.
    done = run_command(workdir, folder, out, "--side=48", "--top=2")
    assert done.returncode == 0, done.stderr
    assert "5 pictures" in done.stdout
    assert "1 could not be used" in done.stdout
    assert "5/5" in done.stderr
    with out.open() as file:
        lines = {line["file"]: line for line in csv.DictReader(file)}
    assert list(lines) == [
        "a.png",
        "b.png",
        "bad.jpg",
        "deeper/c, of commas.png",
        "z\\xff.png",
    ]
    assert lines["bad.jpg"]["error"] == "not_image"
    predictor = navit_jax.load(workdir)
    for name, expected in zip(
        names, predictor.predict(pictures[:3], side=48), strict=True
    ):
        assert lines[name]["class_1"] == predictor.class_names[expected.argmax()]
        assert float(lines[name]["probability_1"]) == pytest.approx(
            expected.max(), abs=2e-6
        )
    assert (lines["a.png"]["patch_rows"], lines["a.png"]["patch_columns"]) == ("2", "4")


def test_the_command_passes_on_what_it_is_asked_for(workdir, pictures, tmp_path):
    (tmp_path / "pictures").mkdir()
    Image.fromarray(pictures[6]).resize((40, 20)).save(tmp_path / "pictures/small.png")
    Image.fromarray(pictures[7]).save(tmp_path / "pictures/large.png")
    out, asked = tmp_path / "out.csv", ["--step=1", "--tokens=9", "--noupscale"]
    done = run_command(workdir, tmp_path / "pictures", out, *asked, "--top=8")
    assert done.returncode == 0, done.stderr
    large, found = csv.DictReader(out.read_text().splitlines())
    # Of 64 x 64 pixels, as large as in training, the budget leaves 3 x 3 patches.
    assert (large["patch_rows"], large["patch_columns"]) == ("3", "3")
    # 20 x 40 pixels as they are; enlarged to the budget it were 2 x 4 patches.
    assert (found["patch_rows"], found["patch_columns"]) == ("1", "2")
    predictor = navit_jax.load(workdir, 1)
    (expected,) = predictor.predict(
        [tmp_path / "pictures/small.png"], tokens=9, upscale=False
    )
    numbers = {found[f"class_{i}"]: found[f"probability_{i}"] for i in range(1, 9)}
    for name, value in zip(predictor.class_names, expected, strict=True):
        assert float(numbers[name]) == pytest.approx(value, abs=2e-6)


@pytest.mark.parametrize("output", ["/proc/out.csv", "/dev/full"])
def test_the_command_writes_before_it_loads_the_model(
    workdir, pictures, tmp_path, output
):
    for name in ("config.json", "classes.json"):  # and no checkpoint
        shutil.copy(workdir / name, tmp_path / name)
    Image.fromarray(pictures[0]).save(tmp_path / "one.png")
    done = run_command(tmp_path, tmp_path, output)
    assert done.returncode == 2
    assert f"--output={output} can not be written: " in done.stderr
    assert "Traceback" not in done.stderr


def test_the_command_keeps_an_earlier_table_until_it_has_something_to_write(
    workdir, pictures, tmp_path
):
    (tmp_path / "pictures").mkdir()
    Image.fromarray(pictures[0]).save(tmp_path / "pictures/one.png")
    out = tmp_path / "out.csv"
    out.write_text("of an earlier run\n" * 9)
    done = run_command(workdir, tmp_path / "pictures", out, "--step=7")
    assert done.returncode == 5, done.stderr
    assert out.read_text() == "of an earlier run\n" * 9
    done = run_command(workdir, tmp_path / "pictures", out)
    assert done.returncode == 0, done.stderr
    assert [line.split(",")[0] for line in out.read_text().splitlines()] == [
        "file",
        "one.png",
    ]


def test_an_earlier_table_that_can_not_be_written_is_found_at_once(tmp_path):
    # A program that runs, which nobody may write, the super-user included.
    program = epath.Path(shutil.copy(shutil.which("sleep"), tmp_path / "out.csv"))
    with subprocess.Popen([program, "60"]) as running:
        try:
            with (
                pytest.raises(
                    ConfigError, match=r"out\.csv can not be written: .*busy"
                ),
                predict.open_table(program, ["file"]),
            ):
                raise AssertionError("it was opened")
        finally:
            running.kill()


def test_a_disk_that_is_full_midway_is_named_and_keeps_the_lines_before(
    tmp_path, full_at
):
    path = epath.Path(tmp_path / "out.csv")
    lines = [[f"{i:02}.png", "x" * 30] for i in range(40)]

    def write(limit):
        with predict.open_table(path, ["file", "text"]) as add:
            add(lines[:10])
            # Here for who looks, before what comes.
            assert len(path.read_text().splitlines()) == 11
            full_at(limit)
            add(lines[10:])

    write(-1)
    whole = path.read_text()
    assert whole.splitlines() == ["file,text", *map(",".join, lines)]
    with pytest.raises(ConfigError, match=r"csv can not be written: .*File too large"):
        write(600)
    full_at(-1)
    assert path.read_text() == whole[: len(path.read_text())]
    assert len(path.read_text().splitlines()) > 10


@pytest.mark.parametrize(
    "output, message",
    [
        ("out.csv", "holds no picture"),
        ("", "--output=.*: give the name of a file"),
        ("none/out.csv", "--output=.*: give the name of a file"),
    ],
)
def test_the_command_names_a_wrong_folder_before_any_work(tmp_path, output, message):
    done = run_command(tmp_path, tmp_path, tmp_path / output)
    assert done.returncode == 2
    assert re.search(message, done.stderr)
