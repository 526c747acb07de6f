import logging

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from navit_jax import optim, paths, sharding
from navit_jax.errors import ConfigError

MESH = sharding.make_mesh(2, 2, 2)


def shape(*sizes):
    return jax.ShapeDtypeStruct(sizes, jnp.float32)


PARAMS = {
    "encoder": {
        "patch_embedding": {"kernel": shape(48, 32), "bias": shape(32)},
        "position_embedding": {"tables": shape(2, 64, 32)},
        "blocks": {
            "attention": {
                "query": {"kernel": shape(6, 32, 4, 8), "bias": shape(6, 4, 8)},
                "query_norm": {"scale": shape(6, 8)},
                "out": {"kernel": shape(6, 4, 8, 32), "bias": shape(6, 32)},
            },
            # A vector a layer: the rule for [D C] must not reach its layer axis.
            "head": {"kernel": shape(6, 32)},
            "mlp": {
                "up": {"kernel": shape(6, 32, 128), "bias": shape(6, 128)},
                "down": {"kernel": shape(6, 128, 32), "bias": shape(6, 32)},
            },
        },
        "pool": {"key": {"kernel": shape(32, 3, 8)}, "probe": shape(1, 32)},
    },
    "head": {"dense": {"kernel": shape(32, 5), "bias": shape(5)}},
}
EXPECTED = {
    "encoder/patch_embedding/kernel": P(None, "fsdp"),
    "encoder/blocks/attention/query/kernel": P(None, "fsdp", "tensor", None),
    "encoder/blocks/attention/query/bias": P(None, "tensor", None),
    "encoder/blocks/attention/out/kernel": P(None, "tensor", None, "fsdp"),
    "encoder/blocks/mlp/up/kernel": P(None, "fsdp", "tensor"),
    "encoder/blocks/mlp/up/bias": P(None, "tensor"),
    "encoder/blocks/mlp/down/kernel": P(None, "tensor", "fsdp"),
    # Three heads are not split over two devices.
    "encoder/pool/key/kernel": P("fsdp", None, None),
    "head/dense/kernel": P("fsdp", None),
}


def test_parameters_are_split_by_rule_and_the_layer_axis_never(caplog):
    caplog.set_level(logging.INFO, logger="absl")
    specs = sharding.param_specs(PARAMS, MESH)
    for name, leaf in paths.flatten(PARAMS).items():
        expected = EXPECTED.get(name, P(*[None] * len(leaf.shape)))
        assert specs[name] == expected, name
    lines = [r.message for r in caplog.records if "Kept whole" in r.message]
    assert len(lines) == 1
    assert "encoder/pool/key/kernel (32, 3, 8) over tensor=2" in lines[0]


@pytest.mark.parametrize("layers", [6, 2], ids=["all", "tuned"])
@pytest.mark.parametrize("name", optim.OPTIMIZERS)
def test_optimizer_leaves_go_with_their_parameters(name, layers):
    section = {"name": name, "lr": 1.0, "schedule": {"name": "constant"}}
    section["freeze"] = ((".*/blocks/.*", f"{layers}:"),)
    if name == "adafactor":
        section["min_dim_size_to_factor"] = 8
    tx, _ = optim.build(section, 10, PARAMS)
    state = {"params": PARAMS, "opt": jax.eval_shape(tx.init, PARAMS), "step": shape()}
    shardings = sharding.state_shardings(state, PARAMS, MESH)
    specs = {name: s.spec for name, s in paths.flatten(shardings).items()}
    shapes = {name: leaf.shape for name, leaf in paths.flatten(state).items()}
    query = "encoder/blocks/attention/query/kernel"
    assert specs[f"params/{query}"] == EXPECTED[query]
    assert specs["step"] == P()
    moments = {n.split("/")[-7 if "query" in n else -6]: n for n in specs
               if n.startswith("opt") and n.endswith(query)}  # fmt: skip
    if name == "adamw":
        assert {specs[n] for n in moments.values()} == {EXPECTED[query]}
    else:
        # [6 32 4 8] is factored over 32 and 8; frozen layers have no moments.
        by_shape = {shapes[n]: specs[n] for n in specs
                    if n.startswith("opt") and n.endswith(query)}  # fmt: skip
        assert by_shape == {
            (layers, 4, 8): P(None, "tensor", None),
            (layers, 32, 4): P(None, "fsdp", "tensor"),
            (1,): P(),
            (layers, 32, 4, 8): EXPECTED[query],
        }


def test_a_factored_moment_of_a_square_kernel_is_replicated():
    params = {"kernel": shape(8, 8)}
    state = {"v_row": {"kernel": shape(8)}, "mu": {"kernel": shape(8, 8)}}
    shardings = sharding.state_shardings(state, params, MESH)
    assert shardings["v_row"]["kernel"].spec == P()
    assert shardings["mu"]["kernel"].spec == P(None, "fsdp")


