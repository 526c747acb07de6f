import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from packed import N, image, pack

from navit_jax import isolation
from navit_jax.isolation import IsolationError, check_isolation, find_nonfinite
from navit_jax.models.navit import NaViT
from navit_jax.models.pooling import image_masks, mean_pool

IMAGES = [image(1, (3, 4), 7), image(2, (5, 2)), image(3, (1, 1)), image(4, (2, 6), 8)]
BATCH = pack([IMAGES[:3], IMAGES[3:]])


@functools.cache
def navit(pooling, attention="dense"):
    model = NaViT(
        "Ti/2",
        width=16,
        depth=1,
        num_heads=2,
        mlp=16,
        pooling=pooling,
        attention=attention,
    )
    batch = jax.tree.map(jnp.asarray, BATCH)
    params = jax.jit(model.init)(
        jax.random.key(0), batch.patches, batch.coords, batch.segment_ids, batch.grids
    )

    def apply(batch):
        out = model.apply(
            params, batch.patches, batch.coords, batch.segment_ids, batch.grids
        )
        return out["tokens" if pooling == "none" else "pooled"]

    return apply


def mean(batch):
    """An isolated model: the mean of each image's patches [B N P]."""
    return mean_pool(batch.patches, image_masks(batch.segment_ids, N))


def broken(leak):
    return lambda batch: mean(batch) + 1e-3 * leak(batch)


def leak_of_row(batch):
    return batch.patches.mean(1, keepdims=True)


def leak_of_padding(batch):
    padding = (batch.segment_ids == 0)[..., None]
    return jnp.where(padding, batch.patches, 0).sum(1, keepdims=True)


def leak_across_rows(batch):
    images = (batch.segment_ids > 0)[..., None]
    return jnp.where(images, batch.patches, 0).mean((0, 1), keepdims=True)


def leak_of_grids(batch):
    return batch.grids[:, :1, :1].astype(jnp.float32)


def leak_of_slot(batch):
    return jnp.arange(N)[None, :, None]


def leak_of_offset(batch):
    first = image_masks(batch.segment_ids, N).argmax(-1)
    return first[..., None]


def leak_of_gradient(batch):
    row = batch.patches.mean(1, keepdims=True)
    return row - jax.lax.stop_gradient(row)


@pytest.mark.parametrize("attention", ["dense", "blocks"])
@pytest.mark.parametrize("pooling", ["map", "none"])
def test_navit_is_isolated(pooling, attention):
    report = check_isolation(navit(pooling, attention), BATCH)
    assert (report.images, report.gradients) == (4, 4)
    assert report.changes == 4 + 2
    assert report.alone <= 1e-5


@pytest.mark.parametrize(
    "leak, message",
    [
        (
            leak_of_row,
            r"row 0, slot 1 \(image 2 .* changes with row 0, slot 0 \(image 1",
        ),
        (leak_of_padding, "row 0, slot 0 .* changes with the padding of row 0"),
        (leak_across_rows, "changes with row"),
        (leak_of_grids, "row 0, slot 1 .* changes with row 0, slot 0"),
        (leak_of_slot, "row 0, slot 1 .* differs from itself alone"),
        (leak_of_offset, "row 0, slot 1 .* differs from itself alone"),
        (leak_of_gradient, "gradient of row 0, slot 0 .* reaches row 0, slot 1"),
    ],
)
def test_a_leak_is_found_and_named(leak, message):
    with pytest.raises(IsolationError, match=message):
        check_isolation(broken(leak), BATCH)


def test_a_leak_between_rows_alone_is_found():
    other = broken(lambda batch: jnp.flip(leak_of_row(batch), 0))
    with pytest.raises(IsolationError, match=r"row 1, slot 0 .* changes with row 0"):
        check_isolation(other, BATCH)


def test_pixels_and_tokens_are_checked_too():
    pixels = np.random.default_rng(0).integers(0, 256, BATCH.patches.shape, np.uint8)
    batch = dataclasses.replace(BATCH, patches=pixels)

    def tokens(batch):
        patches = batch.patches
        if patches.dtype == jnp.uint8:
            patches = patches / 127.5 - 1
        return jnp.sin(patches)

    assert check_isolation(tokens, batch).images == 4
    with pytest.raises(IsolationError, match="changes with"):
        check_isolation(lambda b: tokens(b) + leak_of_row(b), batch, gradients=False)


