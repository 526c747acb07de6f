import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from navit_jax import optim, paths
from navit_jax.errors import ConfigError
from navit_jax.schedules import SCHEDULES

CONSTANT = {"name": "constant"}


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def make_params(seed=0):
    return {
        "encoder": {
            "embed": {"kernel": normal(seed, 3, 4), "bias": normal(seed + 1, 4)},
            "blocks": {"up": {"kernel": normal(seed + 2, 2, 4, 5)}},
        },
        "head": {"kernel": normal(seed + 3, 4, 3), "bias": normal(seed + 4, 3)},
    }


def run(section, params, grads, steps=100):
    """Parameters after each of some steps."""
    tx, _ = optim.build(section, steps, params)
    state, history = tx.init(params), []
    update = jax.jit(tx.update)
    for g in grads:
        updates, state = update(g, state, params)
        params = optax.apply_updates(params, updates)
        history.append(params)
    return history, state


def expected_rate(name, t, S, W, C, timescale):
    if t < W:
        law = t / W
    elif name == "reciprocal_sqrt":
        law = 1 / np.sqrt(1 + (t - W) / timescale)
    elif name == "cosine":
        law = (1 + np.cos(np.pi * (t - W) / (S - W))) / 2
    else:
        law = 1.0
    return 3e-3 * law * (min(1, (S - t) / C) if C else 1)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize(
    "warmup, W",
    [(0, 0), (20, 20), (0.1, 20), (20.0, 20)],
    ids=["none", "steps", "share", "steps in place of a share"],
)
@pytest.mark.parametrize("cooldown, C", [(0, 0), (50, 50), (0.25, 50)])
def test_a_schedule_follows_its_formula(name, warmup, W, cooldown, C):
    S = 200
    options = {"timescale": 30} if name == "reciprocal_sqrt" else {}
    rate = SCHEDULES[name](3e-3, S, warmup=warmup, cooldown=cooldown, **options)
    t = np.arange(S + 1)
    expected = [expected_rate(name, i, S, W, C, 30) for i in t]
    np.testing.assert_allclose(jax.vmap(rate)(t), expected, rtol=2e-5, atol=1e-9)


@pytest.mark.parametrize(
    "schedule, match",
    [
        (
            {"warmup": 60, "cooldown": 0.5},
            r"60 \+ 50 steps, more than config.steps=100",
        ),
        ({"warmup": 1.0}, "warmup=1.0: give a share"),
        ({"warmup": 20.5}, "warmup=20.5: give a share"),
        ({"warmup": float("inf")}, "warmup=inf: give a share"),
        ({"cooldown": -1}, "cooldown=-1 is negative"),
        ({"warm": 1}, "optim.schedule.warm is unknown; did you mean 'warmup'"),
    ],
)
def test_an_impossible_schedule_is_refused(schedule, match):
    section = {"name": "adamw", "lr": 1.0, "schedule": {"name": "constant"} | schedule}
    with pytest.raises(ConfigError, match=match):
        optim.build(section, 100, make_params())


def test_adamw_with_decay_and_multipliers_follows_the_formula():
    section = {
        "name": "adamw", "b1": 0.8, "b2": 0.95, "eps": 1e-6, "clip": 0.5, "lr": 0.1,
        "weight_decay": 0.02, "schedule": {"name": "cosine", "warmup": 2},
        "decay": (("head/kernel", 100.0), (r"(.*/)?kernel", 1.0)),
        "lr_multipliers": (("encoder/embed/.*", 0.1),),
    }  # fmt: skip
    params = make_params()
    grads = [make_params(seed) for seed in (10, 20, 30)]
    history, _ = run(section, params, grads, steps=10)
    decay = {"head/kernel": 100, "encoder/embed/kernel": 1}
    decay["encoder/blocks/up/kernel"] = 1
    p = {k: v.astype(np.float64) for k, v in paths.flatten(params).items()}
    m = {k: np.zeros_like(v) for k, v in p.items()}
    v = {k: np.zeros_like(v) for k, v in p.items()}
    for t, gradient in enumerate(grads):
        g = {k: x.astype(np.float64) for k, x in paths.flatten(gradient).items()}
        norm = np.sqrt(sum((x**2).sum() for x in g.values()))
        rate = expected_rate("cosine", t, 10, 2, 0, 1) / 3e-3 * 0.1
        for k in p:
            x = g[k] * min(1, 0.5 / norm)
            m[k] = 0.8 * m[k] + 0.2 * x
            v[k] = 0.95 * v[k] + 0.05 * x**2
            step = m[k] / (1 - 0.8 ** (t + 1))
            step /= np.sqrt(v[k] / (1 - 0.95 ** (t + 1))) + 1e-6
            factor = 0.1 if k.startswith("encoder/embed") else 1
            p[k] = p[k] - rate * (factor * step + 0.02 * decay.get(k, 0) * p[k])
        for k, value in paths.flatten(history[t]).items():
            np.testing.assert_allclose(value, p[k], rtol=2e-4, atol=1e-6, err_msg=k)


