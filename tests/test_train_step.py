import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from navit_jax import compile, experiment, host_signals, sharding, train_state

ALL = np.arange(8)
SIGNALS = np.zeros((8, 8), np.int32)


@pytest.fixture(scope="module")
def batches():
    stream = experiment.build_stream(tiny.config())
    chosen = stream.batches(ALL)
    return [next(chosen) for _ in range(10)]


def run(config, batches, mesh, task=None):
    """The state after all batches, and the metrics of each step."""
    stream = experiment.build_stream(config)
    task = task or experiment.build_task(config, stream.num_classes)
    with jax.set_mesh(mesh), jax.default_matmul_precision("highest"):
        program = compile.Program(config, task, stream.example(), mesh)
        state, step, metrics = program.first_state(), program.step(), []
        for host, info in batches:
            numbers = host_signals.encode(info, False)
            placed = sharding.place((host, numbers), mesh)
            state, values = step(state, *placed)
            metrics.append(jax.device_get(values))
    return jax.device_get(state), metrics


def losses(metrics):
    return np.array([m["loss"] for m in metrics], np.float64)


# Every step learns: no warmup, and an end that is far away.
LEARNING = {"optim__schedule": {"name": "constant"}, "steps": 100}


@pytest.fixture(scope="module")
def single(batches):
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    return run(tiny.config(**LEARNING), batches, mesh)


@pytest.mark.parametrize(
    "axes", [{}, {"replica": 2, "fsdp": 2, "tensor": 2}], ids=["fsdp", "all axes"]
)
def test_eight_devices_give_the_losses_of_one(batches, single, axes):
    # The sums of a product split over devices are rounded in another order.
    _, metrics = run(tiny.config(**LEARNING), batches, sharding.make_mesh(**axes))
    np.testing.assert_allclose(losses(metrics), losses(single[1]), rtol=1e-5)
    assert len(metrics) == 10
    assert losses(metrics)[-1] < losses(metrics)[0]


@pytest.mark.parametrize("task", ["classification", "masked_patches"])
def test_accumulated_gradients_equal_those_of_the_big_batch(batches, task):
    # Dropped paths are drawn by image, so they are the same in every pass.
    pooling = "none" if task == "masked_patches" else "map"
    config = tiny.config(
        task={"name": task}, model__drop_path=0.5, model__pooling=pooling
    )
    mesh = sharding.make_mesh(devices=jax.devices()[:2])
    stream = experiment.build_stream(config)
    with jax.set_mesh(mesh), jax.default_matmul_precision("highest"):
        built = experiment.build_task(config, stream.num_classes)
        program = compile.Program(config, built, stream.example(), mesh)
        batch = sharding.place(batches[0][0], mesh)
        keys = iter(jax.random.split(jax.random.key(1), 1000))
        # Not those of the beginning: a head of zeros lets no gradient through.
        params = jax.tree.map(
            lambda x: x + 0.1 * jax.random.normal(next(keys), x.shape),
            program.first_state().params,
        )
        (loss, first), (other, second) = (
            jax.device_get(
                jax.jit(train_state.loss_and_gradients(built, num, shards=2))(
                    params, batch, jax.random.key(2)
                )
            )
            for num in (1, 2)
        )
    np.testing.assert_allclose(loss[0], other[0], rtol=1e-6)
    for one, two in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
        assert np.abs(one).max() > 0
        np.testing.assert_allclose(one, two, atol=1e-5 * np.abs(one).max())


def test_what_is_random_changes_with_the_step_and_with_nothing_else(batches):
    # The same batch again and again, at a rate that moves no parameter.
    config = tiny.config(model__drop_path=0.5, optim__lr=0.0)
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    stream = experiment.build_stream(config)
    task = experiment.build_task(config, stream.num_classes)
    with jax.set_mesh(mesh):
        program = compile.Program(config, task, stream.example(), mesh)
        state, step = program.first_state(), program.step()
        head = state.params["head"]["dense"]
        head["kernel"] = jax.random.normal(jax.random.key(0), head["kernel"].shape)
        seen = []
        for _ in range(2):
            again = jax.tree.map(jax.numpy.copy, state)
            losses_ = []
            for _ in range(3):
                host, info = batches[0]
                numbers = host_signals.encode(info, False)
                placed = sharding.place((host, numbers), mesh)
                again, metrics = step(again, *placed)
                losses_.append(float(metrics["loss"]))
            seen.append(losses_)
    assert seen[0] == seen[1]
    assert len(set(seen[0])) == 3


