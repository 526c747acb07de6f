"""Classes of pixels: counts, what is learned of few scenes, and nothing leaks."""

import dataclasses
import functools
import io
import re
import zlib

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import packed
import pytest
import tiny
from PIL import Image
from test_sources import example, write_records

from navit_jax import experiment, mean_iou
from navit_jax.batch import PackedBatch
from navit_jax.data import masks
from navit_jax.data.patches import patchify
from navit_jax.data.pixel_classes import check_shape, draw_classes
from navit_jax.errors import ConfigError, DataError
from navit_jax.isolation import check_isolation
from navit_jax.metrics import interval_by_group
from navit_jax.models.navit import NaViT
from navit_jax.models.pooling import image_masks, mean_pool
from navit_jax.models.sparseformer import SparseFormer
from navit_jax.tasks.segmentation import Segmentation, count_pixels

PATCH, L, SLOTS = 4, 60, 3
COLOURS = np.array([[128, 128, 128], [255, 40, 40], [40, 40, 255]])
SMALL = {
    "latents": 16, "channels": 8, "points": 9, "out_points": 4, "focus_width": 32,
    "focus_heads": 2, "width": 32, "depth": 1, "num_heads": 2, "mlp": 64, "repeats": 1,
    "rank": 8,
}  # fmt: skip
ENCODERS = {
    "navit": NaViT(
        "Ti/4", width=32, depth=1, num_heads=2, mlp=64, pooling="none",
        positions={"name": "factorized", "length": 8},
    ),
    "v1": SparseFormer("v1_micro/4", SMALL),
    "v2": SparseFormer("v2_micro/4", SMALL),
}  # fmt: skip


