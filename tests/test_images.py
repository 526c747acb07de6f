"""Every kind of picture: made here with Pillow, or forged byte by byte."""

import io
import pickle
import resource
import struct
import threading
import tracemalloc
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import psutil
import pytest
from PIL import Image, ImageFile, ImageOps, PngImagePlugin

from navit_jax.data import codec, containers, images, modes
from navit_jax.data.images import BadImage

ORIENTATION = 274


@pytest.fixture(params=["pillow", "fast"])
def codecs(request, monkeypatch):
    monkeypatch.setattr(codec, "choose", lambda _: request.param == "fast")


# Where a JPEG or an array may be read by another codec than Pillow.
BOTH = pytest.mark.usefixtures("codecs")


def photo(h, w, seed=0):
    """A picture with the spectrum of a photograph: as much contrast at every scale."""
    rng = np.random.default_rng(seed)
    frequency = np.hypot(np.fft.fftfreq(h)[:, None], np.fft.fftfreq(w))
    frequency[0, 0] = np.inf
    grey, colour = rng.normal(size=(h, w, 1)), rng.normal(size=(h, w, 3))
    spectrum = np.fft.fft2(grey + colour / 2, axes=(0, 1)) / frequency[..., None]
    pixels = np.fft.ifft2(spectrum, axes=(0, 1)).real
    return (128 + 50 * pixels / pixels.std()).clip(0, 255).astype(np.uint8)


def save(image, kind, **options):
    if isinstance(image, np.ndarray):
        image = Image.fromarray(image)
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def npy(array, version=None):
    file = io.BytesIO()
    np.lib.format.write_array(file, array, version)
    return file.getvalue()


def longer_header(data, text):
    """An array file with text behind what its header should be."""
    stop = 10 + int.from_bytes(data[8:10], "little")
    length = (stop - 10 + len(text)).to_bytes(2, "little")
    return data[:8] + length + data[10:stop] + text + data[stop:]


def read_whole(data):
    """At its own size, so without resizing."""
    size = images.read_size(data)
    return images.read(data, size, size)


def chunk(kind, body, crc=None):
    crc = zlib.crc32(kind + body) if crc is None else crc
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", crc)


def png(h, w, depth, colour, rows, *before):
    header = struct.pack(">IIBBBBB", w, h, depth, colour, 0, 0, 0)
    parts = [chunk(b"IHDR", header), *before, chunk(b"IDAT", zlib.compress(rows))]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts) + chunk(b"IEND", b"")


def tiff(fields, pixels=b"", order="<", after=0):
    """A TIFF of one strip; fields are (tag, type, values) of 1 to 4 bytes each."""
    codes = {1: "B", 3: "H", 4: "I"}
    entries, extra = b"", b""
    fields = [*fields, (273, 4, [8])] if pixels else fields
    start = 8 + len(pixels) + len(pixels) % 2
    for tag, kind, values in sorted(fields):
        value = struct.pack(order + codes[kind] * len(values), *values)
        if len(value) > 4:
            place = start + 2 + 12 * len(fields) + 4 + len(extra)
            extra, value = extra + value, struct.pack(order + "I", place)
        entries += struct.pack(order + "HHI", tag, kind, len(values))
        entries += value.ljust(4, b"\0")
    head = (b"II" if order == "<" else b"MM") + struct.pack(order + "HI", 42, start)
    body = pixels + b"\0" * (len(pixels) % 2)
    count = struct.pack(order + "H", len(fields))
    return head + body + count + entries + struct.pack(order + "I", after) + extra


def grey_tiff(h, w, bits, pixels, *more, **options):
    sizes = [(256, 4, [w]), (257, 4, [h]), (258, 3, [bits]), (259, 3, [1])]
    rest = [(262, 3, [1]), (277, 3, [1]), (278, 4, [h]), (279, 4, [len(pixels)])]
    return tiff([*sizes, *rest, *more], pixels, **options)


def exif(orientation, order="<"):
    return b"Exif\0\0" + tiff([(ORIENTATION, 3, [orientation])], order=order)


def jpeg_segment(marker, body):
    return struct.pack(">BBH", 0xFF, marker, len(body) + 2) + body


def with_segment(jpeg, marker, body):
    return jpeg[:2] + jpeg_segment(marker, body) + jpeg[2:]


PHOTO = photo(37, 61)
OTHER = photo(37, 61, seed=1)
JPEG = save(PHOTO, "JPEG", quality=95, subsampling=0)


# --- what comes back is the picture -------------------------------------------------

LOSSLESS = {
    "png": save(PHOTO, "PNG"),
    "bmp": save(PHOTO, "BMP"),
    "webp": save(PHOTO, "WEBP", lossless=True),
    "tiff": save(PHOTO, "TIFF"),
    "tiff_lzw": save(PHOTO, "TIFF", compression="tiff_lzw"),
    "tiff_deflate": save(PHOTO, "TIFF", compression="tiff_adobe_deflate"),
    "bigtiff": save(PHOTO, "TIFF", big_tiff=True),
    "npy": npy(PHOTO),
    "npy_2": npy(PHOTO, version=(2, 0)),
}


@BOTH
@pytest.mark.parametrize("data", LOSSLESS.values(), ids=LOSSLESS)
def test_lossless_files_come_back_to_the_bit_with_upright_size(data):
    assert images.read_size(data) == (37, 61)
    pixels, notes = read_whole(data)
    np.testing.assert_array_equal(pixels, PHOTO)
    assert pixels.flags.writeable != data.startswith(b"\x93NUMPY")
    assert notes == ()