@dataclasses.dataclass(frozen=True)
class Poisoned:
    """A task whose loss is not finite as soon as one image is in the batch."""

    task: object
    image: tuple[int, int]

    def init(self, key, batch):
        return self.task.init(key, batch)

    def weights(self, batch):
        return self.task.weights(batch)

    def outputs(self, params, batch):
        return self.task.outputs(params, batch)

    def metrics(self, params, batch):
        return self.task.metrics(params, batch)

    def loss(self, params, batch, key, weights):
        loss, means = self.task.loss(params, batch, key, weights)
        here = (batch.image_ids == jnp.array(self.image, jnp.uint32)).all(-1)
        return jnp.where((here & batch.image_mask).any(), jnp.nan, loss), means


def test_a_step_that_is_not_finite_changes_nothing_but_the_counts(batches):
    # An update is the learning rate in each direction, and the first one is 0.
    section = {
        "name": "adamw", "lr": 1e-3, "schedule": {"name": "constant", "warmup": 4},
        "weight_decay": 0.0, "b1": 0.0, "b2": 0.0, "eps": 1e-12,
    }  # fmt: skip
    config = tiny.config(optim=section, steps=100, train__ema=0.9)
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    stream = experiment.build_stream(config)
    image = tuple(batches[1][0].image_ids[0, 0].tolist())
    task = Poisoned(experiment.build_task(config, stream.num_classes), image)
    fresh, _ = run(config, [], mesh, task)
    clean, _ = run(config, [batches[0], batches[2]], mesh, task)
    state, metrics = run(config, batches[:3], mesh, task)
    assert [bool(m["finite"]) for m in metrics] == [True, False, True]
    assert (state.step, state.nonfinite) == (3, 1)
    for part in ("params", "opt_state", "ema"):
        chex.assert_trees_all_equal(getattr(state, part), getattr(clean, part))
    chex.assert_tree_all_finite(state.params)
    # The warmup counts updates, and the third step is the second of them.
    rates = [m["learning_rate"] for m in metrics]
    np.testing.assert_allclose(rates, [0, 1e-3 / 4, 1e-3 / 4], rtol=1e-6)
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), state.params, fresh.params)
    assert max(jax.tree.leaves(moved)) == pytest.approx(rates[2], rel=1e-3)


def test_the_running_mean_follows_the_parameters(batches):
    config = tiny.config(**LEARNING, train__ema=0.75)
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    states = [run(config, batches[:n], mesh)[0] for n in range(3)]
    expected = jax.tree.map(np.float64, states[0].params)
    for state in states[1:]:
        new = jax.tree.map(np.float64, state.params)
        expected = jax.tree.map(lambda a, b: 0.75 * a + 0.25 * b, expected, new)
    chex.assert_trees_all_close(states[2].ema, expected, rtol=1e-5, atol=1e-7)


def test_a_step_compiles_once_and_moves_nothing_by_itself(batches):
    config = tiny.config()
    stream = experiment.build_stream(config)
    mesh = sharding.make_mesh()
    with jax.set_mesh(mesh):
        task = experiment.build_task(config, stream.num_classes)
        program = compile.Program(config, task, stream.example(), mesh)
        state, step = program.first_state(), program.step()
        for host, info in batches[:4]:
            placed = sharding.place((host, host_signals.encode(info, False)), mesh)
            with jax.transfer_guard("disallow"):
                state, _ = step(state, *placed)
    assert step._cache_size() == 1


def test_hosts_read_the_sums_of_what_all_of_them_say(batches):
    _, info = batches[-1]
    there = dataclasses.replace(
        info, position=[None], images_seen=[None], skipped=[("a", "empty")] * 2
    )
    numbers = [host_signals.encode(info, False), host_signals.encode(there, True)]
    totals = host_signals.decode(np.concatenate(numbers).sum(0))
    planned = sum(map(len, info.keys))
    assert totals == (2 * planned, 2, True, info.position, info.images_seen[0])
    huge = dataclasses.replace(info, images_seen=[30_000_000_000])
    assert (
        host_signals.decode(host_signals.encode(huge, False).sum(0)).images_seen == 3e10
    )
