"""Learning rates by step: a law after a linear warmup, times a linear cooldown to 0.

With t the step from 0, W the steps of warmup, C of cooldown and S of the run:
  rate(t) = peak x min(1, t / W) x law(max(0, t - W)) x clip((S - t) / C, 0, 1)
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from navit_jax.errors import ConfigError


def reciprocal_sqrt(
    peak: float,
    steps: int,
    *,
    timescale: int = 10_000,
    warmup: int | float = 0,
    cooldown: int | float = 0,
) -> optax.Schedule:
    """Falls as 1 / sqrt(1 + s / timescale), s the steps after the warmup.

    It does not depend on the length of the run until the cooldown, so runs of several
    lengths can branch off one (NaViT section 3.1).
    """
    return _shape(
        lambda s: (1 + s / timescale) ** -0.5, peak, steps, warmup, cooldown, timescale
    )


def cosine(
    peak: float,
    steps: int,
    *,
    warmup: int | float = 0,
    cooldown: int | float = 0,
    floor: int | float = 0,
) -> optax.Schedule:
    """Falls as half a cosine from the end of the warmup to the end of the run.

    Args:
      floor: Where it ends, as a share of the peak.
    """
    after = steps - in_steps(warmup, steps, "warmup")

    def law(s: jax.Array) -> jax.Array:
        wave = 0.5 * (1 + jnp.cos(jnp.pi * jnp.clip(s / max(after, 1), 0, 1)))
        return floor + (1 - floor) * wave

    return _shape(law, peak, steps, warmup, cooldown)


def constant(
    peak: float, steps: int, *, warmup: int | float = 0, cooldown: int | float = 0
) -> optax.Schedule:
    """Stays at its peak between warmup and cooldown."""
    return _shape(jnp.ones_like, peak, steps, warmup, cooldown)


def in_steps(value: int | float, steps: int, field: str) -> int:
    """A number of steps, from a number of steps or from a share of `steps` below 1.

    A float is a share below 1 and a whole number of steps above it: an override of a
    share on the command line becomes a float.

    Raises:
      ConfigError: a negative value, 1.0, or a float above it that is not whole.
    """
    if value < 0:
        raise ConfigError(f"config.optim.schedule.{field}={value} is negative")
    if isinstance(value, float):
        if value < 1:
            return round(value * steps)
        if value == 1 or not value.is_integer():
            raise ConfigError(
                f"config.optim.schedule.{field}={value}: give a share of all steps, "
                "below 1, or a whole number of steps"
            )
    return int(value)


def _shape(
    law: Callable[[jax.Array], jax.Array],
    peak: float,
    steps: int,
    warmup: int | float,
    cooldown: int | float,
    timescale: int = 1,
) -> optax.Schedule:
    W = in_steps(warmup, steps, "warmup")
    C = in_steps(cooldown, steps, "cooldown")
    if steps < W + C:
        raise ConfigError(
            f"config.optim.schedule: warmup={warmup} and cooldown={cooldown} are "
            f"{W} + {C} steps, more than config.steps={steps}"
        )
    if timescale < 1:
        raise ConfigError(f"config.optim.schedule.timescale={timescale} is below 1")

    def rate(count: jax.typing.ArrayLike) -> jax.Array:
        t = jnp.asarray(count, jnp.float32)
        up = jnp.minimum(1, t / W) if W else 1.0
        down = jnp.clip((steps - t) / C, 0, 1) if C else 1.0
        return peak * up * law(jnp.maximum(0, t - W)) * down

    return rate


SCHEDULES = {
    "reciprocal_sqrt": reciprocal_sqrt,
    "cosine": cosine,
    "constant": constant,
}