@BOTH
@pytest.mark.parametrize(
    "data",
    [
        JPEG,
        save(PHOTO, "JPEG", quality=95, subsampling=0, progressive=True),
        save(PHOTO, "WEBP", quality=100),
        save(PHOTO, "TIFF", compression="jpeg", quality=95),
    ],
    ids=["jpeg", "progressive", "webp", "tiff_jpeg"],
)
def test_lossy_files_come_back_nearly(data):
    # Compressing costs up to 7 levels here; a swapped channel would cost over 20.
    assert np.abs(read_whole(data)[0].astype(int) - PHOTO).mean() < 10


GREY = np.asarray(Image.fromarray(PHOTO).convert("L"))
ALPHA = np.dstack([PHOTO, GREY])
PALETTE = Image.fromarray(PHOTO).quantize(16)
TRANSPARENT = PALETTE.copy()
TRANSPARENT.info["transparency"] = 3
BITS = GREY > 128


def on_white(colour, alpha):
    alpha = alpha[..., None] / 255
    return (colour * alpha + 255 * (1 - alpha)).round()


def as_rgb(grey):
    return np.repeat(np.asarray(grey)[..., None], 3, axis=2)


INDEX = np.asarray(PALETTE)[..., None]
TABLE = np.asarray(PALETTE.convert("RGB"))
FADING = bytes(range(0, 256, 16))
MODES = {
    "grey": (save(GREY, "PNG"), as_rgb(GREY)),
    "grey_jpeg": (save(np.full((9, 9), 77, np.uint8), "JPEG"), np.full((9, 9, 3), 77)),
    "grey_gif": (save(GREY, "GIF"), as_rgb(GREY)),
    "grey_bmp": (save(GREY, "BMP"), as_rgb(GREY)),
    "grey_alpha": (
        save(Image.merge("LA", [Image.fromarray(GREY), Image.fromarray(GREY)]), "PNG"),
        on_white(as_rgb(GREY), GREY),
    ),
    "rgba": (save(ALPHA, "PNG"), on_white(PHOTO, GREY)),
    "rgba_tiff": (save(ALPHA, "TIFF"), on_white(PHOTO, GREY)),
    "rgba_webp": (
        save(ALPHA, "WEBP", lossless=True, exact=True),
        on_white(PHOTO, GREY),
    ),
    "palette": (save(PALETTE, "PNG"), TABLE),
    "palette_gif": (save(PALETTE, "GIF"), TABLE),
    "palette_bmp": (save(PALETTE, "BMP"), TABLE),
    "palette_one_transparent": (
        save(TRANSPARENT, "PNG"),
        np.where(INDEX == 3, 255, TABLE),
    ),
    "gif_one_transparent": (save(TRANSPARENT, "GIF"), np.where(INDEX == 3, 255, TABLE)),
    "palette_fading": (
        save(PALETTE, "PNG", transparency=FADING),
        on_white(TABLE, 16 * np.asarray(PALETTE)),
    ),
    "one_bit": (save(Image.fromarray(BITS), "PNG"), 255 * as_rgb(BITS)),
    "one_bit_fax": (
        save(Image.fromarray(BITS), "TIFF", compression="group4"),
        255 * as_rgb(BITS),
    ),
    "key_grey_4_bit": (
        png(1, 2, 4, 0, b"\0\x27", chunk(b"tRNS", b"\0\x07")),
        [[[34] * 3, [255] * 3]],
    ),
    "key_grey_16_bit": (
        png(1, 2, 16, 0, b"\0\x12\x34\x34\x56", chunk(b"tRNS", b"\x12\x34")),
        [[[255] * 3, [52] * 3]],
    ),
    "key_rgb_16_bit": (
        png(
            1, 2, 16, 2, b"\0" + b"\x12\x34" * 3 + b"\x34\x34" * 3,
            chunk(b"tRNS", b"\x12\x34" * 3),
        ),
        [[[255] * 3, [52] * 3]],
    ),
}  # fmt: skip


@BOTH
@pytest.mark.parametrize(("data", "expected"), MODES.values(), ids=MODES)
def test_every_mode_becomes_rgb_with_transparency_on_white(data, expected):
    pixels, notes = read_whole(data)
    assert pixels.dtype == np.uint8
    assert notes == ()
    # Blending rounds once to 8 bits, in Pillow and here: one level.
    np.testing.assert_allclose(pixels, expected, atol=1)


COLOURS = {  # ink in percent of full -> light
    (100, 0, 0, 0): (0, 255, 255),
    (0, 100, 0, 0): (255, 0, 255),
    (0, 0, 100, 0): (255, 255, 0),
    (0, 0, 0, 100): (0, 0, 0),
    (0, 0, 0, 0): (255, 255, 255),
    (20, 60, 40, 20): (163, 82, 122),
}


def cmyk_jpeg(inks, how):
    """A JPEG of one colour in four channels, stored as Adobe, YCCK or plainly."""
    stored = [255 - round(2.55 * ink) for ink in inks]  # Adobe stores the lack of ink
    if how == "plain":
        stored = [255 - value for value in stored]
    if how == "ycck":
        rest = tuple(255 - value for value in stored[:3])
        ycc = np.asarray(Image.new("RGB", (1, 1), rest).convert("YCbCr"))[0, 0]
        stored = [*ycc.tolist(), stored[3]]
    # Pillow inverts on writing.
    image = Image.new("CMYK", (16, 16), tuple(255 - value for value in stored))
    data = save(image, "JPEG", quality=100, subsampling=0)
    mark = data.index(b"\xff\xee")
    if how == "plain":
        return data[:mark] + data[mark + 16 :]
    return data[: mark + 15] + bytes([2 * (how == "ycck")]) + data[mark + 16 :]


