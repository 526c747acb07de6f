"""The state of a run on the devices, and one step of it as a pure function.

Shapes: B rows, N image slots a row.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int

from navit_jax import optim
from navit_jax.batch import PackedBatch, pytree
from navit_jax.metrics import Mean
from navit_jax.models.pooling import tokens_of_slots
from navit_jax.tasks import Coupled, Task

Params = Mapping[str, Any]


@pytree
class TrainState:
    """All that a step changes, and all that a checkpoint needs of the devices.

    Attributes:
      step: Steps done, skipped ones included.
      params: The parameters.
      opt_state: The optimiser's state; it does not count skipped steps.
      ema: Running mean of the parameters that are not frozen; {} if there is none.
      nonfinite: Steps whose loss or gradient was not finite, so changed nothing.
    """

    step: Any
    params: Any
    opt_state: Any
    ema: Any
    nonfinite: Any


def init_state(
    task: Task,
    tx: optax.GradientTransformation,
    key: jax.Array,
    batch: PackedBatch,
    ema_decay: float | int = 0.0,
    freeze: Sequence[Any] = (),
) -> TrainState:
    """A fresh state; `batch` gives shapes only, `freeze` is as of `optim.compose`."""
    params = task.init(key, batch)
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        opt_state=tx.init(params),
        ema=start_ema(params, freeze) if ema_decay else {},
        nonfinite=jnp.zeros((), jnp.int32),
    )


def start_ema(params: Params, freeze: Sequence[Any]) -> Params:
    """A copy, as donated buffers must not be shared by two leaves."""
    return jax.tree.map(jnp.copy, optim.drop_frozen(freeze, params))


def batch_counts(batch: PackedBatch) -> dict[str, jax.Array]:
    """Images, tokens and attention pairs (sum of n_i^2) of a batch, as float32.

    With texts also their number, tokens and pairs, and the room there is for them.
    """
    N = batch.image_mask.shape[1]
    tokens = tokens_of_slots(batch.segment_ids, N).astype(jnp.float32)
    counts = {
        "images": batch.image_mask.sum(dtype=jnp.float32),
        "tokens": tokens.sum(),
        "attention_pairs": jnp.square(tokens).sum(),
    }
    if (text := batch.targets.get("text_segment_ids")) is not None:
        tokens = tokens_of_slots(text, N).astype(jnp.float32)
        counts["texts"] = (tokens > 0).sum(dtype=jnp.float32)
        counts["text_tokens"] = tokens.sum()
        counts["text_attention_pairs"] = jnp.square(tokens).sum()
        counts["text_room"] = jnp.float32(text.size)
    return counts


def split_rows(tree: Any, accumulate: int, shards: int) -> Any:
    """[B ...] to [accumulate B/accumulate ...], each device keeping its own rows.

    Args:
      shards: Number of devices the rows are spread over.
    """

    def split(x: jax.Array) -> jax.Array:
        rows = x.shape[0] // (shards * accumulate)
        x = x.reshape(shards, accumulate, rows, *x.shape[1:])
        return jnp.swapaxes(x, 0, 1).reshape(accumulate, shards * rows, *x.shape[3:])

    return jax.tree.map(split, tree)


def join_rows(tree: Any, shards: int) -> Any:
    """[accumulate B/accumulate ...] back to [B ...]: the inverse of `split_rows`."""

    def join(x: jax.Array) -> jax.Array:
        accumulate, rows = x.shape[0], x.shape[1] // shards
        x = x.reshape(accumulate, shards, rows, *x.shape[2:])
        return jnp.swapaxes(x, 0, 1).reshape(-1, *x.shape[3:])

    return jax.tree.map(join, tree)


Compute = Callable[..., tuple[tuple[jax.Array, dict[str, Mean]], Params]]


def loss_and_gradients(
    task: Task, accumulate: int = 1, shards: int = 1, freeze: Sequence[Any] = ()
) -> Compute:
    """(params, batch, key) to ((loss, metrics), gradients), in `accumulate` passes.

    The task's weights are summed over all micro-batches first, so the gradients are
    those of the whole batch, however its images fall into micro-batches. A `Coupled`
    task takes twice the forward passes. Gradients of frozen parameters are 0.

    Args:
      freeze: As of `optim.compose`.
    """
    if accumulate > 1 and isinstance(task, Coupled):
        return _replayed(task, accumulate, shards, freeze)

    def loss(params, *arguments):
        return task.loss(optim.stop_frozen(freeze, params), *arguments)

    gradient = jax.value_and_grad(loss, has_aux=True)

    def whole(params, batch, key):
        return gradient(params, batch, key, task.weights(batch))

    def in_parts(params, batch, key):
        parts = split_rows(batch, accumulate, shards)
        weights = jax.tree.map(lambda w: w.sum(0), jax.vmap(task.weights)(parts))
        return _sum(lambda part: gradient(params, part, key, weights), parts)

    return whole if accumulate == 1 else in_parts


def _sum(function: Callable[[Any], Any], parts: Any) -> Any:
    """The sum of a function over the first axis, one part at a time."""
    first = jax.tree.map(lambda x: x[0], parts)
    shapes = jax.eval_shape(function, first)
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)

    def add(total, part):
        return jax.tree.map(jnp.add, total, function(part)), None

    return jax.lax.scan(add, zeros, parts)[0]


def _replayed(
    task: Coupled, accumulate: int, shards: int, freeze: Sequence[Any]
) -> Compute:
    """Embeds part by part, couples all, then embeds each part again to go back.

    Of the first pass only the embeddings are kept. Random draws are by image, so the
    second pass has the same ones.
    """

    stop = functools.partial(optim.stop_frozen, freeze)

    def couple(params, embeddings, batch):
        return task.couple(stop(params), embeddings, batch)

    def compute(params, batch, key):
        parts = split_rows(batch, accumulate, shards)
        embedded = jax.lax.map(lambda part: task.embed(params, part, key), parts)
        coupled = jax.value_and_grad(couple, (0, 1), has_aux=True)
        result, (direct, cotangents) = coupled(
            params, join_rows(embedded, shards), batch
        )

        def go_back(part_and_cotangents):
            part, own = part_and_cotangents
            _, pull = jax.vjp(lambda p: task.embed(stop(p), part, key), params)
            return pull(own)[0]

        through = _sum(go_back, (parts, split_rows(cotangents, accumulate, shards)))
        return result, jax.tree.map(jnp.add, direct, through)

    return compute


def train_step(
    state: TrainState,
    batch: PackedBatch,
    signals: Int[Array, "B S"],
    *,
    task: Task,
    tx: optax.GradientTransformation,
    seed: int,
    accumulate: int = 1,
    shards: int = 1,
    ema_decay: float | int = 0.0,
    freeze: Sequence[Any] = (),
) -> tuple[TrainState, dict[str, Any]]:
    """One step: a pure function of state and batch.

    A step whose loss or gradient is not finite changes neither parameters, nor the
    optimiser, nor the running mean; only the step and the count of such steps go on.

    Args:
      signals: Numbers of the host for each row, summed over all hosts, so that every
        host reads the same totals.
      freeze: As of `optim.compose`, which made `tx`.

    Returns:
      The new state, and metrics: the task's means, `loss`, `gradient_norm`, `finite`,
      the counts of the batch, `signals` [S].
    """
    key = jax.random.fold_in(jax.random.key(seed), state.step)
    compute = loss_and_gradients(task, accumulate, shards, freeze)
    (loss, means), gradients = compute(state.params, batch, key)
    norm = optax.tree.norm(gradients)
    finite = jnp.isfinite(loss) & jnp.isfinite(norm)
    updates, opt_state = tx.update(gradients, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    ema = state.ema
    if ema_decay:
        ema = optim.update_ema(ema, optim.drop_frozen(freeze, params), ema_decay)

    def keep(new, old):
        return jax.tree.map(lambda n, o: jnp.where(finite, n, o), new, old)

    new_state = TrainState(
        step=state.step + 1,
        params=keep(params, state.params),
        opt_state=keep(opt_state, state.opt_state),
        ema=keep(ema, state.ema),
        nonfinite=state.nonfinite + ~finite,
    )
    metrics = {
        "means": means,
        "loss": loss,
        "gradient_norm": norm,
        "finite": finite,
        "nonfinite": new_state.nonfinite,
        "counts": batch_counts(batch),
        "signals": signals.sum(0),
    }
    return new_state, metrics