def test_a_sharded_step_of_the_optimizer_equals_a_step_on_one_device():
    rng = np.random.default_rng(0)
    fill = lambda s: rng.normal(size=s.shape).astype(np.float32)  # noqa: E731
    params, grads = jax.tree.map(fill, PARAMS), jax.tree.map(fill, PARAMS)
    section = {"name": "adafactor", "lr": 0.1, "schedule": {"name": "constant"}}
    tx, _ = optim.build(section | {"weight_decay": 0.1}, 10, params)

    def step(params, state):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    alone, _ = jax.jit(step)(params, tx.init(params))
    places = sharding.state_shardings(PARAMS, PARAMS, MESH)
    states = sharding.state_shardings(jax.eval_shape(tx.init, params), params, MESH)
    state = jax.jit(tx.init, out_shardings=states)(jax.device_put(params, places))
    together, _ = jax.jit(step)(jax.device_put(params, places), state)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
        alone,
        jax.device_get(together),
    )


@pytest.mark.parametrize(
    "sizes, expected",
    [((1, -1, 1), (1, 8, 1)), ((2, -1, 2), (2, 2, 2)), ((8, 1, 1), (8, 1, 1))],
)
def test_a_mesh_fills_in_the_rest(sizes, expected):
    mesh = sharding.make_mesh(*sizes)
    assert mesh.axis_names == ("replica", "fsdp", "tensor")
    assert mesh.devices.shape == expected
    assert mesh.axis_types == (AxisType.Auto,) * 3
    assert sorted(d.id for d in mesh.devices.flat) == list(range(8))


def test_a_mesh_may_take_some_devices():
    assert sharding.make_mesh(devices=jax.devices()[:4]).devices.shape == (1, 4, 1)


@pytest.mark.parametrize(
    "sizes, match",
    [
        (
            (1, -1, 3),
            "tensor=3.* does not make up 8 devices; possible: .*tensor=2 or 4",
        ),
        ((2, 3, 1), "possible: fsdp=4$"),
        ((3, -1, 3), "possible: fsdp=-1 with the other axes 1"),
        ((-1, -1, 1), "only one axis may be -1"),
        ((1, -1, 0), "config.mesh.tensor=0: take 1 or more"),
        ((1, 4, 1), "possible: .*fsdp=8"),
    ],
)
def test_an_impossible_mesh_is_refused_with_the_nearest_values(sizes, match):
    with pytest.raises(ConfigError, match=match):
        sharding.make_mesh(*sizes)


def test_replicas_alone_are_split_over_slices():
    class Device:
        platform = "tpu"

        def __init__(self, number):
            self.id, self.slice_index = number, number // 4

    with pytest.raises(
        ConfigError, match=r"replica=1: the devices are 2 slices.* of 2"
    ):
        sharding.make_mesh(1, 8, 1, list(map(Device, range(8))))
    # Hosts of CPUs or GPUs count as slices too, and split what they like.
    Device.platform = Device.device_kind = "gpu"
    mesh = sharding.make_mesh(1, 8, 1, list(map(Device, range(8))))
    assert dict(mesh.shape) == {"replica": 1, "fsdp": 8, "tensor": 1}


@pytest.mark.parametrize(
    "rows, accumulate, part", [(16, 1, 16), (16, 4, 4), (24, 2, 12)]
)
def test_rows_per_step_divides_by_accumulation(rows, accumulate, part):
    assert sharding.rows_per_step(rows, MESH, accumulate) == part


@pytest.mark.parametrize(
    "rows, accumulate, match",
    [
        (18, 1, "data.rows=16 or 20$"),
        (16, 3, "multiple of 12 = 4 devices .* accumulate 3; .*data.rows=12 or 24, or "
                "accumulate=2 or 4"),
        (2, 1, "data.rows=4$"),
        (0, 1, "data.rows=4$"),
        (8, 0, "accumulate=0"),
    ],
)  # fmt: skip
def test_rows_that_do_not_divide_are_refused_with_the_nearest(rows, accumulate, match):
    with pytest.raises(ConfigError, match=match):
        sharding.rows_per_step(rows, MESH, accumulate)


def test_placed_rows_are_split_over_replica_and_fsdp():
    batch = {"patches": np.arange(8 * 3).reshape(8, 3), "mask": np.ones(8, bool)}
    placed = sharding.place(batch, MESH)
    np.testing.assert_array_equal(placed["patches"], batch["patches"])
    assert placed["mask"].dtype == bool
    assert {s.data.shape for s in placed["patches"].addressable_shards} == {(2, 3)}
    rows = {int(s.data[0, 0]) // 3 for s in placed["patches"].addressable_shards}
    assert rows == {0, 2, 4, 6}


def test_one_process_gives_all_rows():
    np.testing.assert_array_equal(sharding.local_rows(MESH, 8), np.arange(8))