def adafactor_step(g, t, state, factored):
    """One step of the modified Adafactor in float64, for one matrix of one layer."""
    g = g.astype(np.float64)
    beta = min(0.999, 1 - t**-0.8)
    square = g**2 + 1e-30
    if factored:
        rows, columns = state.setdefault("v", [0, 0])
        rows = beta * rows + (1 - beta) * square.mean(1)
        columns = beta * columns + (1 - beta) * square.mean(0)
        state["v"] = [rows, columns]
        second = np.outer(rows, columns) / rows.mean()
    else:
        second = beta * state.get("v", 0) + (1 - beta) * square
        state["v"] = second
    state["m"] = 0.9 * state.get("m", 0) + 0.1 * g / np.sqrt(second)
    return state["m"]


@pytest.mark.parametrize("t", [1, 30_000])
def test_adafactor_follows_the_formula_for_each_scanned_layer_alone(t):
    params = {
        "matrix": {"kernel": normal(0, 33, 40)},
        "blocks": {"kernel": normal(1, 40, 44, 48), "bias": normal(2, 40, 48)},
    }
    tx = optim.adafactor(mu_dtype="float32")
    state = tx.init(params)
    # The cap of beta2 shows only late: 1 - t^-0.8 reaches 0.999 at t = 5624.
    state = jax.tree_util.tree_map_with_path(
        lambda path, x: x + (t - 1) if paths.name(path).endswith("count") else x, state
    )
    expected_state = {}
    for i in range(2):
        grads = jax.tree.map(lambda p, i=i: normal(i + 5, *p.shape), params)
        updates, state = tx.update(grads, state, params)
        for name, g in paths.flatten(grads).items():
            layers = g if "blocks" in name else g[None]
            got = np.asarray(paths.flatten(updates)[name]).reshape(layers.shape)
            for layer in range(len(layers)):
                own = expected_state.setdefault((name, layer), {})
                if t > 1 and not own:
                    zero = np.zeros(layers[layer].shape)
                    own["v"] = zero if zero.ndim == 1 else [zero[:, 0], zero[0]]
                step = adafactor_step(layers[layer], t + i, own, "kernel" in name)
                np.testing.assert_allclose(got[layer], step, rtol=1e-4, atol=1e-5)


def test_adafactor_keeps_a_small_state_and_rounds_its_first_moment():
    grads = [{"kernel": normal(i, 64, 96)} for i in range(3)]
    updates = []
    for tx in (optim.adafactor(), optim.adafactor(mu_dtype="float32")):
        state = tx.init(grads[0])
        for g in grads:
            update, state = tx.update(g, state, g)
        updates.append(update["kernel"])
        sizes = [x.nbytes for x in jax.tree.leaves(state)]
    np.testing.assert_allclose(*updates, rtol=0.01, atol=0.01)
    assert not np.array_equal(*updates)
    small = jax.tree.leaves(optim.adafactor().init(grads[0]))
    assert sum(x.nbytes for x in small) < 64 * 96 * 2 + 4 * (64 + 96) + 100
    assert sum(sizes) > 64 * 96 * 4


def test_mu_dtype_is_that_of_the_first_moment():
    section = {"name": "adamw", "mu_dtype": "bfloat16", "lr": 1.0, "schedule": CONSTANT}
    tx, _ = optim.build(section, 10, make_params())
    dtypes = {x.dtype for n, x in paths.flatten(tx.init(make_params())).items()
              if "/mu/" in n}  # fmt: skip
    assert dtypes == {jnp.dtype("bfloat16")}


@pytest.mark.parametrize("name", optim.OPTIMIZERS)
def test_frozen_parameters_stay_equal_to_the_bit_and_have_no_state(name):
    params = make_params()
    params["encoder"]["embed"]["bias"] = np.array([-0.0, 0.0, 1e-37, 3], np.float32)
    section = {
        "name": name, "lr": 0.1, "schedule": CONSTANT, "weight_decay": 0.1,
        "freeze": (("encoder/blocks/.*", False), ("encoder/.*", True)),
    }  # fmt: skip
    history, state = run(section, params, [make_params(9)] * 3)
    before, after = paths.flatten(params), paths.flatten(history[-1])
    for path in before:
        same = before[path].tobytes() == np.asarray(after[path]).tobytes()
        assert same == path.startswith("encoder/embed"), path
    assert not [path for path in paths.flatten(state) if "embed" in path]
    assert [path for path in paths.flatten(state) if "blocks" in path]


