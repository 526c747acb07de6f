"""The extra `fast` against Pillow, which says what a picture is."""

import dataclasses
import io

import numpy as np
import pytest
import tiny
from PIL import Image
from test_images import (
    COLOURS,
    FUZZED,
    HARMLESS,
    JPEG,
    PHOTO,
    STORED,
    cmyk_jpeg,
    exif,
    npy,
    photo,
    resize_exactly,
    save,
)

from navit_jax import data, experiment, run_folder
from navit_jax.data import codec, images
from navit_jax.data.images import BadImage
from navit_jax.errors import ConfigError

SIZES = [(375, 500), (401, 481), (97, 61), (64, 300), (600, 450)]
UPRIGHT = [photo(*size) for size in SIZES]
TARGETS = [(160, 208), (48, 80), (16, 16), (320, 112), (240, 320)]
BOXES = [images.WHOLE, (0.25, 0.1, 0.75, 0.4), (0.013, 0.5, 0.777, 1.0)]


def outcome(data, name, size=None, target=(16, 32), **options):
    """Pixels and notes, or why there are none."""
    try:
        size = size or images.read_size(data)
        return images.read(data, size, target, codec=name, **options)
    except BadImage as error:
        return error.reason


def differ(data, *arguments, **options):
    """Mean difference in levels of 255 between the two."""
    mine, notes = outcome(data, "fast", *arguments, **options)
    pillows, pillows_notes = outcome(data, "pillow", *arguments, **options)
    assert notes == pillows_notes
    assert mine.shape == pillows.shape
    return np.abs(mine.astype(int) - pillows).mean()


@pytest.mark.parametrize("turn", STORED)
def test_pictures_differ_from_pillows_by_less_than_a_level_on_average(turn):
    differences = []
    for number, upright in enumerate(UPRIGHT):
        stored = np.ascontiguousarray(STORED[turn](upright))
        options = {"progressive": bool(number % 2), "subsampling": number % 3}
        file = save(stored, "JPEG", quality=90, exif=exif(turn), **options)
        for target in [*TARGETS, upright.shape[:2]]:
            for flip, box in enumerate(BOXES):
                options = {"box": box, "flip": flip == 1}
                differences.append(differ(file, upright.shape[:2], target, **options))
    # As decoded at another scale, and by a filter that agrees at whole scales only. By
    # another turn or a shift of one pixel of the result they would differ by over 10.
    assert np.mean(differences) < 0.8
    assert max(differences) < 2.5


@pytest.mark.parametrize("turn", STORED)
@pytest.mark.parametrize("subsampling", [0, 1, 2])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_at_its_own_size_a_picture_is_decoded_alike_to_the_bit(turn, subsampling, mode):
    stored = np.ascontiguousarray(STORED[turn](UPRIGHT[2]))
    options = {} if mode == "L" else {"subsampling": subsampling}
    options |= {"progressive": turn > 4, "exif": exif(turn)}
    file = save(Image.fromarray(stored).convert(mode), "JPEG", **options)
    assert differ(file, (97, 61), (97, 61)) == 0


@pytest.mark.parametrize("turn", [1, 6])
@pytest.mark.parametrize("target", [(160, 16), (16, 150), (16, 16), (112, 96)], ids=str)
@pytest.mark.parametrize("box", [images.WHOLE, (0.25, 0.1, 0.75, 0.4)], ids=str)
def test_a_jpeg_is_decoded_near_the_target_but_never_below_it(
    turn, target, box, monkeypatch
):
    scales = []
    decode = codec.decode

    def spy(*arguments):
        found = decode(*arguments)
        scales.append(found[1])
        return found

    monkeypatch.setattr(codec, "decode", spy)
    stored = np.ascontiguousarray(STORED[turn](UPRIGHT[4]))
    file = save(stored, "JPEG", exif=exif(turn))
    images.read(file, (600, 450), target, box=box, codec="fast")
    cut = (box[2] - box[0]) * 600, (box[3] - box[1]) * 450
    left = min(cut[0] / target[0], cut[1] / target[1])
    enough = [n for n in (2, 4, 8) if left / n >= 1.5]
    assert scales == [max(enough, default=1)]


