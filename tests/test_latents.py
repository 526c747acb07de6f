"""How many latent tokens an image gets, and which entries of the tables."""

import jax
import jax.numpy as jnp
import numpy as np
from packed import N, pack
from small_sparseformer import IMAGES, ONCE, apply, build, start

from navit_jax.models import latents, rois

COUNTS = (4, 1, 2, 6, 9, 12)


def test_tokens_are_counted_by_slot_and_stand_in_its_order():
    out = apply(build("v1", ONCE, capture=True))
    np.testing.assert_array_equal(out["num_latents"], [[4, 4, 4, 0], [4, 0, 0, 0]])
    np.testing.assert_array_equal(
        out["latent_ids"][0], [1] * 4 + [2] * 4 + [3] * 4 + [0] * 4
    )
    assert out["tokens"][0, :12].any(-1).all()
    assert not out["tokens"][0, 12:].any()
    assert not out["pooled"][0, 3].any()


def test_each_token_reads_its_entry_of_the_table_of_its_count():
    table, counts = jax.random.normal(jax.random.key(0), (6, 5)), (6, 2, 12)
    chosen, num = jnp.array([[2, 0, 1]]), jnp.array([[12, 0, 2]])
    ids, inside = latents.place(num, 16)
    assert ids.tolist() == [[1] * 12 + [3] * 2 + [0] * 2]
    found = latents.read_tables(table, counts, chosen, ids, inside)
    for count, slot in ((12, 1), (2, 3)):
        own = rois.resize_table(table, count)
        np.testing.assert_allclose(found[0][ids[0] == slot], own, rtol=1e-6)


def test_by_budget_larger_images_get_more_tokens_and_never_more_than_there_is_room():
    # Of 12 + 10 + 1 patches and 16 - 3 tokens beyond one each: 1 + 6, 1 + 5, 1 + 0.
    num = jnp.array([[12, 10, 1, 0], [24, 0, 0, 0]])
    allowed = (1, 2, 4, 6, 9, 12)
    chosen = latents.allot("budget", allowed, 16, num, None)
    took = jnp.where(num > 0, jnp.array(allowed)[chosen], 0)
    np.testing.assert_array_equal(took, [[6, 6, 1, 0], [12, 0, 0, 0]])
    num = jnp.array([[12, 10, 1, 0], [3, 3, 3, 3]])
    for room in range(4, 30):
        chosen = latents.allot("budget", (1, 2, 4, 9), room, num, None)
        took = jnp.where(num > 0, jnp.array((1, 2, 4, 9))[chosen], 0)
        assert (took.sum(-1) <= room).all()


def test_in_training_the_number_of_tokens_is_drawn_by_the_image_wherever_it_is():
    model = build("v1", ONCE, allot="drawn", counts=COUNTS)
    keys = jax.random.split(jax.random.key(5), (2, N))
    out = apply(model, keys=keys)
    found, pooled = out["num_latents"], out["pooled"]
    assert len(set(found[0, :3].tolist())) > 1
    moved = pack([[IMAGES[2], IMAGES[0]], [IMAGES[1]]])
    moved = jax.tree.map(jnp.asarray, moved)
    other = jax.random.split(jax.random.key(6), (2, N))
    other = other.at[0, 0].set(keys[0, 2]).at[0, 1].set(keys[0, 0])
    again = apply(model, moved, keys=other.at[1, 0].set(keys[0, 1]))
    for (b, n), slot in {(0, 0): 2, (0, 1): 0, (1, 0): 1}.items():
        assert again["num_latents"][b, n] == found[0, slot]
        np.testing.assert_allclose(again["pooled"][b, n], pooled[0, slot], atol=1e-5)

    num, many = jnp.full((50, N), 5), jax.random.split(jax.random.key(7), (50, N))
    chosen = latents.allot("drawn", COUNTS, 48, num, many)
    assert np.bincount(chosen.ravel()).min() > 15, "of 200 / 6"
    assert not latents.allot("drawn", COUNTS, 48, num, None).any(), "the first"


def test_by_budget_an_image_computes_what_it_does_alone_with_as_many_tokens():
    model = build("v1", ONCE, allot="budget", counts=(1, 2, 4, 6, 9, 12), latents=16)
    together = apply(model)
    assert together["num_latents"].tolist() == [[6, 6, 1, 0], [12, 0, 0, 0]]
    for count, slots in ((6, (0, 1)), (1, (2,))):
        alone = pack([[IMAGES[slot]] for slot in slots])
        found = apply(
            build("v1", ONCE, counts=(count,)), jax.tree.map(jnp.asarray, alone)
        )
        assert found["num_latents"][0, 0] == count
        for place, slot in enumerate(slots):
            np.testing.assert_allclose(
                together["pooled"][0, slot], found["pooled"][place, 0], atol=1e-5
            )


def test_a_trained_model_reads_with_9_to_256_tokens():
    # Shares of the room: 9 + 533 times 12 / 23, 10 / 23, 1 / 23, and all of it.
    model = build("v1", ONCE, allot="budget", counts=(9, 49, 256), latents=560)
    model = model.clone(capture=True)
    out, params = apply(model), start(model)["params"]
    assert out["num_latents"].tolist() == [[256, 49, 9, 0], [256, 0, 0, 0]]
    assert jnp.isfinite(out["tokens"]).all()
    for slot, count in enumerate((256, 49, 9)):
        own = out["rois"][0, 0][out["latent_ids"][0] == slot + 1]
        assert len(np.unique(own, axis=0)) == count
    assert params["tables"]["rois"].shape == (4, 4)
