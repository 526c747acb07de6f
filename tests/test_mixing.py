"""Mixup, CutMix and erasing against loops over single images."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from navit_jax import experiment
from navit_jax.data import patches as patches_lib
from navit_jax.errors import ConfigError
from navit_jax.models import mixing
from navit_jax.tasks.randomness import image_keys

PATCH = 4


def pictures(seed=0, grids=((2, 3), (2, 3), (3, 1), (2, 3), (2, 3))):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 256, (h * PATCH, w * PATCH, 3), np.uint8) for h, w in grids]


def row(images, length=36, slots=6):
    """Arrays of one row, with padding at its end and an empty slot."""
    patches = np.full((1, length, 3 * PATCH**2), 7, np.uint8)
    coords = np.zeros((1, length, 2), np.int32)
    segment_ids = np.zeros((1, length), np.int32)
    grids = np.zeros((1, slots, 2), np.int32)
    start = 0
    for i, image in enumerate(images):
        content, places = patches_lib.patchify(image, PATCH)
        stop = start + len(content)
        patches[0, start:stop], coords[0, start:stop] = content, places
        segment_ids[0, start:stop] = i + 1
        grids[0, i] = image.shape[0] // PATCH, image.shape[1] // PATCH
        start = stop
    ids = np.stack([np.zeros((1, slots)), np.arange(slots)[None]], -1)
    keys = image_keys(jax.random.key(5), jnp.asarray(ids, jnp.uint32))
    return *map(jnp.asarray, (patches, coords, segment_ids, grids)), keys


def unpack(patches, arrays, count):
    _, coords, segment_ids, grids, _ = map(np.asarray, arrays[:4] + (None,))
    found = []
    for i in range(count):
        mine = segment_ids[0] == i + 1
        grid = tuple(grids[0, i].tolist())
        own = np.asarray(patches)[0][mine]
        found.append(patches_lib.unpatchify(own, coords[0][mine], grid, PATCH))
    return found


def test_rows_of_one_slot_have_nobody_to_mix_with():
    arrays = row(pictures()[:1], slots=1)
    with pytest.raises(ConfigError, match=r"data\.slots=1: mixup and CutMix mix"):
        mixing.mix(*arrays, 0.8, 0.0)


def test_mixup_blends_images_of_one_grid_by_their_share_and_leaves_the_others():
    images = pictures()
    arrays = row(images)
    mixed, partner, share = mixing.mix(*arrays, 0.8, 0.0)
    found = unpack(mixed, arrays, 5)
    assert partner[0, :5].tolist() == [4, 3, 2, 1, 0]
    for i, image in enumerate(images):
        if i == 2:  # Its own partner.
            assert share[0, i] == 1
            np.testing.assert_array_equal(found[i], image)
            continue
        s = float(share[0, i])
        assert 0 <= s <= 1
        expected = s * image.astype(float) + (1 - s) * images[4 - i].astype(float)
        assert np.abs(found[i] - expected).max() <= 0.51
    np.testing.assert_array_equal(mixed[0, 27:], arrays[0][0, 27:])


def test_another_grid_or_a_dropped_patch_is_not_mixed():
    grids = ((2, 3), (1, 3), (2, 3), (2, 3))
    images = pictures(1, grids)
    arrays = row(images)
    _, alike = mixing.choose_partners(arrays[2], arrays[3])
    # 0 with 3, and 1 with 2, which is of another grid.
    assert alike[0].tolist() == [True, False, False, True, False, False]
    short = arrays[2].at[0, 20].set(0)
    _, alike = mixing.choose_partners(short, arrays[3])
    assert not alike.any()


def test_cutmix_takes_one_box_of_the_partner_and_counts_its_pixels():
    images = pictures()
    arrays = row(images)
    sizes = []
    for seed in range(12):
        keys = jax.random.split(jax.random.key(seed), arrays[4].shape)
        mixed, _, share = mixing.mix(*arrays[:4], keys, 0.0, 1.0)
        found = unpack(mixed, arrays, 5)
        for i in (0, 1, 3, 4):
            own, other = images[i], images[4 - i]
            taken = (found[i] == other).all(-1) & (own != other).any(-1)
            kept = (found[i] == own).all(-1)
            assert (taken | kept).all()
            ys, xs = np.nonzero(taken)
            if len(ys):
                box = taken[ys.min() : ys.max() + 1, xs.min() : xs.max() + 1]
                assert box.all()
            np.testing.assert_allclose(share[0, i], 1 - taken.mean(), atol=1e-6)
            sizes.append(taken.mean())
    # Beta(1, 1) gives 1/2 on average before boxes are cut at the edges.
    assert 0.15 < np.mean(sizes) < 0.5
    assert np.ptp(sizes) > 0.5


def test_erasing_fills_a_box_of_some_images_with_noise():
    images = pictures(3, ((5, 5),) * 40)
    arrays = row(images, 1000, 40)
    found = unpack(mixing.erase(*arrays, 0.25), arrays, 40)
    shares = []
    for before, after in zip(images, found, strict=True):
        changed = (before != after).any(-1)
        if changed.any():
            ys, xs = np.nonzero(changed)
            box = changed[ys.min() : ys.max() + 1, xs.min() : xs.max() + 1]
            # Noise is now and then what was there.
            assert box.mean() > 0.98
            shares.append(changed.mean())
    # 40 draws of rate 1/4: a standard deviation of 2.7.
    assert 3 <= len(shares) <= 18
    assert max(shares) < 0.4
    none = mixing.erase(*arrays, 0.0)
    np.testing.assert_array_equal(none, arrays[0])


SIDE, ROWS, SLOTS = 20, 300, 8


def squares(seed, values):
    """Rows of images of one large patch each, of one value; and keys."""
    shape = ROWS, SLOTS
    patches = np.broadcast_to(np.uint8(values)[..., None], (*shape, 3 * SIDE**2))
    ids = np.broadcast_to(np.arange(1, SLOTS + 1, dtype=np.int32), shape)
    arrays = patches, np.zeros((*shape, 2), np.int32), ids, np.ones((*shape, 2), int)
    return *map(jnp.asarray, arrays), jax.random.split(jax.random.key(seed), shape)


def pixels(patches):
    """[images, SIDE, SIDE, 3]."""
    return np.asarray(patches).reshape(-1, SIDE, SIDE, 3)


def measure(hit):
    """What is known of boxes [M SIDE SIDE], those that hold a pixel: by name [M]."""
    hit = hit[hit.any((1, 2))]
    found = {"area": hit.mean((1, 2))}
    for name, axis in (("height", 2), ("width", 1)):
        line = hit.any(axis)
        found[name] = line.mean(1)
        found[f"{name} before"] = line.argmax(1)
    return found | {"aspect": np.log(found["height"] / found["width"])}


def draw_boxes(corners, ends):
    """The pixels [M SIDE SIDE] whose centres are in boxes of fractions [M 2]."""
    centres = (np.arange(SIDE) + 0.5) / SIDE
    hit = (centres >= corners[..., None]) & (centres < ends[..., None])
    return hit[:, 0, :, None] & hit[:, 1, None, :]


def assert_one_law(found, expected, name=""):
    """Kolmogorov's distance of two samples, at a level of .001."""
    ordered = np.sort(found), np.sort(expected)
    places = np.concatenate(ordered)
    a, b = (np.searchsorted(x, places, "right") / len(x) for x in ordered)
    limit = 1.95 * (1 / len(found) + 1 / len(expected)) ** 0.5
    assert np.abs(a - b).max() < limit, name