@BOTH
@pytest.mark.parametrize("how", ["adobe", "ycck", "plain"])
@pytest.mark.parametrize("inks", COLOURS, ids=str)
def test_cmyk_jpegs_are_converted_and_not_inverted(inks, how):
    pixels, _ = read_whole(cmyk_jpeg(inks, how))
    # Conversion to YCC and quality 100 round by a level or two each.
    np.testing.assert_allclose(pixels[8, 8], COLOURS[inks], atol=5)


def test_cmyk_tiffs_are_converted():
    data = save(Image.new("CMYK", (4, 4), (255, 0, 0, 0)), "TIFF")
    np.testing.assert_array_equal(read_whole(data)[0][0, 0], [0, 255, 255])


RAMP = np.arange(0, 65536, 257, dtype=np.uint16).reshape(16, 16)
WIDE = {
    "png": save(RAMP, "PNG"),
    "tiff": save(RAMP, "TIFF"),
    "tiff_deflate": save(RAMP, "TIFF", compression="tiff_adobe_deflate"),
    "tiff_big_endian": grey_tiff(16, 16, 16, RAMP.astype(">u2").tobytes(), order=">"),
    "rgb_png": png(
        16, 16, 16, 2,
        b"".join(b"\0" + np.repeat(row, 3).astype(">u2").tobytes() for row in RAMP),
    ),
}  # fmt: skip


@pytest.mark.parametrize("data", WIDE.values(), ids=WIDE)
def test_16_bit_values_are_scaled_by_their_type_and_not_clipped(data):
    pixels, notes = read_whole(data)
    np.testing.assert_array_equal(pixels, as_rgb(RAMP // 257))
    assert notes == ()


@pytest.mark.parametrize("values", [RAMP, RAMP.astype(np.float32)], ids=["16", "float"])
def test_a_tiff_that_counts_from_white_is_no_negative(values):
    data = save(values, "TIFF", tiffinfo={262: 0})
    assert Image.open(io.BytesIO(data)).tag_v2[262] == 0
    expected = 255 - RAMP // 257
    np.testing.assert_array_equal(read_whole(data)[0], as_rgb(expected))


def test_12_bit_values_are_scaled_by_their_type():
    data = grey_tiff(1, 2, 12, bytes([0xFF, 0xF8, 0x00]))  # 4095, 2048
    np.testing.assert_array_equal(read_whole(data)[0][0, :, 0], [255, 128])


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([-1.0, 0.0, 1.0], [0, 128, 255]),
        ([290.0, 291.0, 294.0], [0, 64, 255]),
        ([np.nan, 5.0, 6.0], [0, 0, 255]),
        ([np.inf, 5.0, 6.0], [255, 0, 255]),
        ([-3e38, 0.0, 3e38], [0, 128, 255]),
        ([0.5, 0.5, 0.5], [0, 0, 0]),
        ([np.nan, np.nan, np.nan], [0, 0, 0]),
    ],
)
def test_float_pictures_are_scaled_by_their_own_finite_range(values, expected):
    pixels, notes = read_whole(save(np.array([values], np.float32), "TIFF"))
    np.testing.assert_array_equal(pixels[0, :, 0], expected)
    assert notes == ("scaled",)


def test_32_bit_pictures_are_scaled_by_their_own_range():
    values = np.array([[-70000, 0, 70000]], np.int32)
    pixels, notes = read_whole(save(values, "TIFF"))
    np.testing.assert_array_equal(pixels[0, :, 1], [0, 128, 255])
    assert notes == ("scaled",)


@pytest.mark.parametrize(
    ("kind", "options"), [("PNG", {}), ("WEBP", {"lossless": True}), ("GIF", {})]
)
def test_the_first_frame_of_an_animation_is_used_and_noted(kind, options):
    frames = [Image.fromarray(p).quantize(64).convert("RGB") for p in (PHOTO, OTHER)]
    data = save(
        frames[0],
        kind,
        save_all=True,
        append_images=frames[1:],
        duration=100,
        **options,
    )
    pixels, notes = read_whole(data)
    np.testing.assert_array_equal(pixels, np.asarray(frames[0]))
    assert notes == ("animated",)


def test_a_bmp_may_be_stored_from_the_top():
    data = LOSSLESS["bmp"]
    data = data[:22] + struct.pack("<i", -37) + data[26:]
    np.testing.assert_array_equal(read_whole(data)[0], PHOTO[::-1])


def test_the_first_page_of_a_tiff_is_used_and_noted():
    other = Image.fromarray(OTHER)
    data = save(PHOTO, "TIFF", save_all=True, append_images=[other])
    pixels, notes = read_whole(data)
    np.testing.assert_array_equal(pixels, PHOTO)
    assert notes == ("pages",)


def test_a_gif_whose_frame_is_larger_than_its_screen_has_the_size_of_the_frame():
    data = bytearray(save(PALETTE, "GIF"))
    data[6:10] = struct.pack("<HH", 1, 1)
    assert images.read_size(bytes(data)) == (37, 61)
    np.testing.assert_array_equal(read_whole(bytes(data))[0], TABLE)


# --- upright ------------------------------------------------------------------------

STORED = {  # how an upright picture is stored, so that the orientation turns it back
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, 1),
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
    8: lambda a: np.rot90(a, -1),
}
TURNED = {"exif": exif(6)[6:], "quality": 95, "subsampling": 0}