@pytest.mark.parametrize("name", optim.OPTIMIZERS)
@pytest.mark.parametrize("layers", ["1:-1", ":3", "-1:"])
def test_a_stack_that_is_frozen_in_part_is_tuned_as_its_other_layers_alone(
    name, layers
):
    stop = np.arange(5)[slice(*(int(n) if n else None for n in layers.split(":")))]
    tuned = np.setdiff1d(np.arange(5), stop)
    stack = {"kernel": normal(2, 5, 33, 34), "bias": normal(3, 5, 34)}
    stack["bias"][:, 0] = -0.0
    slopes = [
        {"kernel": normal(i, 5, 33, 34), "bias": normal(i, 5, 34)} for i in (8, 9)
    ]
    for slope in slopes:
        for each in slope.values():
            each[stop] = 0  # as `stop_frozen` leaves them
    section = {"name": name, "lr": 0.1, "schedule": CONSTANT, "weight_decay": 0.1}
    some = section | {"freeze": ((r"blocks/.*", layers),)}
    history, state = run(some, {"blocks": stack}, [{"blocks": s} for s in slopes])
    own = jax.tree.map(lambda x: x[tuned], [stack, *slopes])
    alone, expected = run(section, {"blocks": own[0]}, [{"blocks": s} for s in own[1:]])
    for path, found in history[-1]["blocks"].items():
        np.testing.assert_array_equal(found[tuned], alone[-1]["blocks"][path])
        assert np.asarray(found)[stop].tobytes() == stack[path][stop].tobytes(), path
    leaves, others = jax.tree.leaves(state), jax.tree.leaves(expected)
    assert [x.shape for x in leaves] == [x.shape for x in others]


def test_frozen_gradients_do_not_count_in_the_clipped_norm():
    section = {"name": "adamw", "lr": 0.1, "schedule": CONSTANT, "eps": 1.0}
    section["freeze"] = (("encoder/.*", True),)
    grads = make_params(9)
    huge = grads | {"encoder": jax.tree.map(lambda x: 1e6 * x, grads["encoder"])}
    (plain,), _ = run(section, make_params(), [grads])
    (other,), _ = run(section, make_params(), [huge])
    np.testing.assert_array_equal(plain["head"]["kernel"], other["head"]["kernel"])


def test_clip_0_switches_clipping_off():
    section = {"name": "adamw", "lr": 0.1, "schedule": CONSTANT, "eps": 1.0}
    grads, twice = make_params(9), jax.tree.map(lambda x: 2 * x, make_params(9))
    same = [run(section, make_params(), [g])[0][0] for g in (grads, twice)]
    np.testing.assert_allclose(*[x["head"]["bias"] for x in same], rtol=1e-5)
    free = [
        run(section | {"clip": 0.0}, make_params(), [g])[0][0] for g in (grads, twice)
    ]
    assert not np.allclose(*[x["head"]["bias"] for x in free], rtol=1e-3)


def test_biases_of_scanned_layers_do_not_decay_by_default():
    params = {"blocks": {"kernel": jnp.ones((2, 3, 3)), "bias": jnp.ones((2, 3))}}
    section = {"name": "adamw", "lr": 0.1, "schedule": CONSTANT, "weight_decay": 0.5}
    (after,), _ = run(section, params, [jax.tree.map(jnp.zeros_like, params)])
    np.testing.assert_allclose(after["blocks"]["kernel"], 0.95, rtol=1e-6)
    np.testing.assert_array_equal(after["blocks"]["bias"], 1)


@pytest.mark.parametrize(
    "change, match",
    [
        (
            {"decay": (("head/kernl", 1.0),)},
            "'head/kernl' matches no parameter.*did you",
        ),
        ({"freeze": ((".*", False), ("head/.*", True))}, "earlier patterns have taken"),
        ({"lr_multipliers": (("head/(", 1.0),)}, "no regular expression"),
        ({"wieght_decay": 1.0}, "wieght_decay is unknown; did you mean 'weight_decay'"),
        ({"name": "adam"}, "optim.name='adam': did you mean 'adamw'"),
    ],
)
def test_a_mistake_in_the_section_is_named(change, match):
    section = {"name": "adamw", "lr": 1.0, "schedule": CONSTANT} | change
    with pytest.raises(ConfigError, match=match):
        optim.build(section, 10, make_params())


def test_a_missing_learning_rate_is_named():
    with pytest.raises(ConfigError, match=r"config\.optim\.lr is missing"):
        optim.build({"name": "adamw", "schedule": CONSTANT}, 10, make_params())


def test_the_section_may_have_been_through_json():
    section = {
        "name": "adafactor", "lr": 1e-3, "freeze": ((".*bias", True),),
        "schedule": {"name": "constant", "warmup": 0.1},
    }  # fmt: skip
    tx, rate = optim.build(json.loads(json.dumps(section)), 100, make_params())
    assert float(rate(5)) == pytest.approx(5e-4)
    assert not [n for n in paths.flatten(tx.init(make_params())) if "bias" in n]


def test_the_moving_average_follows_its_formula_and_starts_without_bias():
    decay, params = 0.9, [make_params(i) for i in range(4)]
    average, expected = params[0], paths.flatten(params[0])
    for p in params[1:]:
        average = optim.update_ema(average, p, decay)
        new = paths.flatten(p)
        expected = {k: decay * v + (1 - decay) * new[k] for k, v in expected.items()}
    for name, value in paths.flatten(average).items():
        np.testing.assert_allclose(value, expected[name], rtol=1e-5, atol=1e-6)
    frozen = normal(0, 10_000)
    for decay in (0.9, 0.999, 0.9999):
        np.testing.assert_array_equal(optim.update_ema(frozen, frozen, decay), frozen)
