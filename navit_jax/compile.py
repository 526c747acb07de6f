"""Compiles what a run executes on its devices: the first state, and the step.

Shapes first, arrays last: the state is described, given shardings, and then made where
it belongs, so no device ever holds more than its share.
"""

import dataclasses
import functools
import itertools
import time
from collections.abc import Callable, Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from absl import logging
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from navit_jax import config as config_lib
from navit_jax import (
    experiment,
    inheritance,
    initialise,
    optim,
    sharding,
    train_state,
)
from navit_jax.batch import PackedBatch
from navit_jax.tasks import Task
from navit_jax.train_state import TrainState


class Program:
    """The state of a config on a mesh: its shapes, shardings, first values, step.

    Attributes:
      abstract: TrainState of shapes, dtypes and shardings.
      schedule: Learning rate by count of updates.
    """

    def __init__(
        self,
        config: Mapping[str, Any],
        task: Task,
        example: PackedBatch,
        mesh: jax.sharding.Mesh,
    ):
        """Describes the state.

        Args:
          example: A host batch of the global shapes; its content does not matter.
        """
        self._config, self._task, self._mesh = config, task, mesh
        self._options = experiment.train_options(config)
        self._example = example
        # Nothing is computed: devices that are only described could not.
        key = jax.eval_shape(lambda: jax.random.key(config["seed"]))
        params = jax.eval_shape(task.init, key, example)
        section = {**config["optim"], "freeze": freeze(config, task)}
        self._tx, self.schedule = optim.build(section, config["steps"], params)
        shapes = jax.eval_shape(self._init, key)
        self._shardings = sharding.state_shardings(shapes, params, mesh)
        self.abstract: TrainState = jax.tree.map(
            lambda s, where: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=where),
            shapes,
            self._shardings,
        )

    def first_state(self) -> TrainState:
        """Fresh values, or parameters that `model.init` loads, already sharded."""
        init = jax.jit(self._init, out_shardings=self._shardings)
        state = init(jax.random.key(self._config["seed"]))
        rules = getattr(self._task, "inherit", ())
        if not self._config["model"].get("init") and not rules:
            return state
        params = self._load(state.params)
        if rules:
            copy = functools.partial(inheritance.inherit, rules=rules)
            params = jax.jit(copy, out_shardings=self._shardings.params)(params)
        frozen = freeze(self._config, self._task)
        ema = train_state.start_ema(params, frozen) if self._options.ema else {}
        return dataclasses.replace(state, params=params, ema=ema)

    def first_params(self, roots: Collection[str]) -> Any:
        """The parameters under some roots alone, before any is inherited."""

        def init(key: jax.Array) -> Any:
            return _choose(self._init(key).params, roots)

        where = _choose(self._shardings.params, roots)
        made = jax.jit(init, out_shardings=where)(jax.random.key(self._config["seed"]))
        return _choose(self._load({**self.abstract.params, **made}), roots)

    def _load(self, params: Any) -> Any:
        if not (section := self._config["model"].get("init")):
            return params
        return config_lib.call(
            initialise.from_run, section, "model.init", params=params
        )

    def step(self) -> Callable[..., tuple[TrainState, dict[str, Any]]]:
        """The jitted (state, batch, signals) -> (state, metrics); donates the state.

        To the metrics of `train_step` it adds the `learning_rate` of the update.
        """
        rows = sharding.batch_sharding(self._mesh)
        shards = self._mesh.shape["replica"] * self._mesh.shape["fsdp"]
        train_step = functools.partial(
            train_state.train_step,
            task=self._task,
            tx=self._tx,
            seed=self._config["seed"],
            accumulate=self._options.accumulate,
            shards=shards,
            ema_decay=self._options.ema,
            freeze=freeze(self._config, self._task),
        )

        def step(
            state: TrainState, batch: PackedBatch, signals: jax.Array
        ) -> tuple[TrainState, dict[str, Any]]:
            # The optimizer counts updates; a step that was not finite is none.
            rate = jnp.asarray(self.schedule(state.step - state.nonfinite))
            state, metrics = train_step(state, batch, signals)
            return state, {**metrics, "learning_rate": rate}

        return jax.jit(
            step,
            donate_argnums=0,
            in_shardings=(self._shardings, rows, rows),
            out_shardings=(self._shardings, NamedSharding(self._mesh, P())),
        )

    def _init(self, key: jax.Array) -> TrainState:
        batch = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), self._example)
        return train_state.init_state(
            self._task,
            self._tx,
            key,
            batch,
            self._options.ema,
            freeze(self._config, self._task),
        )


def tell(step: Callable[..., Any]) -> Callable[..., Any]:
    """The step; its first call says that it compiles, and for how long it did."""
    calls = itertools.count()

    def call(*args: Any) -> Any:
        if next(calls):
            return step(*args)
        logging.info("compiling the training step")
        begun = time.monotonic()
        result = step(*args)
        logging.info("compiled in %.0f s", time.monotonic() - begun)
        return result

    return call


def _choose(tree: Mapping[str, Any], roots: Collection[str]) -> dict[str, Any]:
    return {root: part for root, part in tree.items() if root in roots}


def freeze(config: Mapping[str, Any], task: Task) -> list[Any]:
    """What is frozen, as of `optim.compose`: by the task, and by section `optim`."""
    given = [(pattern, True) for pattern in getattr(task, "frozen", ())]
    return [*given, *config["optim"].get("freeze", ())]