@pytest.mark.parametrize("orientation", STORED)
@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF"])
def test_the_8_orientations_give_the_same_picture_to_the_bit(orientation, kind):
    stored = np.ascontiguousarray(STORED[orientation](PHOTO))
    note = {"exif": exif(orientation), "lossless": True}
    if kind == "TIFF":
        note = {"tiffinfo": {ORIENTATION: orientation}}
    data = save(stored, kind, **note)
    assert images.read_size(data) == (37, 61)
    pixels, notes = images.read(
        data, (37, 61), (16, 32), box=(0.1, 0.2, 0.7, 0.9), flip=True
    )
    expected, _ = images.read(
        LOSSLESS["png"], (37, 61), (16, 32), box=(0.1, 0.2, 0.7, 0.9), flip=True
    )
    np.testing.assert_array_equal(pixels, expected)
    assert notes == ()
    # A second way: Pillow's own transposition.
    upright = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))))
    np.testing.assert_array_equal(read_whole(data)[0], upright)


@BOTH
@pytest.mark.parametrize("orientation", STORED)
@pytest.mark.parametrize("order", ["<", ">"])
def test_the_8_orientations_of_a_jpeg_decoded_at_a_lower_scale_agree(
    orientation, order
):
    # Sides that no scale divides, so a shift by part of a pixel would be seen.
    upright = photo(8 * 50 + 1, 8 * 60 + 1)
    stored = np.ascontiguousarray(STORED[orientation](upright))
    data = save(stored, "JPEG", quality=95, exif=exif(orientation, order))
    assert images.read_size(data) == upright.shape[:2]
    pixels, notes = images.read(data, upright.shape[:2], (24, 30))
    expected = resize_exactly(upright, (24, 30))
    # Shifted by the missing part of a pixel it would differ by over 5.
    assert np.abs(pixels - expected).mean() < 1.5
    assert notes == ()


# --- size and quality ---------------------------------------------------------------


def resize_exactly(image, target):
    """Antialiased bilinear: a triangle as wide as the scale, in float64, in one go."""

    def weights(before, after):
        scale = before / after
        reach = max(scale, 1.0)
        centres = (np.arange(after)[:, None] + 0.5) * scale
        distance = np.abs(np.arange(before)[None] + 0.5 - centres) / reach
        table = np.maximum(0.0, 1.0 - distance)
        return table / table.sum(1, keepdims=True)

    rows, columns = (
        weights(image.shape[0], target[0]),
        weights(image.shape[1], target[1]),
    )
    return np.einsum(
        "ah,hwc,bw->abc", rows, image.astype(float), columns, optimize=True
    )


@pytest.mark.parametrize(
    "target", [(37, 61), (16, 32), (32, 16), (20, 50), (80, 128), (1, 1), (64, 7)]
)
def test_resizing_is_the_antialiased_bilinear_of_the_paper(target):
    noise = np.random.default_rng(0).integers(0, 256, (37, 61, 3), np.uint8)
    pixels, _ = images.read(save(noise, "PNG"), (37, 61), target)
    assert pixels.shape == (*target, 3)
    expected = resize_exactly(noise, target)
    if max(37 / target[0], 61 / target[1]) < 2 * images.REDUCING_GAP:
        # Rounded to 8 bits after each of the two axes: at most half a level each.
        np.testing.assert_allclose(pixels, expected, atol=1.01)


def test_reducing_first_changes_a_picture_by_less_than_a_level_on_average():
    image = photo(700, 900)
    pixels, _ = images.read(save(image, "PNG"), (700, 900), (80, 96))
    # Rounding alone gives 0.3.
    assert np.abs(pixels - resize_exactly(image, (80, 96))).mean() < 0.6


@pytest.mark.parametrize("orientation", [1, 6])
@pytest.mark.parametrize(
    "target", [(16, 16), (100, 16), (96, 112), (208, 160)], ids=str
)
@pytest.mark.parametrize("box", [(0.0, 0.0, 1.0, 1.0), (0.25, 0.1, 0.75, 0.4)], ids=str)
def test_a_jpeg_is_decoded_near_the_target_but_never_below_it(
    orientation, target, box, monkeypatch
):
    seen = []
    resize = Image.Image.resize

    def spy(image, size, resample, box, reducing_gap):
        seen.append((image.height, box))
        return resize(image, size, resample, box, reducing_gap)

    upright = photo(500, 375)
    stored = np.ascontiguousarray(STORED[orientation](upright))
    data = save(stored, "JPEG", quality=95, exif=exif(orientation))
    monkeypatch.setattr(Image.Image, "resize", spy)
    pixels, _ = images.read(data, (500, 375), target, box=box, codec="pillow")
    ((decoded, (left, top, right, bottom)),) = seen
    height, width = (box[2] - box[0]) * 500, (box[3] - box[1]) * 375
    scale = max(target[0] / height, target[1] / width)
    least = min((bottom - top) / target[0], (right - left) / target[1])
    assert decoded == 500 or least > 1
    if scale * images.DRAFT_GAP <= 1 / 2:
        assert decoded <= 250, "decoded at full size for nothing"
    full = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    window = (box[1] * 375, box[0] * 500, box[3] * 375, box[2] * 500)
    expected = resize(full, target[::-1], Image.Resampling.BILINEAR, window)
    # The JPEG's scaled decoding is a little sharper than a triangle.
    assert np.abs(pixels - np.asarray(expected, float)).mean() < 1.2


