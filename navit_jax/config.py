"""Builds what a config section names: `name` is the factory, the rest its arguments."""

import difflib
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from ml_collections import ConfigDict

from navit_jax.errors import ConfigError


def nearest(word: str, words: Iterable[str]) -> str:
    """A hint for a misspelt word: the nearest known one, and all of them."""
    words = sorted(words)
    close = difflib.get_close_matches(word, words, n=1, cutoff=0.4)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return f"{hint}Known: {', '.join(words)}"


def call(
    factory: Callable[..., Any], arguments: Mapping[str, Any], where: str, **given: Any
) -> Any:
    """Calls `factory(**arguments, **given)`, refusing arguments it does not have.

    Args:
      where: The path of the section in the config, for messages.
      given: Arguments that come from the code, which a config must not set.

    Raises:
      ConfigError: an unknown or a missing argument, named with the nearest known one.
    """
    parameters = {
        name: p
        for name, p in inspect.signature(factory).parameters.items()
        # Linen adds two fields of its own to every module.
        if name not in ("parent", "name")
    }
    known = [name for name in parameters if name not in given]
    for key in arguments:
        if key not in known:
            raise ConfigError(f"config.{where}.{key} is unknown; {nearest(key, known)}")
    for name in known:
        if (
            parameters[name].default is inspect.Parameter.empty
            and name not in arguments
        ):
            raise ConfigError(f"config.{where}.{name} is missing; it has no default")
    return factory(**arguments, **given)


def build(
    section: Mapping[str, Any],
    choices: Mapping[str, Callable[..., Any]],
    where: str,
    **given: Any,
) -> Any:
    """Calls the factory that `section["name"]` picks, with the rest as arguments."""
    arguments = dict(section)
    name = arguments.pop("name", None)
    if name not in choices:
        raise ConfigError(
            f"config.{where}.name={name!r}: {nearest(str(name), choices)}"
        )
    return call(choices[name], arguments, where, **given)


def resolve(config: Mapping[str, Any] | ConfigDict) -> dict[str, Any]:
    """The config as plain nested dicts with every reference resolved; tuples as lists.

    It equals what `json.loads(json.dumps(...))` of it gives, so a config that was
    stored compares equal to the one that stored it.
    """
    if isinstance(config, ConfigDict):
        config = config.to_dict()
    return {str(key): _plain(value, str(key)) for key, value in config.items()}


def _plain(value: Any, where: str) -> Any:
    if isinstance(value, Mapping):
        return {str(k): _plain(v, f"{where}.{k}") for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v, where) for v in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise ConfigError(
        f"config.{where} is a {type(value).__name__}; use numbers, strings, tuples"
    )


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """`{"a": {"b": 1}}` to `{"a.b": 1}`; an empty section keeps its own key."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def differences(
    old: Mapping[str, Any], new: Mapping[str, Any]
) -> list[tuple[str, Any, Any]]:
    """(path, old, new) of every key that differs; a missing one is "unset"."""
    a, b = flatten(old), flatten(new)
    return [
        (key, a.get(key, "unset"), b.get(key, "unset"))
        for key in sorted(a.keys() | b.keys())
        if a.get(key, "unset") != b.get(key, "unset")
    ]
