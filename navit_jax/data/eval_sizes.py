"""The sizes at which an evaluation set asks to be judged."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from navit_jax.errors import ConfigError


def laws(
    section: Mapping[str, Any], where: str, patch: int
) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """(label, what asks for it, section of the law) of each size of a set.

    Args:
      section: With `sides`, in pixels or "native", or `budgets`, most patches an image.
      where: Its path in the config, for messages.

    Raises:
      ConfigError: no size is given, or one that is none.
    """
    sizes: dict[str, Sequence[Any]] = {"sides": (), "budgets": ()}
    for key in sizes:
        values = sizes[key] = section.get(key, ())
        if isinstance(values, str) or not isinstance(values, Sequence):
            raise ConfigError(f"config.{where}.{key}={values!r}: give a list, as (64,)")
    if not any(sizes.values()):
        raise ConfigError(
            f"config.{where}.sides: give at least one, as (64, 'native'), or budgets, "
            "as (49, 196)"
        )
    for side in sizes["sides"]:
        number = isinstance(side, int | float) and not isinstance(side, bool)
        if side != "native" and not (number and 0 < side < math.inf):
            raise ConfigError(
                f"config.{where}.sides: {side!r}: give pixels or 'native'"
            )
        fixed = {"name": "fixed", "side": side}
        law = {"name": "native"} if side == "native" else fixed
        yield str(side), f"sides={side}", law
    for tokens in sizes["budgets"]:
        if type(tokens) is not int or tokens < 1:
            raise ConfigError(f"config.{where}.budgets: {tokens!r}: give whole numbers")
        law = {"name": "budget", "tokens": tokens, "patch": patch}
        yield f"{tokens}tokens", f"budgets={tokens}", law