@BOTH
@pytest.mark.parametrize(
    ("size", "target"),
    [
        ((1, 1), (16, 16)),
        ((1, 4000), (16, 256)),
        ((4000, 1), (1024, 16)),
        ((100, 2500), (16, 400)),
        ((2500, 100), (16, 16)),
    ],
)
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF"])
def test_single_pixels_and_panoramas_are_read(size, target, kind):
    data = save(np.full((*size, 3), 90, np.uint8), kind)
    assert images.read_size(data) == size
    pixels, _ = images.read(data, size, target)
    assert pixels.shape == (*target, 3)
    np.testing.assert_allclose(pixels, 90, atol=2)


def test_a_box_is_cropped_before_resizing_and_flipped_after():
    image = np.zeros((40, 80, 3), np.uint8)
    image[10:20, 20:40] = [255, 0, 0]
    image[10:20, 40:60] = [0, 0, 255]
    data = save(image, "PNG")
    box = (10 / 40, 20 / 80, 20 / 40, 60 / 80)
    pixels, _ = images.read(data, (40, 80), (10, 40), box=box)
    np.testing.assert_array_equal(pixels, image[10:20, 20:60])
    mirrored, _ = images.read(data, (40, 80), (10, 40), box=box, flip=True)
    np.testing.assert_array_equal(mirrored, pixels[:, ::-1])


def test_a_picture_of_another_size_is_fitted_if_its_aspect_is_within_2_percent():
    data = save(photo(100, 150), "PNG")
    pixels, notes = images.read(data, (200, 300), (32, 48))
    assert notes == ("fitted",)
    np.testing.assert_array_equal(pixels, images.read(data, (100, 150), (32, 48))[0])
    assert images.read(data, (1000, 1529), (32, 48))[1] == ("fitted",)
    assert images.read(data, (1019, 1500), (32, 48))[1] == ("fitted",)
    for planned in ((1000, 1531), (1021, 1500), (150, 100)):
        with pytest.raises(BadImage, match="size_changed"):
            images.read(data, planned, (32, 48))


def test_jitter_scales_brightness_contrast_and_saturation():
    np.testing.assert_array_equal(images.jitter(PHOTO, 1.0, 1.0, 1.0), PHOTO)
    bright = images.jitter(PHOTO, 0.5, 1.0, 1.0)
    np.testing.assert_allclose(bright, PHOTO * 0.5, atol=1)
    grey = PHOTO @ [0.299, 0.587, 0.114]
    contrast = images.jitter(PHOTO, 1.0, 1.5, 1.0)
    expected = grey.mean() + 1.5 * (PHOTO - grey.mean())
    np.testing.assert_allclose(contrast, np.clip(expected, 0, 255), atol=2)
    colour = images.jitter(PHOTO, 1.0, 1.0, 0.3)
    expected = grey[..., None] + 0.3 * (PHOTO - grey[..., None])
    np.testing.assert_allclose(colour, np.clip(expected, 0, 255), atol=2)


# --- what is refused ----------------------------------------------------------------


def png_header(h, w):
    return png(h, w, 8, 2, b"")


def jpeg_header(h, w):
    at = JPEG.index(b"\xff\xc0") + 5
    return JPEG[:at] + struct.pack(">HH", h, w) + JPEG[at + 4 :]


def gif_header(h, w):
    data = bytearray(save(PALETTE, "GIF"))
    data[6:10] = struct.pack("<HH", w, h)
    at = data.index(b"\x2c\0\0\0\0\x3d\0\x25\0") + 5
    data[at : at + 4] = struct.pack("<HH", w, h)
    return bytes(data)


def bmp_header(h, w):
    data = LOSSLESS["bmp"]
    return data[:18] + struct.pack("<ii", w, h) + data[26:]


def webp_header(h, w):
    body = b"\x10\0\0\0" + (w - 1).to_bytes(3, "little") + (h - 1).to_bytes(3, "little")
    body = b"WEBPVP8X" + struct.pack("<I", 10) + body + LOSSLESS["webp"][12:]
    return b"RIFF" + struct.pack("<I", len(body)) + body


def npy_header(h, w):
    array = np.lib.stride_tricks.as_strided(PHOTO, (h, w, 3), (0, 0, 1))
    file = io.BytesIO()
    header = np.lib.format.header_data_from_array_1_0(array)
    np.lib.format.write_array_header_1_0(file, {**header, "fortran_order": False})
    return file.getvalue() + b"some pixels"


def tiff_header(h, w):
    return grey_tiff(h, w, 8, b"\0" * 100)


HEADERS = {
    "png": png_header,
    "jpeg": jpeg_header,
    "gif": gif_header,
    "bmp": bmp_header,
    "webp": webp_header,
    "tiff": tiff_header,
    "npy": npy_header,
}


@pytest.mark.parametrize("header", HEADERS.values(), ids=HEADERS)
@pytest.mark.parametrize("size", [(60_000, 60_000), (29_700, 20_990)], ids=str)
def test_bombs_are_refused_from_the_header_with_flat_memory(header, size):
    if header is webp_header:
        size = (16_384, 16_384)  # its largest
    data = header(*size)
    process = psutil.Process()
    with pytest.raises(BadImage, match="too_large"):
        images.read_size(data)
    before = process.memory_info().rss
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(3):
        with pytest.raises(BadImage, match="too_large"):
            images.read_size(data)
        with pytest.raises(BadImage, match="too_large"):
            images.read(data, size, (16, 16))
    # The smallest of them holds 268 million pixels.
    assert process.memory_info().rss - before < 8e6
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak) * 1024 < 8e6