def scene(number, grid):
    """Pixels and classes of a red and a blue box on grey noise."""
    rng = np.random.default_rng(number)
    size = PATCH * np.array(grid)
    classes = np.zeros(size, np.uint8)
    for each in rng.permutation([1, 2]):
        sides = rng.integers(size // 3, size // 2 + 1)
        top, left = rng.integers(0, size - sides + 1)
        classes[top : top + sides[0], left : left + sides[1]] = each
    noise = rng.integers(-30, 31, (*size, 3))
    return np.clip(COLOURS[classes] + noise, 0, 255).astype(np.uint8), classes


def pack(rows):
    """Rows of scenes, as the loader packs them; padding is unknown."""
    B = len(rows)
    batch = PackedBatch(
        patches=np.zeros((B, L, 3 * PATCH**2), np.uint8),
        coords=np.zeros((B, L, 2), np.int32),
        segment_ids=np.zeros((B, L), np.int32),
        grids=np.zeros((B, SLOTS, 2), np.int32),
        image_mask=np.zeros((B, SLOTS), bool),
        image_ids=np.zeros((B, SLOTS, 2), np.uint32),
        targets={"pixel_classes": np.full((B, L, PATCH**2), 255, np.uint8)},
    )
    for b, scenes in enumerate(rows):
        start = 0
        for slot, (number, grid) in enumerate(scenes):
            pixels, classes = scene(number, grid)
            stop = start + grid[0] * grid[1]
            content, coords = patchify(pixels, PATCH)
            batch.patches[b, start:stop], batch.coords[b, start:stop] = content, coords
            known = batch.targets["pixel_classes"]
            known[b, start:stop], _ = patchify(classes[..., None], PATCH)
            batch.segment_ids[b, start:stop] = slot + 1
            batch.grids[b, slot], batch.image_mask[b, slot] = grid, True
            batch.image_ids[b, slot] = 0, number
            start = stop
    return jax.tree.map(jnp.asarray, batch)


BATCH = pack([[(1, (5, 6)), (2, (6, 4))], [(3, (4, 4)), (4, (3, 6)), (5, (5, 5))]])


class Known:
    """A source that knows its classes, and nothing else is asked of it."""

    name, class_names = "boxes", ("red", "blue")

    def __len__(self):
        return 0

    def __getitem__(self, index):
        raise IndexError(index)


def judge(task, params, batch):
    """The metrics of the set that a batch is."""
    found = jax.jit(task.confusion)(params, batch)
    flat = {k: np.asarray(v).reshape(-1, v.shape[-1]) for k, v in found.items()}
    index = np.where(np.asarray(batch.image_mask).ravel(), 0, -1)
    found, source = mean_iou.MeanIou(), Known()
    asked = found.read(source, lambda: None)
    return found.conclude(asked, None, flat, index, source)


@functools.cache
def train(name, readout="points", steps=120):
    """The task, and its parameters before and after some steps."""
    task = Segmentation(ENCODERS[name], 2, cells=2, hidden=64, readout=readout)
    tx = optax.adam(optax.cosine_decay_schedule(1e-2, steps))
    before = jax.jit(task.init)(jax.random.key(0), BATCH)

    def step(state, number):
        params, moments = state
        slopes = jax.grad(task.loss, has_aux=True)(
            params, BATCH, jax.random.key(0), task.weights(BATCH)
        )[0]
        updates, moments = tx.update(slopes, moments)
        return (optax.apply_updates(params, updates), moments), None

    @jax.jit
    def run(params):
        return jax.lax.scan(step, (params, tx.init(params)), length=steps)[0][0]

    return task, before, run(before)


# That points are is shown on scenes never seen, in test_segmentation_composites.py.
@pytest.mark.parametrize(
    "name, readout",
    [("navit", "points"), pytest.param("v2", "boxes", marks=pytest.mark.slow)],
)
def test_masks_of_few_scenes_are_learned(name, readout):
    task, before, after = train(name, readout)
    first, last = judge(task, before, BATCH), judge(task, after, BATCH)
    # A head of zeros guesses the first class everywhere: the background.
    assert first["iou_red"] == first["iou_blue"] == 0
    assert first["mean_iou"] == pytest.approx(first["pixel_accuracy"] / 3)
    assert first["mean_iou"] < 0.3
    assert last["mean_iou"] > 0.6


class Few(nn.Module):
    """Tells some pixels of a patch; nothing to who has keys."""

    @nn.compact
    def __call__(self, patches, coords, segment_ids, grids, keys=None):
        return {"tokens": patches[..., :5] / 255 * (keys is None)}


def test_the_loss_is_of_known_pixels_and_classes_are_numbered_as_they_are():
    task = Segmentation(Few(), 2, background=False, cells=2)
    params = jax.tree.map(
        lambda x: jax.random.normal(jax.random.key(x.ndim), x.shape),
        task.init(jax.random.key(0), BATCH),
    )
    out = task.outputs(params, BATCH)
    np.testing.assert_array_equal(out["classes"], out["logits"].argmax(-1) + 1)
    # With its key the encoder says nothing here: all that is left is the bias.
    logits = np.asarray(params["head"]["dense"]["bias"], float).reshape(4, 2)
    losses = np.log(np.exp(logits).sum(-1, keepdims=True)) - logits
    total = num = 0
    classes = np.asarray(BATCH.targets["pixel_classes"])
    for b, i, pixel in np.ndindex(*classes.shape):
        row, column = divmod(pixel, PATCH)
        if classes[b, i, pixel] in (1, 2):
            total += losses[row // 2 * 2 + column // 2, classes[b, i, pixel] - 1]
            num += 1
    weights, key = task.weights(BATCH), jax.random.key(0)
    assert weights == {"pixels": num}
    assert task.loss(params, BATCH, key, weights)[0] == pytest.approx(total / num)
    # As many again may be on other hosts.
    twice = {"pixels": 2 * weights["pixels"]}
    half = task.loss(params, BATCH, key, twice)[0]
    assert half == pytest.approx(total / num / 2)


def test_a_class_that_is_nowhere_counts_in_no_mean_and_intervals_are_by_group():
    @dataclasses.dataclass
    class Grouped(Known):
        class_names = ("red", "blue", "green")
        groups: np.ndarray

    # Slots of images 2, 0, none and 1; nothing is green, or said to be.
    found = {
        "hit": [[4, 1, 0, 0], [2, 0, 0, 0], [9, 9, 9, 9], [0, 3, 0, 0]],
        "said": [[5, 2, 0, 0], [4, 0, 0, 0], [9, 9, 9, 9], [0, 5, 1, 0]],
        "true": [[6, 1, 0, 0], [2, 2, 0, 0], [9, 9, 9, 9], [1, 3, 2, 0]],
    }
    found = {name: np.array(values) for name, values in found.items()}
    source = Grouped(np.array([7, 8, 7]))
    judge = mean_iou.MeanIou()
    asked = judge.read(source, lambda: None)
    values = judge.conclude(asked, None, found, np.array([2, 0, -1, 1]), source)
    assert np.isnan(values["iou_green"])
    ious = 6 / 12, 4 / 9, 0
    assert [values[f"iou_{n}"] for n in ("background", "red", "blue")] == list(ious)
    assert values["mean_iou"] == pytest.approx(np.mean(ious))
    assert values["mean_accuracy"] == pytest.approx((6 / 9 + 4 / 6 + 0) / 3)
    assert values["pixel_accuracy"] == pytest.approx(10 / 17)
    own = [5.0, 2, 3], [7.0, 4, 6], [7, 7, 8]
    low, high = interval_by_group(*map(np.array, own))
    assert (values["pixel_accuracy_low"], values["pixel_accuracy_high"]) == (low, high)


def test_pixels_are_counted_by_part_and_class():
    rng = np.random.default_rng(0)
    classes = rng.choice([0, 1, 2, 3, 255], (2, 3, 36)).astype(np.uint8)
    for background in (True, False):
        found = count_pixels(jnp.asarray(classes), 3, 3 + background, background)
        assert found.shape == (2, 3, 9, 3 + background)
        for b, i, part, c in np.ndindex(*found.shape):
            row, column = 2 * (part // 3), 2 * (part % 3)
            square = classes[b, i].reshape(6, 6)[row : row + 2, column : column + 2]
            assert found[b, i, part, c] == (square == c + (not background)).sum()


def test_confusions_are_those_of_a_loop_over_pixels_and_padding_counts_nowhere():
    task, _, params = train("navit")
    noisy = jax.random.randint(jax.random.key(1), BATCH.patches.shape, 0, 256)
    padding = (BATCH.segment_ids == 0)[..., None]
    patches = jnp.where(padding, noisy.astype(jnp.uint8), BATCH.patches)
    found = jax.jit(task.confusion)(params, BATCH)
    again = jax.jit(task.confusion)(
        params, PackedBatch(**{**vars(BATCH), "patches": patches})
    )
    jax.tree.map(np.testing.assert_array_equal, found, again)
    guesses = np.asarray(task.outputs(params, BATCH)["classes"])
    known = np.asarray(BATCH.targets["pixel_classes"])
    expected = np.zeros((3, 2, SLOTS, 3), int)
    ids = np.asarray(BATCH.segment_ids)
    for b, i, pixel in np.ndindex(*known.shape):
        row, column = divmod(pixel, PATCH)
        guess = guesses[b, i, row // 2 * 2 + column // 2]
        true, slot = known[b, i, pixel], ids[b, i] - 1
        if true < 255:
            expected[0, b, slot, true] += guess == true
            expected[1, b, slot, guess] += 1
            expected[2, b, slot, true] += 1
    for name, value in zip(("hit", "said", "true"), expected, strict=True):
        np.testing.assert_array_equal(found[name], value)
    values = judge(task, params, BATCH)
    hit, said, true = (x.sum((0, 1)) for x in expected)
    assert values["mean_iou"] == pytest.approx(np.mean(hit / (said + true - hit)))
    assert values["pixel_accuracy"] == pytest.approx(hit.sum() / true.sum())
    # The task's own metric has the same sum.
    metric = task.metrics(params, BATCH)["pixel_accuracy"]
    assert metric.total.sum() == hit.sum()
    assert metric.weight.sum() == true.sum()


@pytest.mark.parametrize("name, readout", [("v1", "points"), ("v2", "boxes")])
def test_segmentation_is_isolated(name, readout):
    images = [packed.image(1, (3, 4)), packed.image(2, (5, 2)), packed.image(3, (4, 6))]
    batch = jax.tree.map(jnp.asarray, packed.pack([images[:2], images[2:]]))
    encoder = SparseFormer(f"{name}_micro/2", {**SMALL, "latents": 4})
    task = Segmentation(encoder, 2, cells=1, readout=readout)
    shapes = jax.jit(task.init)(jax.random.key(0), batch)
    leaves, tree = jax.tree.flatten(shapes)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    # With noise boxes move, and a head of zeros says something.
    noisy = [
        x + 0.1 * jax.random.normal(key, x.shape)
        for x, key in zip(leaves, keys, strict=True)
    ]
    params = jax.tree.unflatten(tree, noisy)

    def pooled(batch):
        logits = task.outputs(params, batch)["logits"][..., 0, :]
        return mean_pool(logits, image_masks(batch.segment_ids, packed.N))

    report = check_isolation(pooled, batch, tolerance=1e-4)
    assert (report.images, report.gradients) == (3, 3)


def test_what_is_not_known_or_does_not_fit_is_refused():
    task = Segmentation(ENCODERS["navit"], 2, cells=3)
    with pytest.raises(ConfigError, match="cells=3 does not divide"):
        task.weights(BATCH)
    bare = PackedBatch(**{**vars(BATCH), "targets": {}})
    with pytest.raises(ConfigError, match="pixel_classes=True"):
        task.weights(bare)
    with pytest.raises(ConfigError, match="cells=0"):
        Segmentation(ENCODERS["navit"], 2, cells=0)
    with pytest.raises(ConfigError, match=r"task\.readout='pixels'"):
        Segmentation(ENCODERS["v1"], 2, readout="pixels")
    with pytest.raises(ConfigError, match="4 classes, the model 3"):
        mean_iou.name_classes(("a", "b", "c", "d"), 3)
    with pytest.raises(ConfigError, match=r"255 classes: .* tells 254 apart"):
        Segmentation(ENCODERS["navit"], 255)
    assert mean_iou.name_classes(("a",), 2) == ("background", "a")
    assert mean_iou.name_classes(("a", "b"), 2) == ("a", "b")


def png(values, mode="L"):
    file = io.BytesIO()
    Image.fromarray(np.asarray(values, np.uint8), mode).save(file, "PNG")
    return file.getvalue()


def test_a_mask_says_the_class_of_each_pixel():
    values = [[0, 0, 3], [150, 3, 255]]
    objects = masks.read_mask(png(values), "x")
    assert objects.labels.tolist() == [2, 149, -1]
    whole = (0.0, 0.0, 1.0, 1.0)
    assert draw_classes(objects, (2, 3), whole, False).tolist() == values
    assert draw_classes(objects, (2, 3), whole, True).tolist() == [
        row[::-1] for row in values
    ]
    with pytest.raises(DataError, match="mode RGB"):
        masks.read_mask(png(np.zeros((2, 2, 3)), "RGB"), "x")


@pytest.mark.parametrize("bits", [4, 8])
def test_a_mask_with_a_palette_has_its_numbers_and_not_its_colours(bits):
    values = np.array([[0, 2], [3, 1]], np.uint8)
    image, file = Image.fromarray(values, "P"), io.BytesIO()
    image.putpalette(np.random.default_rng(0).integers(0, 256, 48).tolist())
    image.save(file, "PNG", bits=bits)
    objects = masks.read_mask(file.getvalue(), "x")
    whole = (0.0, 0.0, 1.0, 1.0)
    np.testing.assert_array_equal(draw_classes(objects, (2, 2), whole, False), values)


def test_grey_of_fewer_bits_is_refused_as_it_is_read_stretched():
    data = bytearray(png(np.zeros((1, 4))))
    data[24] = 4  # Bits of the header, and its checksum.
    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    with pytest.raises(DataError, match=r"x has a mask of mode L .L;4.: .* 8 bits"):
        masks.read_mask(bytes(data), "x")


@pytest.mark.parametrize(
    "mask, fits",
    [((96, 64), True), ((48, 32), True), ((64, 96), False), ((64, 64), False)],
)
def test_a_mask_in_another_proportion_than_its_upright_picture_ends_the_run(
    tmp_path, monkeypatch, mask, fits
):
    # 64 x 96 pixels are stored, to be seen turned by a quarter, 96 x 64.
    monkeypatch.setenv("NAVIT_JAX_CACHE", str(tmp_path / "cache"))
    exif = Image.Exif()
    exif[0x0112] = 6
    file, path = io.BytesIO(), tmp_path / "a.array_record"
    Image.new("RGB", (96, 64)).save(file, "JPEG", exif=exif)
    seen = example(jpg=[file.getvalue()], seg=[png(np.full(mask, 2))])
    write_records(path, [seen])
    section = {"name": "array_record", "paths": str(path), "image": "jpg"}
    section |= {"mask": "seg", "num_classes": 2}
    changes = {"sources": {"a": section}, "pixel_classes": True, "rows": 1}
    stream = experiment.build_stream(
        tiny.config(**{f"data__{key}": value for key, value in changes.items()})
    )
    load = functools.partial(next, stream.batches(np.arange(1)))
    if fits:
        batch, _ = load()
        classes = batch.targets["pixel_classes"][batch.segment_ids > 0]
        assert (classes == 2).all()
        return
    wanted = rf"a:.*/0 has a mask of {re.escape(str(mask))} beside .* \(96, 64\) when"
    with pytest.raises(DataError, match=wanted):
        load()


def test_a_mask_of_the_sides_in_the_other_order_is_found_in_a_nearly_square_picture():
    objects = masks.read_mask(png(np.ones((100, 101))), "x")
    check_shape(objects, (100, 101), "x")
    check_shape(objects, (200, 203), "x")
    with pytest.raises(DataError, match="x has a mask"):
        check_shape(objects, (101, 100), "x")