@pytest.mark.parametrize("scale", [1, 2, 3, 4, 5])
def test_at_whole_scales_the_filter_is_the_antialiased_bilinear_of_the_paper(scale):
    noise = np.random.default_rng(0).integers(0, 256, (60, 120, 3), np.uint8)
    target = 60 // scale, 120 // scale
    pixels = images.read(npy(noise), (60, 120), target, codec="fast")[0]
    expected = resize_exactly(noise, target)
    # At the edges one repeats the last pixels, the other weighs those there are.
    inside = slice(1, -1), slice(1, -1)
    # Rounded to 8 bits after each of three steps.
    np.testing.assert_allclose(pixels[inside], expected[inside], atol=1.51)


def test_at_the_edges_of_a_box_the_filter_sees_the_pixels_beyond():
    noise = np.random.default_rng(0).integers(0, 256, (120, 160, 3), np.uint8)
    box = (0.25, 0.25, 0.75, 0.75)
    pixels = images.read(npy(noise), (120, 160), (20, 40), box=box, codec="fast")[0]
    # Scale 3 down, 2 across.
    expected = resize_exactly(noise, (40, 80))[10:30, 20:60]
    np.testing.assert_allclose(pixels, expected, atol=1.51)


def test_an_enlarged_array_is_interpolated():
    image = photo(20, 30)
    pixels = images.read(npy(image), (20, 30), (48, 80), codec="fast")[0]
    expected = resize_exactly(image, (48, 80))
    # Places are told to 1/32 of a pixel, so of its slope.
    np.testing.assert_allclose(pixels, expected, atol=3)
    assert np.abs(pixels - expected).mean() < 0.5


def damage(name, count):
    """Files in which a few bytes are wrong, or which are cut."""
    rng = np.random.default_rng(0)
    for trial in range(count):
        data = bytearray(FUZZED[name])
        for _ in range(1 + trial % 3):
            data[int(rng.integers(len(data)))] = int(rng.integers(256))
        yield bytes(data[: int(rng.integers(len(data)))] if trial % 9 == 0 else data)


@pytest.mark.parametrize("name", ["jpeg", "progressive", "cmyk"])
def test_damaged_files_are_refused_or_read_as_by_pillow(name):
    refused = 0
    for file in damage(name, 300):
        mine, pillows = outcome(file, "fast"), outcome(file, "pillow")
        if isinstance(pillows, str):
            refused += 1
            assert mine == pillows
        else:
            assert mine[1] == pillows[1]
            # Damage looks like noise, whose every pixel counts.
            assert np.abs(mine[0].astype(int) - pillows[0]).mean() < 8
    assert 0 < refused < 300


def with_byte(data, place, value):
    return data[:place] + bytes([value]) + data[place + 1 :]