def test_each_image_takes_mixup_or_cutmix_by_a_fair_coin_and_its_share_from_a_beta():
    """Against numpy's draws; of Beta(a, a) only a = 1 is uniform."""
    mixup, cutmix = 0.8, 0.4
    values = np.where(np.arange(SLOTS) < SLOTS // 2, 0, 200)
    arrays = squares(0, np.broadcast_to(values, (ROWS, SLOTS)))
    mixed, _, share = jax.jit(mixing.mix, static_argnums=(5, 6))(*arrays, mixup, cutmix)
    share, found = np.ravel(share), pixels(mixed)
    own = np.tile(values, ROWS)
    other = found[..., 0] != own[:, None, None]
    # Pixels of both; or a box that holds the centre of none.
    cut = (np.ptp(found, (1, 2, 3)) == 200) | (share == 1)
    assert abs(cut.mean() - 0.5) < 4 * 0.5 / len(cut) ** 0.5

    rng, num = np.random.default_rng(0), 20_000
    assert_one_law(share[~cut], rng.beta(mixup, mixup, num))
    # The variance tells .8 from 1 (1 / 12) more sharply: 1 / (4 (2 a + 1)).
    assert abs(share[~cut].var() - 1 / (4 * (2 * mixup + 1))) < 0.006
    half = np.sqrt(1 - rng.beta(cutmix, cutmix, num))[:, None] / 2
    centre = rng.random((num, 2))
    boxes = draw_boxes(centre - half, centre + half)
    assert_one_law(1 - share[cut], boxes.mean((1, 2)))
    expected = measure(boxes)
    for name, each in measure(other[cut]).items():
        assert_one_law(each, expected[name], name)


def test_what_is_erased_has_the_area_the_aspect_and_the_noise_of_the_recipe():
    """Random erasing as published: area .02 to 1/3, aspect .3 to 1/.3; timm's noise."""
    arrays = squares(1, np.zeros((ROWS, SLOTS)))
    found = pixels(jax.jit(mixing.erase, static_argnums=5)(*arrays, 0.5))
    # At random a pixel of noise is black in all three channels: .02^3.
    hit = found.any(-1)
    erased = hit.any((1, 2))
    assert abs(erased.mean() - 0.5) < 4 * 0.5 / len(hit) ** 0.5

    rng, num = np.random.default_rng(0), 20_000
    share = rng.uniform(0.02, 1 / 3, (num, 1))
    stretch = np.exp(rng.uniform(np.log(0.3), -np.log(0.3), (num, 1)))
    extent = np.minimum(np.sqrt(share * np.concatenate([stretch, 1 / stretch], 1)), 1)
    corner = rng.random((num, 2)) * (1 - extent)
    expected = measure(draw_boxes(corner, corner + extent))
    for name, each in measure(hit).items():
        assert_one_law(each, expected[name], name)

    noise = found[hit].astype(float)
    drawn = np.rint(rng.normal(116, 57, noise.shape)).clip(0, 255)
    assert_one_law(noise.ravel(), drawn.ravel())
    # Drawn anew for each channel, for each pixel and for each image.
    assert np.abs(np.corrcoef(noise.T) - np.eye(3)).max() < 0.02
    middle = found[hit[:, 8:12, 8:12].all((1, 2)), 8:12, 8:12].reshape(-1, 48)
    for values in (middle, middle.T):
        assert values.mean(0).std() < 1.3 * 57 / len(values) ** 0.5


def test_draws_go_with_the_image_and_not_with_its_place():
    images = pictures(4, ((3, 3),) * 4)
    arrays = row(images)
    turned = row(images[::-1])
    keys = arrays[4]
    moved = keys.at[0, :4].set(keys[0, :4][::-1])
    a = unpack(mixing.erase(*arrays[:4], keys, 1.0), arrays, 4)
    b = unpack(mixing.erase(*turned[:4], moved, 1.0), turned, 4)
    for one, other in zip(a, b[::-1], strict=True):
        np.testing.assert_array_equal(one, other)


def test_the_loss_of_a_mixed_batch_is_that_of_mixed_targets():
    changed = tiny.config(
        task={"name": "classification", "loss_name": "softmax", "mixup": 0.8,
              "cutmix": 1.0, "label_smoothing": 0.1},
        data__resolution={"name": "fixed", "side": 32},
        data__square=True,
    )  # fmt: skip
    stream = experiment.build_stream(changed)
    task = experiment.build_task(changed, stream.num_classes)
    batch, _ = next(stream.batches(np.arange(8)))
    batch = jax.tree.map(jnp.asarray, batch)
    params = task.init(jax.random.key(0), batch)
    head = params["head"]["dense"]["kernel"]
    noise = jax.random.normal(jax.random.key(1), head.shape)
    params = {**params, "head": {"dense": {"kernel": noise, "bias": noise[0]}}}
    key = jax.random.key(2)
    found, _ = task.loss(params, batch, key, task.weights(batch))

    row = batch.coords, batch.segment_ids, batch.grids
    keys = image_keys(key, batch.image_ids)
    mixed, partner, share = mixing.mix(batch.patches, *row, keys, 0.8, 1.0)
    assert (share < 1).any()
    out = task.outputs(params, dataclasses.replace(batch, patches=mixed))
    log = np.asarray(jax.nn.log_softmax(out["logits"].astype(jnp.float32)))
    labels, total = np.asarray(batch.targets["labels"]), []
    for b, i in zip(*np.nonzero(batch.image_mask), strict=True):
        target = np.zeros(8)
        for slot, weight in ((i, share[b, i]), (partner[b, i], 1 - share[b, i])):
            own = [c for c in labels[b, slot] if c >= 0]
            target[own] += float(weight) / len(own)
        total.append(-((0.9 * target + 0.1 / 8) * log[b, i]).sum())
    np.testing.assert_allclose(found, np.mean(total), rtol=1e-4)


def test_nothing_is_mixed_in_evaluation_and_bad_rates_are_refused():
    changed = tiny.config(task__mixup=0.8, task__erase=1.0)
    plain = tiny.config()
    stream = experiment.build_stream(plain)
    batch, _ = next(stream.batches(np.arange(8)))
    batch = jax.tree.map(jnp.asarray, batch)
    a, b = (experiment.build_task(c, 8) for c in (changed, plain))
    params = a.init(jax.random.key(0), batch)
    np.testing.assert_array_equal(
        a.outputs(params, batch)["logits"], b.outputs(params, batch)["logits"]
    )
    with pytest.raises(ConfigError, match="erase=2"):
        experiment.build_task(tiny.config(task__erase=2), 8)