@pytest.mark.parametrize("kind", ["png", "bmp", "tiff", "npy"])
@pytest.mark.parametrize("size", [(65_536, 1), (1, 65_536)], ids=str)
def test_a_side_beyond_the_table_of_sizes_is_refused(kind, size):
    with pytest.raises(BadImage, match="too_large"):
        images.read_size(HEADERS[kind](*size))


@pytest.mark.parametrize("kind", ["tiff", "gif"])
def test_tiff_and_gif_are_refused_where_pillow_would_warn_of_them(kind):
    with pytest.raises(BadImage, match="too_large"):
        images.read_size(HEADERS[kind](9_500, 9_500))
    assert images.read_size(HEADERS[kind](9_400, 9_500)) == (9_400, 9_500)


@pytest.mark.parametrize("kind", ["png", "jpeg", "bmp"])
def test_a_large_photograph_is_not_refused(kind):
    assert images.read_size(HEADERS[kind](9_000, 12_000)) == (9_000, 12_000)


@pytest.mark.parametrize("kind", ["png", "jpeg", "gif", "bmp", "tiff", "npy"])
@pytest.mark.parametrize("size", [(0, 0), (0, 61), (37, 0)], ids=str)
def test_a_picture_without_pixels_is_refused(kind, size):
    with pytest.raises(BadImage) as caught:
        images.read_size(HEADERS[kind](*size))
    assert caught.value.reason == "zero_size"


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty"),
        (b"<!DOCTYPE html><title>404</title>", "not_image"),
        (b"\x89PN", "not_image"),
        (b"\0" * 1000, "not_image"),
        (JPEG[:3], "truncated"),
        (JPEG[:200], "truncated"),
        (LOSSLESS["png"][:20], "truncated"),
        (save(PALETTE, "GIF")[:12], "truncated"),
        (LOSSLESS["bmp"][:20], "truncated"),
        (LOSSLESS["webp"][:20], "truncated"),
        (LOSSLESS["tiff"][:20], "truncated"),
        (LOSSLESS["npy"][:7], "undecodable"),
        (LOSSLESS["npy"][:20], "truncated"),
        (LOSSLESS["npy"][:-1], "truncated"),
        (npy(PHOTO.astype(np.int8)), "undecodable"),
        (npy(PHOTO.astype(np.float32)), "undecodable"),
        (npy(PHOTO[..., 0]), "undecodable"),
        (npy(PHOTO[..., :2]), "undecodable"),
        (npy(PHOTO[None]), "undecodable"),
        (npy(np.asfortranarray(PHOTO)), "undecodable"),
        (npy(PHOTO, version=(3, 0)), "undecodable"),
        (npy(np.array([PHOTO, None], dtype=object)), "undecodable"),
        (npy(PHOTO).replace(b"(37, 61", b"(-3, 61"), "undecodable"),
        (longer_header(npy(PHOTO), b"and more"), "undecodable"),
        (npy(PHOTO).replace(b"(37, 61", b"(9**9, 1"), "undecodable"),
        (b"BMW is a car, and this a text about it" * 9, "too_large"),
        (JPEG.replace(b"\xff\xc0\x00\x11\x08", b"\xff\xc0\x00\x11\x0c"), "undecodable"),
        (
            tiff([(256, 3, [2]), (257, 3, [2]), (259, 3, [8]), (279, 4, [999])], b"12"),
            "truncated",
        ),
        (tiff([(256, 3, [2]), (257, 3, [2]), (262, 3, [99])], b"1234"), "undecodable"),
        (grey_tiff(2, 2, 7, b"1234"), "undecodable"),
        (grey_tiff(2, 2, 8, b"1234", (284, 3, [1, 1, 1])), "undecodable"),
    ],
    ids=lambda value: value if isinstance(value, str) else f"{len(value)}_bytes",
)
def test_what_is_no_usable_picture_is_refused_with_its_reason(data, reason):
    with pytest.raises(BadImage) as caught:
        images.read_size(data)
    assert caught.value.reason == reason


CUT = {
    **LOSSLESS,
    "jpeg": JPEG,
    "progressive": save(PHOTO, "JPEG", progressive=True),
    "gif": save(PHOTO, "GIF"),
    "interlaced": save(GREY, "GIF", interlace=1),
}


@BOTH
@pytest.mark.parametrize("share", [0.5, 0.9])
@pytest.mark.parametrize("name", CUT)
def test_a_cut_file_is_truncated(name, share):
    data = CUT[name][: int(share * len(CUT[name]))]
    with pytest.raises(BadImage) as caught:
        images.read(data, (37, 61), (16, 16))
    assert caught.value.reason == "truncated"


def test_a_png_that_lacks_its_last_bytes_is_truncated():
    noise = np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8)
    with pytest.raises(BadImage) as caught:
        images.read(save(noise, "PNG")[:-32], (40, 40), (16, 16))
    assert caught.value.reason == "truncated"


def test_a_decoder_that_fails_is_the_cause():
    broken = png(37, 61, 8, 2, b"\x07" * 37 * (1 + 3 * 61))  # there is no filter 7
    broken = broken.replace(b"IDAT\x78", b"IDAT\x00")
    with pytest.raises(BadImage) as caught:
        images.read(broken, (37, 61), (16, 16))
    assert caught.value.reason == "undecodable"
    assert isinstance(caught.value.__cause__, OSError)


