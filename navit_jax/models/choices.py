"""Picks what a config names, among the literal dictionary of what there is."""

from collections.abc import Mapping
from typing import TypeVar

from navit_jax.config import nearest
from navit_jax.errors import ConfigError

Choice = TypeVar("Choice")


def pick(field: str, name: str, choices: Mapping[str, Choice]) -> Choice:
    """Returns `choices[name]`.

    Raises:
      ConfigError: there is no such choice; names `field`, the value and the nearest.
    """
    if name not in choices:
        raise ConfigError(f"config.{field}={name!r}: {nearest(str(name), choices)}")
    return choices[name]