def crop_row(batch, num_tokens, num_slots):
    """The first row alone, with so many tokens and slots."""
    first = jax.tree.map(lambda leaf: leaf[:1], batch)
    tokens = {k: getattr(first, k)[:, :num_tokens] for k in ("patches", "coords")}
    slots = {k: getattr(first, k) for k in ("grids", "image_mask", "image_ids")}
    slots = {
        k: np.pad(v, [(0, 0), (0, num_slots - N), *[(0, 0)] * (v.ndim - 2)])
        for k, v in slots.items()
    }
    segment_ids = first.segment_ids[:, :num_tokens]
    return first.replace(segment_ids=segment_ids, **tokens, **slots)


@pytest.mark.parametrize("pooling", ["map", "none"])
def test_as_many_slots_as_tokens_confuse_nothing(pooling):
    batch = crop_row(BATCH, num_tokens=20, num_slots=20)
    report = check_isolation(navit(pooling), batch)
    assert (report.images, report.changes) == (3, 3 + 1)
    with pytest.raises(IsolationError, match=r"row 0, slot 1 .* changes with row"):
        check_isolation(lambda b: navit(pooling)(b) + leak_of_row(b).mean(), batch)
    spoiled = np.array(batch.patches)
    spoiled[0, 8] = np.nan  # the second image begins at token 7
    spoiled = batch.replace(patches=spoiled)
    if pooling == "map":
        found = find_nonfinite(jax.jit(navit("map")), spoiled)
        np.testing.assert_array_equal(found, [(0, 2)])


def test_a_model_blind_to_its_patches_proves_nothing():
    with pytest.raises(IsolationError, match="nothing is proved"):
        check_isolation(lambda batch: mean(batch) * 0, BATCH)


def test_an_output_that_is_neither_by_slot_nor_by_token_is_refused():
    with pytest.raises(ValueError, match=r"apply gave \(2, 12\)"):
        check_isolation(lambda batch: mean(batch)[:, 0], BATCH)


def spoil(*ids):
    patches = np.array(BATCH.patches)
    for row, slot in np.argwhere(np.isin(BATCH.image_ids[..., 1], ids)):
        patches[row, np.argmax(BATCH.segment_ids[row] == slot + 1), 3] = np.nan
    return dataclasses.replace(BATCH, patches=patches)


@pytest.mark.parametrize("culprits", [(), (2,), (1, 3), (4,), (1, 2, 3, 4)])
def test_the_image_that_spoils_its_row_is_named(culprits):
    batch = spoil(*culprits)
    found = find_nonfinite(jax.jit(navit("map")), batch)
    np.testing.assert_array_equal(found, [(0, id) for id in culprits] or found[:0])
    assert found.shape == (len(culprits), 2)
    if culprits:
        with pytest.raises(IsolationError, match="see find_nonfinite"):
            check_isolation(navit("map"), batch)


def test_images_repacked_alone_keep_their_own_content():
    labels = np.arange(8).reshape(2, N)
    batch = dataclasses.replace(
        BATCH, targets={"labels": labels, "places": BATCH.coords, "step": np.int32(7)}
    )
    seen = []
    for single, members in isolation.alone(batch, [(0, 1), (1, 0), (0, 2)]):
        assert single.patches.shape == batch.patches.shape
        for row, (old, slot) in enumerate(members):
            own = batch.segment_ids[old] == slot + 1
            n = own.sum()
            assert single.segment_ids[row].tolist() == [1] * n + [0] * (32 - n)
            np.testing.assert_array_equal(
                single.patches[row, :n], batch.patches[old, own]
            )
            places = single.targets["places"][row, :n]
            np.testing.assert_array_equal(places, batch.coords[old, own])
            assert single.targets["labels"][row].tolist() == [
                labels[old, slot],
                0,
                0,
                0,
            ]
            assert single.image_mask[row].tolist() == [True, False, False, False]
        assert single.targets["step"] == 7
        assert not single.segment_ids[len(members) :].any()
        seen += members
    assert seen == [(0, 1), (1, 0), (0, 2)]