def test_a_bug_of_ours_and_a_lack_of_memory_are_not_blamed_on_the_picture(monkeypatch):
    def fail(error):
        def raise_it(*_, **__):
            raise error

        return raise_it

    places = (modes, "flatten"), (images, "_upright"), (images, "read_header")
    for place in places:
        with monkeypatch.context() as patch:
            patch.setattr(*place, fail(TypeError("ours")))
            with pytest.raises(TypeError, match="ours"):
                images.read(LOSSLESS["png"], (37, 61), (16, 16))
    monkeypatch.setattr(ImageFile.ImageFile, "load", fail(MemoryError()))
    with pytest.raises(MemoryError):
        images.read(LOSSLESS["png"], (37, 61), (16, 16))


def test_the_error_survives_the_way_between_processes():
    error = pickle.loads(pickle.dumps(BadImage("truncated", "at 7")))
    assert (error.reason, error.detail, str(error)) == (
        "truncated",
        "at 7",
        "truncated: at 7",
    )


# --- broken and hostile metadata ----------------------------------------------------

BAD_EXIF = {
    "no_header": b"Exif\0\0nothing",
    "far_away": b"Exif\0\0II*\0\xff\xff\xff\x00",
    "cut": exif(6)[:-8],
    "too_many": b"Exif\0\0II*\0\x08\0\0\0\xff\xff" + exif(6)[16:],
    "out_of_range": exif(9),
    "zero": exif(0),
}


@BOTH
@pytest.mark.parametrize("block", BAD_EXIF.values(), ids=BAD_EXIF)
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_broken_exif_is_ignored_with_a_note_and_the_size_is_as_stored(block, kind):
    data = save(PHOTO, kind, exif=block, lossless=True)
    assert images.read_size(data) == (37, 61)
    pixels, notes = read_whole(data)
    assert notes == ("metadata",)
    without = save(PHOTO, kind, lossless=True)
    np.testing.assert_array_equal(pixels, read_whole(without)[0])


def after_header(data, *parts):
    """A PNG with chunks behind its header."""
    return data[:33] + b"".join(parts) + data[33:]


PROFILE = b"p\0\0"
BROKEN = {
    "icc_jpeg": with_segment(JPEG, 0xE2, b"ICC_PROFILE\0\1\1 no profile"),
    "icc_png": after_header(
        LOSSLESS["png"], chunk(b"iCCP", PROFILE + zlib.compress(b"no profile" * 9))
    ),
    "icc_png_not_deflated": after_header(LOSSLESS["png"], chunk(b"iCCP", PROFILE)),
    "icc_webp": save(PHOTO, "WEBP", icc_profile=b"no profile", lossless=True),
    "itxt_checksum": after_header(LOSSLESS["png"], chunk(b"iTXt", b"k\0\0\0\0\0v", 1)),
    "time_checksum": after_header(LOSSLESS["png"], chunk(b"tIME", b"x", crc=7)),
    "jfif_short": with_segment(JPEG, 0xE0, b"JFIF\0\1"),
    "adobe_short": with_segment(JPEG, 0xEE, b"Adobe\0"),
    "orientation_tiff": grey_tiff(37, 61, 8, GREY.tobytes(), (ORIENTATION, 3, [77])),
}


@BOTH
@pytest.mark.parametrize("data", BROKEN.values(), ids=BROKEN)
def test_broken_metadata_is_ignored_with_a_note(data):
    assert images.read_size(data) == (37, 61)
    assert read_whole(data)[1] == ("metadata",)


HARMLESS = {
    "icc_jpeg": save(PHOTO, "JPEG", icc_profile=b"\0" * 36 + b"acsp" + b"\0" * 88),
    "comment": with_segment(JPEG, 0xFE, b"hello"),
    "xmp": with_segment(JPEG, 0xE1, b"http://ns.adobe.com/xap/1.0/\0<broken"),
    "pages_of_a_phone": with_segment(JPEG, 0xE2, b"MPF\0 broken"),
    "fill_byte": JPEG.replace(b"\xff\xc0", b"\xff\xff\xc0") + b"garbage",
    "fill_bytes": JPEG.replace(b"\xff\xc0", b"\xff\xff\xff\xc0"),
    "text": after_header(LOSSLESS["png"], chunk(b"tEXt", b"no separator")),
    "itxt": after_header(LOSSLESS["png"], chunk(b"iTXt", b"\xff\xfe")),
    "time": after_header(LOSSLESS["png"], chunk(b"tIME", b"short")),
    "frames": after_header(LOSSLESS["png"], chunk(b"acTL", bytes(8)) * 2),
    "no_end": LOSSLESS["png"][:-12],
    "tiff_resolution": grey_tiff(37, 61, 8, GREY.tobytes(), (282, 4, [1, 2, 3])),
    "tiff_strip_too_long": grey_tiff(37, 61, 8, GREY.tobytes()).replace(
        struct.pack("<HHII", 279, 4, 1, 37 * 61), struct.pack("<HHII", 279, 4, 1, 9999)
    ),
    "tiff_exif": grey_tiff(37, 61, 8, GREY.tobytes(), (34665, 4, [999_999])),
}


@BOTH
@pytest.mark.parametrize("data", HARMLESS.values(), ids=HARMLESS)
def test_metadata_that_pixels_do_not_need_is_not_looked_at(data):
    assert images.read_size(data) == (37, 61)
    assert read_whole(data)[1] == ()