FRAME = JPEG.index(b"\xff\xc0")
ODD = {
    **{f"{how}_cmyk": cmyk_jpeg(list(COLOURS)[-1], how) for how in ("adobe", "plain")},
    "ycck": cmyk_jpeg(list(COLOURS)[-1], "ycck"),
    "rgb": save(PHOTO, "JPEG", keep_rgb=True),
    "bytes_in_between": JPEG[:-2] + b"\0" * 9 + JPEG[-2:],
    "no_end": JPEG[:-2],
    "cut": JPEG[: len(JPEG) // 2],
    "12_bits": with_byte(JPEG, FRAME + 4, 12),
    "lossless": with_byte(JPEG, FRAME + 1, 0xC3),
    "arithmetic": with_byte(JPEG, FRAME + 1, 0xC9),
    "two_channels": with_byte(JPEG, FRAME + 9, 2),
    "no_quantisation": JPEG.replace(b"\xff\xdb", b"\xff\xe9"),
}


@pytest.mark.parametrize("data", ODD.values(), ids=ODD)
def test_what_is_odd_is_left_to_pillow(data):
    mine, pillows = outcome(data, "fast"), outcome(data, "pillow")
    if isinstance(pillows, str):
        assert mine == pillows
    else:
        np.testing.assert_array_equal(mine[0], pillows[0])


def test_harmless_oddities_are_not_left_to_pillow(monkeypatch):
    monkeypatch.setattr(images, "_open", None)
    for name in ("icc_jpeg", "comment", "xmp", "fill_byte"):
        pixels, notes = images.read(HARMLESS[name], (37, 61), (16, 32), codec="fast")
        assert pixels.shape == (16, 32, 3)
        assert notes == ()


def test_an_array_of_the_right_size_is_neither_decoded_nor_resized(monkeypatch):
    monkeypatch.setattr(images, "_open", None)
    monkeypatch.setattr(codec, "resize", None)
    for name in ("pillow", "auto"):
        pixels, notes = images.read(npy(PHOTO), (37, 61), (37, 61), codec=name)
        np.testing.assert_array_equal(pixels, PHOTO)
        mirrored, _ = images.read(npy(PHOTO), (37, 61), (37, 61), flip=True, codec=name)
        np.testing.assert_array_equal(mirrored, PHOTO[:, ::-1])
        assert notes == ()


def test_an_array_is_what_numpy_loads_without_what_follows_it():
    file = io.BytesIO(npy(PHOTO) + b"more")
    np.testing.assert_array_equal(
        images.read(file.getvalue(), (37, 61), (37, 61))[0], np.load(file)
    )


@pytest.mark.parametrize("name", ["pillow", "fast"])
def test_an_array_that_must_be_resized_is_treated_as_a_png(name):
    picture, options = UPRIGHT[0], {"box": (0.1, 0.2, 0.7, 0.9), "flip": True}
    array = images.read(npy(picture), (375, 500), (96, 160), codec=name, **options)[0]
    png = images.read(save(picture, "PNG"), (375, 500), (96, 160), **options)[0]
    difference = np.abs(array.astype(int) - png).mean()
    assert difference < 1.5 if name == "fast" else difference == 0


def test_far_smaller_pictures_are_left_to_pillow():
    data = npy(photo(700, 900))
    assert differ(data, (700, 900), (80, 96)) == 0


def test_what_is_not_installed_is_not_used(monkeypatch):
    monkeypatch.setattr(codec, "FAST", False)
    assert not codec.choose("auto")
    with pytest.raises(ConfigError, match=r"needs simplejpeg and OpenCV.*\[fast\]"):
        codec.choose("fast")
    monkeypatch.setattr(codec, "simplejpeg", None)
    assert isinstance(images.read(JPEG, (37, 61), (16, 16))[0], np.ndarray)


def test_a_config_names_the_codec_and_a_run_tells_the_versions():
    stream = experiment.build_stream(tiny.config(data__codec="pillow"))
    assert stream.loader.codec == "pillow"
    with pytest.raises(ConfigError, match=r"data.codec='pilow'.*did you mean 'pillow'"):
        experiment.build_stream(tiny.config(data__codec="pilow"))
    config = tiny.config(data__codec="pillow")
    section = {"sources": config["data"]["sources"], "sides": (48,)}
    evaluations = experiment.build_eval_streams(config, section, "validation")
    assert {stream.loader.codec for _, stream in evaluations} == {"pillow"}
    versions = run_folder.environment()["versions"]
    assert {"pillow", "simplejpeg", "opencv"} <= versions.keys()


def test_the_loader_reads_by_its_codec(monkeypatch):
    seen = set()
    read = images.read

    def spy(*arguments, codec, **options):
        seen.add(codec)
        return read(*arguments, codec=codec, **options)

    monkeypatch.setattr(images, "read", spy)
    stream = experiment.build_stream(tiny.config())
    loader = dataclasses.replace(stream.loader, codec="pillow")
    data.LoadBatch(data.Batches(stream.plan), loader, np.arange(2))[0]
    assert seen == {"pillow"}
