import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import packed
import pytest

from navit_jax.tasks import masked_patches
from navit_jax.tasks.randomness import image_keys

RNG = np.random.default_rng(0)
KEY = jax.random.key(3)
ROWS = [
    [packed.image(1, (3, 4)), packed.image(2, (2, 5), kept=7), packed.image(3, (1, 1))],
    [packed.image(4, (5, 4))],
]
BATCH = dataclasses.replace(
    packed.pack(ROWS),
    patches=RNG.integers(0, 256, (2, packed.L, packed.P), np.uint8),
)
KERNEL, BIAS = RNG.standard_normal((packed.P, packed.P)), RNG.standard_normal(packed.P)
PARAMS = {"head": {"dense": {"kernel": jnp.float32(KERNEL), "bias": jnp.float32(BIAS)}}}


class Sums(nn.Module):
    """Each token is the sum of those before it: all that is shown shows later."""

    pixel_mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    pixel_std: tuple[float, ...] = (0.5, 0.5, 0.5)

    def __call__(self, patches, *_):
        return {"tokens": jnp.cumsum(patches, 1)}


TASK = masked_patches.MaskedPatches(Sums(), share=0.5)


def choice(key):
    """[B L] the patches that a key masks; test_masked_patches.py tells of them."""
    batch = jax.tree.map(jnp.asarray, BATCH)
    keys = image_keys(key, batch.image_ids)
    masked = masked_patches.choose_masked(keys, batch.segment_ids, batch.coords, 0.5)
    return np.asarray(masked)


def errors(masked, truth):
    """[B L] the error of each masked patch, seen from those that are not, by a loop."""
    found = np.zeros(masked.shape)
    for b in range(len(masked)):
        total = np.zeros(packed.P)
        for i in range(packed.L):
            if not masked[b, i]:
                total += BATCH.patches[b, i] / 127.5 - 1.0
            predicted = total @ KERNEL + BIAS
            wanted = truth[b, i] / 127.5 - 1.0
            found[b, i] = masked[b, i] * ((predicted - wanted) ** 2).mean()
    return found


@pytest.mark.parametrize("noise", [False, True], ids=["as it is", "noise"])
def test_the_loss_is_of_the_masked_patches_which_no_prediction_has_seen(noise):
    masked = choice(KEY)
    assert masked.sum() == 6 + 4 + 1 + 10
    truth = np.where(
        masked[..., None] & noise,
        RNG.integers(0, 256, BATCH.patches.shape, np.uint8),
        BATCH.patches,
    )
    batch = jax.tree.map(jnp.asarray, dataclasses.replace(BATCH, patches=truth))
    expected = errors(masked, truth).sum() / masked.sum()
    loss, means = TASK.loss(PARAMS, batch, KEY, TASK.weights(batch))
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    np.testing.assert_allclose(means["loss"].result(), expected, rtol=1e-5)
    part, _ = TASK.loss(PARAMS, batch, KEY, {"patches": jnp.float32(100)})
    np.testing.assert_allclose(part, expected * masked.sum() / 100, rtol=1e-5)


def test_evaluation_judges_each_patch_of_one_choice():
    masked = choice(jax.random.key(0))
    judged = TASK.metrics(PARAMS, jax.tree.map(jnp.asarray, BATCH))["loss"]
    np.testing.assert_allclose(judged.total, errors(masked, BATCH.patches), rtol=1e-4)
    np.testing.assert_array_equal(judged.weight, masked)


def test_prediction_sees_every_patch():
    shown = TASK.outputs(PARAMS, jax.tree.map(jnp.asarray, BATCH))["pixels"]
    seen = np.cumsum(BATCH.patches / 127.5 - 1.0, 1)
    np.testing.assert_allclose(shown, seen @ KERNEL + BIAS, rtol=1e-4, atol=1e-4)


def test_an_encoder_sees_pixels_by_its_own_mean_and_deviation_and_gives_them_plainly():
    mean, std = (0.2, 0.4, 0.6), (0.1, 0.2, 0.5)
    task = masked_patches.MaskedPatches(Sums(mean, std), share=0.5)
    batch = jax.tree.map(jnp.asarray, BATCH)
    own = (BATCH.patches.reshape(2, packed.L, -1, 3) / 255 - mean) / std
    own = own.reshape(BATCH.patches.shape)
    shown = task.outputs(PARAMS, batch)["pixels"]
    np.testing.assert_allclose(
        shown, np.cumsum(own, 1) @ KERNEL + BIAS, rtol=1e-4, atol=1e-3
    )
    masked = choice(KEY)
    hidden = np.cumsum(np.where(masked[..., None], 0, own), 1) @ KERNEL + BIAS
    wanted = ((hidden - (BATCH.patches / 127.5 - 1)) ** 2).mean(-1)[masked].mean()
    loss, _ = task.loss(PARAMS, batch, KEY, task.weights(batch))
    np.testing.assert_allclose(loss, wanted, rtol=1e-5)