@pytest.mark.parametrize(
    "body",
    [b"zTXt" + b"k\0\0", b"iTXt" + b"k\0\1\0\0\0", b"iCCP" + PROFILE],
    ids=["zTXt", "iTXt", "iCCP"],
)
def test_chunks_that_inflate_to_a_gigabyte_stay_small(body):
    packer = zlib.compressobj(9)
    bomb = b"".join(packer.compress(bytes(10**7)) for _ in range(20)) + packer.flush()
    data = after_header(LOSSLESS["png"], chunk(body[:4], body[4:] + bomb) * 5)
    tracemalloc.start()
    before = psutil.Process().memory_info().rss
    pixels, _ = read_whole(data)
    np.testing.assert_array_equal(pixels, PHOTO)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    # 1 MB of chunks would be 1 GB.
    assert peak < 8e6
    assert psutil.Process().memory_info().rss - before < 16e6


def test_overlapping_values_do_not_make_a_small_tiff_large():
    fields = [(tag, 4, [0] * 2000) for tag in (273, 279, 324, 325, 320)]
    data = tiff([*fields, (256, 4, [9]), (257, 4, [9])])
    places = [m for m in range(len(data) - 4) if data[m : m + 4] == b"\xd0\x07\0\0"]
    for place in places:  # all of them point to the same values
        data = data[: place + 4] + struct.pack("<I", 100) + data[place + 8 :]
    with pytest.raises(BadImage, match="overlap"):
        images.read_size(data[:20_000])


# --- many at once -------------------------------------------------------------------


@BOTH
def test_threads_do_not_disturb_each_other_and_leave_pillow_as_it_was():
    state = (
        Image.MAX_IMAGE_PIXELS,
        ImageFile.LOAD_TRUNCATED_IMAGES,
        PngImagePlugin.MAX_TEXT_CHUNK,
        warnings.filters,
        list(warnings.filters),
        warnings.showwarning,
    )
    files = [*LOSSLESS.values(), JPEG, *BROKEN.values(), *HARMLESS.values()]
    expected = [images.read(data, (37, 61), (32, 48)) for data in files]
    start = threading.Barrier(8)

    def work(shift):
        start.wait()
        for i in range(len(files)):
            i = (i + shift) % len(files)
            pixels, notes = images.read(files[i], (37, 61), (32, 48))
            np.testing.assert_array_equal(pixels, expected[i][0])
            assert notes == expected[i][1]
            with pytest.raises(BadImage):
                images.read(JPEG[:300], (37, 61), (32, 48))

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))
    assert state[:4] == (
        Image.MAX_IMAGE_PIXELS,
        ImageFile.LOAD_TRUNCATED_IMAGES,
        PngImagePlugin.MAX_TEXT_CHUNK,
        warnings.filters,
    )
    assert state[4:] == (list(warnings.filters), warnings.showwarning)


SMALL = photo(9, 13)
FUZZED = {
    "png": save(SMALL, "PNG", exif=exif(6)),
    "palette": save(Image.fromarray(SMALL).quantize(7), "PNG", transparency=b"\0\1\2"),
    "jpeg": save(SMALL, "JPEG", exif=exif(6), comment=b"hello"),
    "progressive": save(SMALL, "JPEG", progressive=True),
    "cmyk": save(Image.fromarray(SMALL).convert("CMYK"), "JPEG"),
    "webp": save(SMALL, "WEBP", exif=exif(6)),
    "webp_lossless": save(SMALL, "WEBP", lossless=True),
    "bmp": save(Image.fromarray(SMALL).quantize(7), "BMP"),
    "gif": save(
        SMALL, "GIF", save_all=True, append_images=[Image.fromarray(photo(9, 13, 3))]
    ),
    "tiff": save(SMALL, "TIFF", tiffinfo={ORIENTATION: 6, 270: "a description"}),
    "tiff_lzw": save(SMALL, "TIFF", compression="tiff_lzw"),
    "npy": npy(SMALL),
    "tiff_jpeg": save(SMALL, "TIFF", compression="jpeg"),
    "tiff_float": save(SMALL[..., 0].astype(np.float32), "TIFF"),
    "bigtiff": save(SMALL, "TIFF", big_tiff=True),
}
REASONS = {"truncated", "zero_size", "too_large", "size_changed", "undecodable"}
REASONS |= {"empty", "not_image"}


@pytest.mark.parametrize("name", FUZZED)
def test_damaged_files_are_read_or_refused_without_a_warning(name, monkeypatch, capfd):
    monkeypatch.setattr(containers, "MAX_PIXELS", 10**6)  # so that it is quick
    rng = np.random.default_rng(list(name.encode()))
    reasons = []
    # Not pytest's filter: an error raised in Pillow would pass for a broken picture.
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for trial in range(200):
            data = bytearray(FUZZED[name])
            for _ in range(1 + trial % 4):
                # Most of what matters is at either end.
                reach = len(data) if trial % 3 else min(len(data), 120)
                at = int(rng.integers(reach))
                at = len(data) - 1 - at if trial % 5 == 0 else at
                data[at] = int(rng.choice([0, 1, 255, 128, int(rng.integers(256))]))
            if trial % 10 == 0:
                del data[int(rng.integers(len(data))) :]
            try:
                size = images.read_size(bytes(data))
                pixels, _ = images.read(bytes(data), size, (16, 32))
                assert pixels.shape == (16, 32, 3)
            except BadImage as error:
                reasons.append(error.reason)
    assert [str(warning.message) for warning in seen] == []
    if not name.startswith("tiff"):  # libtiff writes to stderr by itself
        assert capfd.readouterr() == ("", "")
    assert set(reasons) <= REASONS
    assert 0 < len(reasons) < 200
