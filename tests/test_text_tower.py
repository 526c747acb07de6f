import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from captioned import LENGTH, VOCABULARY, caption, pack_texts
from jax.sharding import NamedSharding, PartitionSpec

from navit_jax import hlo, sharding
from navit_jax.errors import ConfigError
from navit_jax.models.text import TextTower, look_up

HEADS, WIDTH, N = 2, 16, 4
# One of a token, a slot without a text, a full row, an empty one; equal texts.
ROWS = [
    [caption(1, 5), None, caption(2, 1), caption(3, 7)],
    [caption(4, 7), caption(5, 6), caption(6, 7)],
    [],
    [caption(1, 5), caption(1, 5)],
]


def tower(**arguments):
    arguments = {"pooling": "map", "attention": "dense", **arguments}
    shape = {"width": WIDTH, "depth": 2, "num_heads": HEADS, "mlp": 24}
    return TextTower(VOCABULARY, LENGTH, "Ti", **shape, **arguments)


def fields(leaves):
    return leaves["text_tokens"], leaves["text_coords"], leaves["text_segment_ids"], N


def random_params(model):
    """Parameters of the right shapes, none of them 0 or 1."""
    init = functools.partial(model.init, num_slots=N)
    shapes = jax.eval_shape(init, jax.random.key(0), *fields(pack_texts(ROWS))[:3])
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda s: jnp.asarray(0.3 * rng.standard_normal(s.shape), "float32"),
        shapes["params"],
    )


def encode(model, leaves, params=None, keys=None):
    params = random_params(model) if params is None else params
    run = jax.jit(lambda p, *x: model.apply({"params": p}, *x, N, keys))
    with jax.default_matmul_precision("highest"):
        return jax.tree.map(np.asarray, run(params, *fields(leaves)[:3]))


def alone(model, params, ids):
    """The text as an image of one patch a token, whose pixels say which token it is."""
    params = jax.tree.map(np.float64, params)
    params["patch_embedding"] = {"kernel": params["token_embedding"]["embedding"]}
    return oracle.forward(
        params,
        np.eye(VOCABULARY)[ids],
        np.arange(len(ids))[:, None],
        (len(ids),),
        num_heads=HEADS,
        positions={"name": "factorized", "length": LENGTH},
        pooling=model.pooling,
    )


def assert_close(actual, expected):
    # The tolerance of the promise: float32 against float64.
    np.testing.assert_allclose(
        actual, expected, rtol=0, atol=1e-5 * abs(expected).max()
    )


@pytest.mark.parametrize(
    "arguments",
    [{}, {"pooling": "mean"}, {"attention": "blocks"}, {"qk_norm": False}],
    ids=lambda arguments: "-".join(map(str, arguments.values())),
)
def test_packed_texts_are_what_each_is_alone(arguments):
    model = tower(**arguments)
    params, leaves = random_params(model), pack_texts(ROWS)
    out = encode(model, leaves, params)
    for row, captions in enumerate(ROWS):
        for slot in range(N):
            own = leaves["text_segment_ids"][row] == slot + 1
            ids = captions[slot] if slot < len(captions) else None
            if ids is None:
                assert not own.any()
                assert not out["pooled"][row, slot].any()
                continue
            tokens, pooled = alone(model, params, ids)
            assert_close(out["tokens"][row, own], tokens)
            assert_close(out["pooled"][row, slot], pooled)
    assert not out["tokens"][leaves["text_segment_ids"] == 0].any()


