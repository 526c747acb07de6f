"""Means as (total, weight) until the last moment: with packing, the number of images
differs by row, device and step, so a mean of means is always wrong.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Integer, Real

from navit_jax.batch import pytree


@pytree
class Mean:
    """A weighted sum and its weight; `a + b` joins two, `result()` divides.

    Attributes:
      total: Sum of value x weight, or an array of such terms.
      weight: Sum of the weights, or an array of them; images, or tokens.
    """

    total: Any
    weight: Any

    def __add__(self, other: "Mean") -> "Mean":
        return Mean(total=self.total + other.total, weight=self.weight + other.weight)

    def result(self) -> float:
        """The mean; nan of nothing."""
        weight = float(self.weight)
        return float(self.total) / weight if weight else float("nan")


def masked(values: Float[Array, "*S"], mask: Bool[Array, "*S"]) -> Mean:
    """The terms of a mean, not summed yet: values where the mask is set."""
    total = jnp.where(mask, values, 0).astype(jnp.float32)
    return Mean(total=total, weight=mask.astype(jnp.float32))


def fold(terms: Mean) -> Mean:
    """Sums the terms of a mean."""
    return jax.tree.map(jnp.sum, terms)


def interval_by_group(
    values: Real[np.ndarray, " M"],
    weights: Real[np.ndarray, " M"],
    groups: Integer[np.ndarray, " M"],
    num_samples: int = 2000,
) -> tuple[float, float]:
    """A 95 % interval of sum(values) / sum(weights) that knows of near-duplicates.

    Groups, not images, are drawn with replacement (the percentile bootstrap, Efron and
    Tibshirani 1993, chapter 13), with a fixed seed.
    """
    _, group = np.unique(groups, return_inverse=True)
    sums = np.stack([np.bincount(group, each) for each in (values, weights)], 1)
    num = len(sums)
    rng, means = np.random.default_rng(0), []
    for _ in range(num_samples):
        # One by one: all at once are 2 GB for 50,000 pictures.
        total, weight = rng.multinomial(num, np.full(num, 1 / num)) @ sums
        means.append(total / max(weight, 1))
    low, high = np.quantile(means, (0.025, 0.975))
    return float(low), float(high)


def hits(
    scores: Float[Array, "*S C"], labels: Int[Array, "*S K"]
) -> Float[Array, "*S"]:
    """1 where the highest score is one of the labels; -1 fills unused labels."""
    best = scores.argmax(-1)
    return (best[..., None] == labels).any(-1).astype(jnp.float32)
