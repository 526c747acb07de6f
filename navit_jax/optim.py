"""Builds the optimizer of a config: what changes which parameter, by how much.

Whatever differs between parameters (decay, learning rate, freezing) is chosen by
(pattern, value) pairs over their paths, see `navit_jax.paths`; never by rank, because
a bias of scanned layers has two dimensions like a kernel.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from navit_jax import config, paths
from navit_jax.errors import ConfigError
from navit_jax.schedules import SCHEDULES

# Arguments of `compose` that are not the config's.
GIVEN = ("scale", "steps", "params")


def build(
    section: Mapping[str, Any], steps: int, params: Any
) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """Builds the section `optim` of a config.

    Args:
      section: `name`, the arguments of OPTIMIZERS[name], and those of `compose`.
      steps: Optimizer steps of the whole run.
      params: The parameters, or their shapes and dtypes: a nested dict.

    Returns:
      The transformation, and the learning rate by count of its updates.

    Raises:
      ConfigError: an unknown name or argument, a pattern without a parameter, warmup
        and cooldown longer than the run.
    """
    factory, own = config.choose(section, OPTIMIZERS, "optim")
    config.check(own, [compose, factory], "optim", GIVEN)
    common = inspect.signature(compose).parameters
    shared = {key: own.pop(key) for key in list(own) if key in common}
    return compose(factory(**own), steps, params, **shared)


def compose(
    scale: optax.GradientTransformation,
    steps: int,
    params: Any,
    lr: float,
    schedule: Mapping[str, Any],
    weight_decay: float = 0.0,
    decay: Sequence[Any] = ((r"(.*/)?kernel", 1.0),),
    lr_multipliers: Sequence[Any] = (),
    freeze: Sequence[Any] = (),
    clip: float = 1.0,
) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """Puts clipping, multipliers, decay, schedule and freezing around a scaling.

    In each step a parameter p with gradient g changes by
      -rate x (lr multiplier x scale(clipped g) + weight_decay x decay multiplier x p)
    so decay is decoupled, and expressed times the learning rate: it shrinks p by
    weight_decay x decay multiplier x rate a step, whatever its lr multiplier.

    Args:
      lr: The peak of the schedule.
      schedule: A section of SCHEDULES.
      decay: (pattern, decay multiplier) pairs; 0 for parameters without a match.
      lr_multipliers: (pattern, multiplier) pairs; 1 for parameters without a match.
      freeze: (pattern, whether it is frozen) pairs; not frozen without a match. Frozen
        parameters stay equal to the bit, have no optimizer state, count in no norm,
        and no backward pass leads to them (`stop_frozen`): a locked image tower
        (LiT) is (("encoder/.*", True),) and goes forward only. Of stacked parameters
        some layers may be frozen, as (("encoder/blocks/.*", "4:"),): they stay equal
        to the bit and have no state either, but the backward pass does visit them.
      clip: The largest global norm of the gradient; 0 switches clipping off.
    """
    names = list(paths.flatten(params))
    decays = paths.pick(decay, names, 0.0, "optim.decay")
    factors = paths.pick(lr_multipliers, names, 1.0, "optim.lr_multipliers")
    frozen = find_frozen(freeze, params)
    rate = config.build(
        schedule, SCHEDULES, "optim.schedule", peak=float(lr), steps=steps
    )
    trained = optax.chain(
        optax.clip_by_global_norm(clip) if clip else optax.identity(),
        scale,
        _each(lambda name, update, _: update * factors[name]),
        _each(
            lambda name, update, p: (
                update
                + (
                    weight_decay * decays[name] * p
                    if weight_decay * decays[name]
                    else 0
                )
            )
        ),
        optax.scale_by_learning_rate(rate),
    )
    # Adding -0.0 changes no bit; adding 0.0 turns -0.0 into 0.0.
    still = _each(lambda _, update, __: jnp.full_like(update, -0.0))
    labels = jax.tree_util.tree_map_with_path(
        lambda path, _: "frozen" if frozen[paths.name(path)] is True else "trained",
        params,
    )
    tuned = _tune_layers(trained, frozen)
    return optax.partition({"trained": tuned, "frozen": still}, labels), rate


def find_frozen(freeze: Sequence[Any], params: Any) -> dict[str, bool | slice]:
    """Whether each parameter, by path, is frozen, or which of its layers are.

    Args:
      freeze: As of `compose`.

    Raises:
      ConfigError: layers of a parameter that has none.
    """
    where = "optim.freeze"
    leaves = paths.flatten(params)
    frozen = paths.pick(freeze, leaves, False, where)
    for name, layers in frozen.items():
        if isinstance(layers, str):
            if not paths.is_stacked(name):
                raise ConfigError(
                    f"config.{where}: {name} is of no stack of blocks: there are no "
                    f"layers {layers!r}; freeze it as a whole (True) or not"
                )
            frozen[name] = paths.parse_layers(layers, where)
    return frozen


def stop_frozen(freeze: Sequence[Any], params: Any) -> Any:
    """The parameters; a gradient with respect to frozen ones is 0, at no cost."""
    frozen = find_frozen(freeze, params)

    def stop(path: Any, p: jax.Array) -> jax.Array:
        layers = frozen[paths.name(path)]
        if not isinstance(layers, slice):
            return jax.lax.stop_gradient(p) if layers else p
        return jnp.where(_mask(p, layers), jax.lax.stop_gradient(p), p)

    return jax.tree_util.tree_map_with_path(stop, params)


def drop_frozen(freeze: Sequence[Any], params: Any) -> Any:
    """The nested dict of those that are not frozen as a whole."""
    frozen = find_frozen(freeze, params)
    leaves = paths.flatten(params)
    return paths.nest({n: leaf for n, leaf in leaves.items() if frozen[n] is not True})


def _tune_layers(
    inner: optax.GradientTransformation, frozen: Mapping[str, bool | slice]
) -> optax.GradientTransformation:
    """Of stacks that are frozen in part, `inner` is shown the tuned layers alone."""

    def select(tree: Any) -> Any:
        return jax.tree_util.tree_map_with_path(
            lambda path, p: (
                jnp.delete(p, layers, 0)
                if isinstance(layers := frozen[paths.name(path)], slice)
                else p
            ),
            tree,
        )

    def update(updates: Any, state: Any, params: Any = None) -> Any:
        changed, state = inner.update(select(updates), state, select(params))

        def fill(path: Any, update: jax.Array, p: Any) -> jax.Array:
            layers = frozen[paths.name(path)]
            if not isinstance(layers, slice):
                return update
            return jnp.full_like(p, -0.0).at[~_mask(p, layers).ravel()].set(update)

        return jax.tree_util.tree_map_with_path(fill, changed, updates), state

    return optax.GradientTransformation(
        lambda params: inner.init(select(params)), update
    )


def _mask(p: Any, layers: slice) -> np.ndarray:
    """Which layers are meant, in the rank of the parameter."""
    mask = np.zeros(p.shape[0], bool)
    mask[layers] = True
    return mask.reshape(-1, *[1] * (p.ndim - 1))


def _each(
    change: Callable[[str, Any, Any], Any],
) -> optax.GradientTransformation:
    """Maps change(name, update, parameter) over the parameters."""

    def update(updates: Any, params: Any) -> Any:
        return jax.tree_util.tree_map_with_path(
            lambda path, u, p: change(paths.name(path), u, p), updates, params
        )

    return optax.stateless(update)


def adamw(
    b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8, mu_dtype: str = "float32"
) -> optax.GradientTransformation:
    """Adam's scaling; `compose` adds the decoupled decay.

    Args:
      mu_dtype: What the first moment is kept in.
    """
    return optax.scale_by_adam(b1, b2, eps, mu_dtype=mu_dtype)


def adafactor(
    momentum: float = 0.9,
    mu_dtype: str = "bfloat16",
    decay_rate: float = 0.8,
    b2_cap: float = 0.999,
    min_dim_size_to_factor: int = 32,
    eps: float = 1e-30,
) -> optax.GradientTransformation:
    """Adafactor as modified in Scaling Vision Transformers (2106.04560), section 3.4.

    The second moment is factored over the two largest axes, its decay is
    min(b2_cap, 1 - t^-decay_rate) with t from 1, the first moment is kept in half
    precision, updates are not scaled by the size of parameters and not clipped. A
    layer axis is never factored over, so that scanned layers learn as separate ones.
    """

    def b2(count: jax.typing.ArrayLike, exponent: jax.typing.ArrayLike) -> jax.Array:
        t = jnp.asarray(count, jnp.float32) + 1
        return jnp.minimum(b2_cap, 1 - t ** -jnp.asarray(exponent))

    def rms(factored: bool) -> optax.GradientTransformation:
        return optax.scale_by_factored_rms(
            factored=factored,
            decay_rate=decay_rate,
            min_dim_size_to_factor=min_dim_size_to_factor,
            epsilon=eps,
            decay_rate_fn=b2,
        )

    def label(path: tuple[Any, ...], x: Any) -> str:
        # optax factors the two axes that come last in this order.
        layers = paths.is_stacked(paths.name(path)) and 0 in np.argsort(x.shape)[-2:]
        return "full" if layers else "factored"

    return optax.chain(
        optax.partition(
            {"factored": rms(True), "full": rms(False)},
            lambda params: jax.tree_util.tree_map_with_path(label, params),
        ),
        optax.ema(momentum, debias=False, accumulator_dtype=mu_dtype),
    )


def update_ema(average: Any, params: Any, decay: float) -> Any:
    """The next moving average: decay x average + (1 - decay) x params.

    Start it from the initial parameters: then it needs no correction of a bias, and
    what does not change, as a frozen layer, stays equal to the bit.
    """
    return jax.tree.map(lambda a, p: a + (1 - decay) * (p - a), average, params)


def fill_ema(average: Any, params: Any) -> Any:
    """The parameters, each its mean if that is kept: a frozen one is its own."""
    means = paths.flatten(average)
    return jax.tree_util.tree_map_with_path(
        lambda path, p: means.get(paths.name(path), p), params
    )


OPTIMIZERS = {"adamw": adamw, "adafactor": adafactor}
