"""Composed scenes know every pixel's object, and no part of one is in two splits."""

import io

import numpy as np
import pytest
import tiny
from PIL import Image, ImageDraw

from navit_jax import data, experiment
from navit_jax.data import composites, sizes, sources
from navit_jax.data.builders import composites as builder
from navit_jax.data.builders.classes import CLASSES8, labels_of
from navit_jax.data.pixel_classes import draw_classes
from navit_jax.data.records import Objects, Record
from navit_jax.errors import ConfigError

COUNT = 24


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The two sets, from discs of flat colour and plain photographs."""
    root = tmp_path_factory.mktemp("packages")
    rng = np.random.default_rng(0)
    for split in ("train", "validation", "test"):
        known = sources.clipart(split)
        for index in range(6):
            path = root / "art" / "png" / known[index * 7].key
            path.parent.mkdir(parents=True, exist_ok=True)
            disc = Image.new("RGBA", (60, 40), (0, 0, 0, 0))
            colour = (*rng.integers(0, 256, 3).tolist(), 255)
            ImageDraw.Draw(disc).ellipse((5, 5, 50, 35), fill=colour)
            disc.save(path)
    opaque = root / "art" / "png" / sources.clipart("train")[1].key
    opaque.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (30, 30), "red").save(opaque)
    (root / "photos").mkdir()
    for number in range(10):
        grey = Image.new("RGB", (90 + number, 80), (10 * number,) * 3)
        grey.save(root / "photos" / f"{number}.jpg")
    builder.build(root / "art", root / "photos", root / "built")
    return root / "built"


@pytest.fixture(scope="module")
def scenes(built):
    return sources.composites("train", COUNT, path=str(built))


def parts(source):
    """Keys of the cut-outs and backgrounds that a source may take."""
    return [
        {whole[i].key for i in range(len(whole))}
        for whole in (source.cutouts, source.backgrounds)
    ]


def test_cut_outs_keep_the_split_of_the_embedded_set_and_no_part_is_in_two(built):
    found = {
        split: parts(sources.composites(split, 1, path=str(built)))
        for split in ("train", "validation", "test")
    }
    for split, (cutouts, _) in found.items():
        known = sources.clipart(split, labels="none")
        assert cutouts <= {known[i].key for i in range(len(known))}
        assert len(cutouts) == 6
    for kind in (0, 1):
        every = [key for split in found.values() for key in split[kind]]
        assert len(every) == len(set(every))
    assert [len(photos) for _, photos in found.values()] == [8, 1, 1]


def test_what_is_opaque_everywhere_is_no_cut_out(built):
    assert (
        sources.clipart("train")[1].key
        not in parts(sources.composites("train", 1, path=str(built), labels="none"))[0]
    )


def test_a_scene_is_a_function_of_seed_split_and_index(built, scenes):
    again = sources.composites("train", COUNT, path=str(built))
    longer = sources.composites("train", 10 * COUNT, path=str(built))
    other = sources.composites("train", COUNT, path=str(built), seed=1)
    for index in (0, 5, COUNT - 1):
        assert again[index].image == scenes[index].image == longer[index].image
        assert other[index].image != scenes[index].image
    assert scenes.fingerprint() == again.fingerprint() != other.fingerprint()
    assert scenes.fingerprint() != longer.fingerprint()


def test_sizes_are_known_without_composing_and_keep_the_limits(built):
    source = sources.composites("train", 4000, path=str(built))
    table = sizes.size_table(source).astype(float)
    assert 64 <= table.min() <= 66
    assert 470 <= table.max() <= 480
    aspect = table[:, 1] / table[:, 0]
    # Half a pixel of rounding at 64 pixels.
    assert 1 / 3.05 < aspect.min() < 1 / 2.9
    assert 2.9 < aspect.max() < 3.05
    for index in range(5):
        pixels = np.load(io.BytesIO(source[index].image))
        assert pixels.shape == (*table[index], 3)


def test_masks_are_the_cut_outs_that_lie_on_top_and_boxes_hold_them(scenes):
    """Against the pixels: a disc has one colour, and a photo another."""
    crowded = 0
    for index in range(COUNT):
        record = scenes[index]
        pixels = np.load(io.BytesIO(record.image)).astype(int)
        found = record.objects
        assert set(np.unique(found.instances)) == set(range(len(found.boxes) + 1))
        height, width = found.instances.shape
        for number, box in enumerate(found.boxes, 1):
            mask = found.instances == number
            ys, xs = np.nonzero(mask)
            ends = [ys.min(), xs.min(), ys.max() + 1, xs.max() + 1]
            np.testing.assert_allclose(
                box * np.array([height, width] * 2), ends, rtol=1e-5
            )
            # Within a disc nearly all pixels have its colour; the edge of a small one
            # is most of it.
            own = np.median(pixels[mask], 0)
            alike = (np.abs(pixels[mask] - own).max(-1) < 9).mean()
            assert alike > (0.7 if mask.sum() > 400 else 0.5)
        grey = pixels[found.instances == 0]
        assert (np.ptp(grey, -1) < 9).mean() > 0.9
        crowded += len(found.boxes) > 1
    assert crowded > 5


def test_objects_are_small_in_their_scene_and_anywhere_in_it(built):
    source = sources.composites(
        "train", 60, path=str(built), objects=1, side=(128, 300)
    )
    shares, centres = [], []
    for index in range(60):
        found = source[index].objects
        assert len(found.boxes) == 1
        h, w = found.instances.shape
        top, left, bottom, right = found.boxes[0]
        shares.append(max((bottom - top) * h, (right - left) * w) / (h * w) ** 0.5)
        centres.append(((top + bottom) / 2, (left + right) / 2))
    # A pixel of a side of 128 more or less.
    assert 0.19 < min(shares) < 0.25
    assert 0.45 < max(shares) < 0.51
    assert np.ptp(centres, axis=0).min() > 0.5


class Kept(list):
    """A source of records in memory."""

    name, class_names = "kept", ()


def compose(cutouts, count, **changes):
    """Scenes with one of these cut-outs, each a class, on a black or a grey photo."""
    photos = [Image.new("RGB", (9, 9), colour) for colour in ("black", "gray")]
    parts = Kept(), Kept()
    for part, pictures in zip(parts, (cutouts, photos), strict=True):
        for number, picture in enumerate(pictures):
            file = io.BytesIO()
            picture.save(file, "PNG")
            part.append(Record(str(number), file.getvalue(), (number,)))
    given = {
        "class_names": (), "split": "train", "seed": 0, "most": 1, "share": (0.2, 0.5),
        "side": (64, 96), "stamp": "",
    }  # fmt: skip
    found = composites.Composites(*parts, count=count, **{**given, **changes})
    return [found.compose(index) for index in range(count)]


def test_a_pixel_is_an_objects_if_the_object_is_more_than_half_of_it():
    """A white cut-out on black: what is seen is its share, from none to all of 255."""
    ramp = np.full((40, 40, 4), 255, np.uint8)
    ramp[..., 3] = np.linspace(0, 255, 40)
    black = 0
    for scene, objects in compose([Image.fromarray(ramp)], 12):
        if scene.min() == 0:
            assert ((scene[..., 0] > 127) == (objects.instances == 1)).all()
            between = scene[(scene > 0) & (scene < 255)]
            assert between.min() < 40 < 210 < between.max()
            black += 1
    assert black > 3


def test_what_is_drawn_of_a_scene_is_independent_of_all_else():
    colours = [Image.new("RGBA", (4, 4), (30 * i, 250, 0, 255)) for i in range(8)]
    num = 400
    drawn = []
    for scene, objects in compose(colours, num, most=2, share=(0.3, 0.5)):
        height, width = objects.instances.shape
        box = objects.boxes[-1] * (height, width, height, width)
        top, left, bottom, right = np.rint(box)
        side = bottom - top
        drawn.append(
            [
                len(objects.boxes),
                objects.labels[-1],
                side / (height * width) ** 0.5,
                top / (height - side),
                left / (width - right + left),
                scene[0, 0].sum() > 0,
                width / height,
                height * width,
            ]
        )
    drawn = np.array(drawn, float)
    among = np.corrcoef(drawn.T) - np.eye(drawn.shape[1])
    # Of independent draws a correlation has a deviation of 1 / 20.
    assert np.abs(among).max() < 0.2
    # Each is even over its range.
    counts = np.bincount(drawn[:, 1].astype(int), minlength=8)
    assert counts.min() > 25
    for column, low, high in ((2, 0.3, 0.5), (3, 0, 1), (4, 0, 1)):
        places = np.sort(drawn[:, column])
        apart = (places - low) / (high - low) - np.arange(num) / num
        assert np.abs(apart).max() < 2 / num**0.5


def test_labels_are_those_of_what_is_visible(scenes):
    for index in range(COUNT):
        record = scenes[index]
        assert record.labels == tuple(sorted(set(record.objects.labels.tolist())))
    assert scenes.class_names == CLASSES8
    first = scenes.cutouts[0]
    assert first.labels == tuple(labels_of((first.key.rpartition("/")[0],), CLASSES8))


def test_hidden_objects_are_left_out_and_the_others_numbered_anew():
    instances = np.array([[0, 3, 3], [1, 3, 0]], np.uint8)
    found = composites.visible(instances, np.array([7, 8, 9], np.int32))
    assert found.labels.tolist() == [7, 9]
    assert found.instances.tolist() == [[0, 2, 2], [1, 2, 0]]
    np.testing.assert_allclose(
        found.boxes, [[1 / 2, 0, 1, 1 / 3], [0, 1 / 3, 1, 1]], rtol=1e-6
    )


def test_classes_of_pixels_follow_crop_flip_and_size():
    instances = np.zeros((4, 8), np.uint8)
    instances[:2, 4:6], instances[2:, 6:] = 1, 2
    objects = Objects(instances, np.zeros((2, 4)), np.array([5, -1]))
    plain = draw_classes(objects, (4, 8), (0.0, 0.0, 1.0, 1.0), False)
    expected = np.select([instances == 1, instances == 2], [6, 255])
    np.testing.assert_array_equal(plain, expected)
    right = draw_classes(objects, (8, 8), (0.0, 0.5, 1.0, 1.0), True)
    half = expected[:, 4:].repeat(2, 0).repeat(2, 1)
    np.testing.assert_array_equal(right, half[:, ::-1])
    assert (draw_classes(None, (2, 2), (0.0, 0.0, 1.0, 1.0), False) == 255).all()


def test_a_batch_brings_the_classes_of_its_pixels(built):
    section = {"name": "composites", "split": "train", "count": 40, "path": str(built)}
    changed = tiny.config(
        data__sources={"scenes": section},
        data__crop={"name": "none"},
        data__flip=0.0,
        data__jitter=0.0,
        data__num_labels=6,
        data__pixel_classes=True,
    )
    stream = experiment.build_stream(changed)
    batch, _ = next(stream.batches(np.arange(8)))
    classes = batch.targets["pixel_classes"]
    assert classes.shape == (*batch.segment_ids.shape, 16 * 16)
    assert (classes[batch.segment_ids == 0] == 255).all()
    for b, i in zip(*np.nonzero(batch.image_mask), strict=True):
        own = classes[b][batch.segment_ids[b] == i + 1]
        seen = set(np.unique(own)) - {0}
        labels = batch.targets["labels"][b, i]
        # An object that is small may vanish where a scene is made smaller.
        assert seen
        assert seen <= {c + 1 for c in labels if c >= 0}
        # The discs are the saturated pixels.
        pixels = batch.patches[b][batch.segment_ids[b] == i + 1].reshape(-1, 3)
        colourful = np.ptp(pixels.astype(int), -1) > 25
        assert (colourful == (own.ravel() > 0)).mean() > 0.9


def test_what_can_not_be_composed_is_refused(built, tmp_path):
    with pytest.raises(ConfigError, match=r"builders\.composites"):
        sources.composites("train", 5, path=str(tmp_path))
    with pytest.raises(ConfigError, match="labels='colours'"):
        sources.composites("train", 5, "colours", path=str(built))
    with pytest.raises(ConfigError, match="share"):
        sources.composites("train", 5, share=(0.2, 0.9), path=str(built))
    with pytest.raises(ConfigError, match="count=0"):
        sources.composites("train", 0, path=str(built))
    with pytest.raises(ConfigError, match="split"):
        data.open_sources(
            {"x": {"name": "composites", "split": "no", "count": 3, "path": str(built)}}
        )
