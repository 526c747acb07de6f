"""Builds what a config section names: `name` is the factory, the rest its arguments."""

import difflib
import inspect
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from navit_jax.errors import ConfigError


def nearest(word: str, words: Iterable[str]) -> str:
    """A hint for a misspelt word: the nearest known one, and all of them."""
    words = sorted(words)
    close = difflib.get_close_matches(word, words, n=1, cutoff=0.4)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return f"{hint}Known: {', '.join(words) or '(none)'}"


def check(
    arguments: Mapping[str, Any],
    factories: Sequence[Callable[..., Any]],
    where: str,
    given: Collection[str] = (),
) -> None:
    """Refuses arguments that do not fit what the factories take together.

    Args:
      where: The path of the section in the config, for messages.
      given: Arguments that come from the code, which a config must not set.

    Raises:
      ConfigError: an unknown argument, named with the nearest known one; a missing one;
        text where the default is a number, or the other way round.
    """
    parameters: dict[str, inspect.Parameter] = {}
    for factory in factories:
        parameters.update(inspect.signature(factory).parameters)
    # Linen adds two fields of its own to every module.
    hidden = {"parent", "name", *given}
    known = {name: p for name, p in parameters.items() if name not in hidden}
    for key, value in arguments.items():
        if key not in known:
            raise ConfigError(f"config.{where}.{key} is unknown; {nearest(key, known)}")
        default, annotation = known[key].default, known[key].annotation
        number = isinstance(value, int | float) and not isinstance(value, bool)
        for kind, fits, name in (
            (bool, isinstance(value, bool), "True or False"),
            (int | float, number, "a number"),
            (str, isinstance(value, str), "text"),
        ):
            if isinstance(default, kind):
                if not fits and value is not None:
                    raise ConfigError(f"config.{where}.{key}={value!r}: give {name}")
                break
        if annotation is int and (isinstance(value, float) or not number):
            raise ConfigError(f"config.{where}.{key}={value!r}: give a whole number")
    for name, parameter in known.items():
        if parameter.default is inspect.Parameter.empty and name not in arguments:
            raise ConfigError(f"config.{where}.{name} is missing; it has no default")


def call(
    factory: Callable[..., Any], arguments: Mapping[str, Any], where: str, **given: Any
) -> Any:
    """Calls `factory(**arguments, **given)` after `check`."""
    check(arguments, [factory], where, given)
    return factory(**arguments, **given)


def choose(
    section: Mapping[str, Any], choices: Mapping[str, Callable[..., Any]], where: str
) -> tuple[Callable[..., Any], dict[str, Any]]:
    """The factory that `section["name"]` picks, and the rest of the section."""
    arguments = dict(section)
    name = arguments.pop("name", None)
    if name not in choices:
        raise ConfigError(
            f"config.{where}.name={name!r}: {nearest(str(name), choices)}"
        )
    return choices[name], arguments


def build(
    section: Mapping[str, Any],
    choices: Mapping[str, Callable[..., Any]],
    where: str,
    **given: Any,
) -> Any:
    """Calls the factory that `section["name"]` picks, with the rest as arguments."""
    factory, arguments = choose(section, choices, where)
    return call(factory, arguments, where, **given)


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


def sections(
    config: Mapping[str, Any], prefix: str = ""
) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """(path, section) of each section, at any depth, outer ones first."""
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield f"{prefix}{key}", value
            yield from sections(value, f"{prefix}{key}.")


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
