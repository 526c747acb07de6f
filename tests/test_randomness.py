import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax

from navit_jax import train_state
from navit_jax.batch import PackedBatch
from navit_jax.metrics import Mean
from navit_jax.tasks.randomness import image_keys

IDS = [(source, index) for source in range(3) for index in range(4)]


class Draws:
    """A task that tells what it draws for the image in each slot."""

    def init(self, key, batch):
        return {"w": jnp.ones(())}

    def weights(self, batch):
        return {}

    def loss(self, params, batch, key, weights):
        draw = jax.vmap(jax.vmap(jax.random.bits))(image_keys(key, batch.image_ids))
        means = {"draw": Mean(total=draw, weight=1.0)}
        return params["w"], means

    def outputs(self, params, batch):
        return {}

    def metrics(self, params, batch):
        return {}


def draws(ids, rows=1, seed=0, step=0):
    """The draw of each image in one step, by its id."""
    ids = np.array(ids, np.uint32).reshape(rows, -1, 2)
    B, N, _ = ids.shape
    batch = PackedBatch(
        patches=np.zeros((B, 1, 1), np.uint8),
        coords=np.zeros((B, 1, 2), np.int32),
        segment_ids=np.zeros((B, 1), np.int32),
        grids=np.zeros((B, N, 2), np.int32),
        image_mask=np.ones((B, N), bool),
        image_ids=ids,
        targets={},
    )
    batch, task, tx = jax.tree.map(jnp.asarray, batch), Draws(), optax.sgd(0.1)
    state = train_state.init_state(task, tx, jax.random.key(0), batch)
    state = dataclasses.replace(state, step=jnp.int32(step))
    signals = jnp.zeros((B, 1), jnp.int32)
    _, told = train_state.train_step(state, batch, signals, task=task, tx=tx, seed=seed)
    found = np.asarray(told["means"]["draw"].total)
    return {(*ids[at].tolist(),): int(found[at]) for at in np.ndindex(B, N)}


def test_every_seed_step_source_and_index_has_a_key_of_its_own():
    seen = [
        draw
        for seed in (0, 1)
        for step in (0, 1)
        for draw in draws(IDS, seed=seed, step=step).values()
    ]
    # 48 numbers of 32 bits: two are equal by chance once in four million runs.
    assert len(set(seen)) == 2 * 2 * len(IDS)


def test_an_image_keeps_its_key_in_another_row_and_slot():
    assert draws(IDS) == draws(IDS[::-1], rows=3)
