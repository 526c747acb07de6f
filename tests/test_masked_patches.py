import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import packed

from navit_jax.tasks import masked_patches
from navit_jax.tasks.randomness import image_keys

A = packed.image(1, (3, 4))
B = packed.image(2, (2, 5), kept=7)
C = packed.image(3, (1, 1))


def masks(batch, seed=0, share=0.5):
    """The masked coordinates of each image, by its id."""
    batch = jax.tree.map(jnp.asarray, batch)
    keys = image_keys(jax.random.key(seed), batch.image_ids)
    masked = masked_patches.choose_masked(keys, batch.segment_ids, batch.coords, share)
    assert not (masked & (batch.segment_ids == 0)).any()
    found = {}
    for row, slot in np.argwhere(batch.image_mask):
        mine = masked[row] & (batch.segment_ids[row] == slot + 1)
        coords = batch.coords[row][mine].tolist()
        found[int(batch.image_ids[row, slot, 1])] = {tuple(c) for c in coords}
    return found


def test_a_share_of_each_image_is_masked_and_at_least_one_patch():
    found = masks(packed.pack([[A, B, C]]))
    assert {id: len(coords) for id, coords in found.items()} == {1: 6, 2: 4, 3: 1}


def test_the_choice_goes_with_the_image_and_not_with_its_row_or_slot():
    assert masks(packed.pack([[A, B], [C]])) == masks(packed.pack([[C, B, A]]))
    other = masks(packed.pack([[A, B, C]]), seed=1)
    assert other[1] != masks(packed.pack([[A, B, C]]))[1]


def test_every_patch_is_masked_equally_often():
    counts = np.zeros((3, 4))
    for seed in range(300):
        for coord in masks(packed.pack([[B, A]]), seed, share=0.25)[1]:
            counts[coord] += 1
    # 300 draws of probability 1/4: a standard deviation of 7.5.
    np.testing.assert_allclose(counts, 75, atol=5 * 7.5)


def test_the_weights_count_what_the_loss_will_mask():
    batch = jax.tree.map(jnp.asarray, packed.pack([[A, C], [B]]))
    task = masked_patches.MaskedPatches(encoder=nn.Dense(1), share=0.5)
    assert task.weights(batch)["patches"] == 6 + 4 + 1