def test_a_causal_tower_sees_what_is_before_a_token_and_gives_the_last_one():
    model = tower(pooling="last", causal=True, attention="auto")
    params, leaves = random_params(model), pack_texts(ROWS)
    out = encode(model, leaves, params)
    for row, captions in enumerate(ROWS):
        for slot, ids in enumerate(captions):
            if ids is None:
                assert not out["pooled"][row, slot].any()
                continue
            (own,) = np.nonzero(leaves["text_segment_ids"][row] == slot + 1)
            # A token is what it is at the end of a text that is cut there, and alone.
            for end in sorted({1, len(ids) // 2 + 1, len(ids)}):
                cut = pack_texts([[ids[:end]], [], [], []])
                last = encode(model, cut, params)["pooled"][0, 0]
                assert_close(out["tokens"][row, own[end - 1]], last)
            assert_close(out["pooled"][row, slot], last)


def test_another_text_beside_it_and_other_padding_change_no_bit_of_a_text():
    model, leaves = tower(attention="blocks"), pack_texts(ROWS)
    before = encode(model, leaves)
    others = leaves["text_segment_ids"] != 3
    changed = leaves | {
        "text_tokens": np.where(others, 3, leaves["text_tokens"]),
        "text_coords": np.where(others[..., None], 2, leaves["text_coords"]),
    }
    after = encode(model, changed)
    np.testing.assert_array_equal(after["pooled"][:, 2], before["pooled"][:, 2])
    assert (after["pooled"][0, 0] != before["pooled"][0, 0]).any()
    # What stands at padding need not even be in the vocabulary.
    padding = leaves["text_segment_ids"] == 0
    beyond = np.where(padding, VOCABULARY + 5, leaves["text_tokens"])
    after = encode(model, leaves | {"text_tokens": beyond})
    np.testing.assert_array_equal(after["pooled"], before["pooled"])


def test_the_gradient_of_a_text_reaches_its_own_tokens_and_places_alone():
    model = tower()
    params = random_params(model)
    ids = [np.array(ids) for ids in ([1, 2, 3], [4, 5, 6, 7, 8], [9, 10])]
    leaves = jax.tree.map(jnp.asarray, pack_texts([ids, [], [], []]))

    def pulled(params, slot):
        pooled = model.apply({"params": params}, *fields(leaves))["pooled"]
        return (pooled[0, slot] * jnp.arange(WIDTH)).sum()

    gradient = jax.jit(jax.grad(pulled))
    before = gradient(params, 0)
    # What stands at padding need not even be in the vocabulary.
    padding = leaves["text_segment_ids"] == 0
    beyond = jnp.where(padding, VOCABULARY + 5, leaves["text_tokens"])
    leaves["text_tokens"] = beyond
    again = jax.jit(jax.grad(pulled))(params, 0)
    jax.tree.map(np.testing.assert_array_equal, again, before)
    for slot, own in enumerate(ids):
        found = gradient(params, slot)
        touched = np.asarray(found["token_embedding"]["embedding"]).any(1)
        np.testing.assert_array_equal(np.flatnonzero(touched), own)
        places = np.asarray(found["position_embedding"]["tables"])[0].any(1)
        np.testing.assert_array_equal(np.flatnonzero(places), range(len(own)))


def test_an_id_that_is_not_in_the_vocabulary_is_not_hidden():
    tokens = np.array([[1, VOCABULARY]], np.int32)
    leaves = pack_texts([[tokens[0]], [], [], []])
    pooled = encode(tower(), leaves)["pooled"]
    assert np.isnan(pooled[0, 0]).all()
    assert np.isfinite(pooled[1:]).all()


def test_what_is_dropped_goes_with_the_key_of_the_slot_and_not_with_its_place():
    model = tower(drop_path=0.5, dropout=0.3)
    params = random_params(model)
    keys = jax.random.split(jax.random.key(5), (4, N))
    ids = caption(3, 7)
    here = encode(model, pack_texts([[ids], [], [], []]), params, keys)["pooled"]
    moved = keys.at[2, 3].set(keys[0, 0])
    row = [caption(1, 5), None, None, ids]
    there = encode(model, pack_texts([[], [], row, []]), params, moved)["pooled"]
    assert_close(there[2, 3], here[0, 0])
    still = encode(model, pack_texts([[ids], [], [], []]), params)["pooled"]
    assert np.abs(still[0, 0] - here[0, 0]).max() > 0.01


def test_half_precision_stays_near_the_full_one():
    leaves = pack_texts(ROWS)
    whole = encode(tower(), leaves)["pooled"]
    half = encode(tower(dtype="bfloat16"), leaves)["pooled"]
    assert half.dtype == jnp.bfloat16
    error = np.abs(half.astype(np.float32) - whole).max()
    assert error <= 0.05 * np.abs(whole).max()


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"size": "B/16"}, "task.text.size='B/16'.*Known: B, H"),
        ({"num_heads": 7}, "task.text.num_heads=7: the width 16"),
        ({"pooling": "none"}, "task.text.pooling='none': use 'map', 'mean'"),
        ({"pooling": "max"}, "task.text.pooling='max'"),
        ({"dtype": "float16"}, "task.text.dtype='float16'"),
        ({"remat": "some"}, "task.text.remat='some'"),
    ],
)
def test_what_a_config_gets_wrong_is_named(arguments, message):
    model = tower().copy(**arguments)
    with pytest.raises(ConfigError, match=message):
        encode(model, pack_texts(ROWS))


@pytest.mark.parametrize("size", [40, 20_000])
def test_of_the_tokens_of_other_devices_only_the_gradient_of_the_table_is_sent(size):
    mesh = sharding.make_mesh(replica=2, fsdp=4)

    def placed(kind, shape, *axes):
        where = NamedSharding(mesh, PartitionSpec(*axes))
        return jax.ShapeDtypeStruct(shape, kind, sharding=where)

    table = placed(np.float32, (size, WIDTH), None, "fsdp")
    tokens = placed(np.int32, (128, 24), sharding.ROWS)
    pull = placed(np.float32, (128, 24, WIDTH), sharding.ROWS)
    gradient = jax.grad(lambda table, *x: (look_up(table, x[0]) * x[1]).sum())
    with jax.set_mesh(mesh):
        run = jax.jit(gradient, out_shardings=table.sharding)
        program = run.lower(table, tokens, pull).compile()
    found = hlo.read(program.as_text())
    assert {one.kind for one in found} <= {"all-reduce", "reduce-scatter"}
    assert max(one.size for one in found) <= 4 * size * WIDTH
