import jax
import jax.numpy as jnp
import numpy as np
import pytest

from navit_jax.models import special_tokens

# Slot 2 (segment 2 of row 0) lost its tokens; row 1 has padding between its images.
IDS = np.array([[1, 1, 1, 3, 3, 0, 0, 0], [1, 0, 2, 2, 2, 2, 2, 3]])
SLOTS = 4


def insert_plainly(tokens, ids, special):
    """A loop over rows and images."""
    B, L, D = tokens.shape
    S = special.shape[-2]
    M = L + SLOTS * S
    special = np.broadcast_to(special, (B, SLOTS, S, D))
    rows, new_ids = np.zeros((B, M, D)), np.zeros((B, M), int)
    index = np.zeros((B, M), int)
    for row in range(B):
        place = 0
        for slot in range(SLOTS):
            owned = np.flatnonzero(ids[row] == slot + 1)
            if len(owned) == 0:
                continue
            both = [*special[row, slot], *tokens[row, owned]]
            end = place + len(both)
            rows[row, place:end], new_ids[row, place:end] = both, slot + 1
            index[row, place:end] = [*range(-S, 0), *owned]
            place = end
    return rows, new_ids, index


@pytest.mark.parametrize("shape", [(3, 4), (2, SLOTS, 3, 4)], ids=["shared", "slots"])
def test_special_tokens_come_before_those_of_each_image_that_has_any(shape):
    tokens = np.asarray(jax.random.normal(jax.random.key(0), (2, 8, 4)))
    special = np.asarray(jax.random.normal(jax.random.key(1), shape))
    expected = insert_plainly(tokens, IDS, special)
    found = jax.jit(special_tokens.insert, static_argnums=3)(
        jnp.array(tokens), jnp.array(IDS), jnp.array(special), SLOTS
    )
    for values, plain in zip(found, expected, strict=True):
        np.testing.assert_array_equal(values, plain.astype(values.dtype))


def test_a_full_row_of_full_slots_has_room_for_every_special_token():
    ids = jnp.array([[1, 2, 3, 4]])
    tokens = jnp.ones((1, 4, 2))
    _, new_ids, _ = special_tokens.insert(tokens, ids, jnp.zeros((2, 2)), 4)
    np.testing.assert_array_equal(new_ids[0], np.repeat([1, 2, 3, 4], 3))


def test_the_gradient_of_a_shared_token_is_the_sum_over_the_images_that_have_it():
    tokens = jnp.zeros((2, 8, 4))
    weights = jax.random.normal(jax.random.key(2), (2, 8 + SLOTS, 4))

    def loss(special):
        rows, *_ = special_tokens.insert(tokens, jnp.array(IDS), special, SLOTS)
        return (rows * weights).sum()

    *_, index = insert_plainly(np.zeros((2, 8, 4)), IDS, np.zeros((1, 4)))
    expected = np.asarray(weights)[index < 0].sum(0, keepdims=True)
    found = jax.grad(loss)(jnp.zeros((1, 4)))
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_remove_undoes_insert():
    tokens = jax.random.normal(jax.random.key(4), (2, 8, 4))
    tokens = jnp.where(jnp.array(IDS)[..., None] > 0, tokens, 0)
    rows, *_ = special_tokens.insert(
        tokens, jnp.array(IDS), jnp.full((3, 4), 9.0), SLOTS
    )
    found = special_tokens.remove(rows, jnp.array(IDS), 3, SLOTS)
    np.testing.assert_array_equal(found, tokens)


def test_first_reads_the_first_token_of_each_image_and_zeros_of_empty_slots():
    tokens = jax.random.normal(jax.random.key(3), (2, 8, 4))
    found = special_tokens.first(tokens, jnp.array(IDS), SLOTS)
    expected = np.zeros((2, SLOTS, 4), np.float32)
    for row, slot, place in [(0, 0, 0), (0, 2, 3), (1, 0, 0), (1, 1, 2), (1, 2, 7)]:
        expected[row, slot] = tokens[row, place]
    np.testing.assert_array_equal(found, expected)
