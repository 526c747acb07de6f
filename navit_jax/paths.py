"""Names the leaves of a tree by their path and picks values for them by pattern.

A path is the names on the way to a leaf joined by "/", as in `encoder/embed/kernel`.
A pattern is a regular expression that must match the whole path. Of a list of
(pattern, value) pairs the first that matches wins.
"""

import math
import re
from collections.abc import Iterable, Sequence
from typing import Any

import jax
from clu import parameter_overview

from navit_jax.config import nearest
from navit_jax.errors import ConfigError


def name(path: tuple[Any, ...]) -> str:
    """The "/"-joined name of a path that `jax.tree_util` gives."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def flatten(tree: Any) -> dict[str, Any]:
    """The leaves of a tree by name, in the order of `jax.tree.leaves`."""
    pairs = jax.tree_util.tree_flatten_with_path(tree)[0]
    leaves = {name(path): leaf for path, leaf in pairs}
    assert len(leaves) == len(pairs), "two leaves of one name"
    return leaves


def tabulate(tree: Any) -> str:
    """Name, shape and size of each array of a tree of them, and the sum."""
    table = parameter_overview.get_parameter_overview(tree, include_stats=False)
    # Its last line is a sum that has decimals if one of them is a scalar.
    table = table[: table.rindex("\n")]
    sizes = [(math.prod(x.shape), x.dtype.itemsize) for x in jax.tree.leaves(tree)]
    number, size = sum(n for n, _ in sizes), sum(n * each for n, each in sizes)
    return f"{table}\nTotal: {number:,} -- {size:,} bytes"


def nest(leaves: dict[str, Any]) -> dict[str, Any]:
    """The nested dict whose leaves have these names."""
    tree: dict[str, Any] = {}
    for path, leaf in leaves.items():
        *folders, last = path.split("/")
        node = tree
        for folder in folders:
            node = node.setdefault(folder, {})
        node[last] = leaf
    return tree


def is_stacked(path: str) -> bool:
    """Tells whether the first axis counts layers: parameters of scanned blocks."""
    return "blocks" in path.split("/")[:-1]


def parse_layers(text: str, where: str) -> slice:
    """The layers of stacked parameters that "4:", ":4" or "2:-2" stand for.

    Args:
      where: The field of the config, for messages.

    Raises:
      ConfigError: it is nothing of the kind.
    """
    if not re.fullmatch(r"(-?\d+)?:(-?\d+)?", text):
        raise ConfigError(
            f"config.{where}: layers {text!r}: write them as '4:' or ':4'"
        )
    return slice(*(int(end) if end else None for end in text.split(":")))


def pick(
    pairs: Sequence[Any], names: Iterable[str], default: Any, where: str
) -> dict[str, Any]:
    """Gives each name the value of the first pair whose pattern matches it.

    Args:
      pairs: (pattern, value); a pattern must match the whole name.
      default: The value of names without a match.
      where: The field of the config the pairs come from, for messages.

    Raises:
      ConfigError: a pattern that is no regular expression, or that gives no name its
        value, because it matches none or only what earlier patterns have taken.
    """
    names = list(names)
    compiled = [(compile_pattern(pattern, where), value) for pattern, value in pairs]
    values, used = {}, set()
    for path in names:
        values[path] = default
        for index, (pattern, value) in enumerate(compiled):
            if pattern.fullmatch(path):
                values[path] = value
                used.add(index)
                break
    for index, (pattern, _) in enumerate(compiled):
        if index not in used:
            taken = any(pattern.fullmatch(path) for path in names)
            reason = (
                "matches only parameters that earlier patterns have taken: put it first"
                if taken
                else "matches no parameter (a pattern must match the whole path); "
                + nearest(pattern.pattern, names)
            )
            raise ConfigError(f"config.{where}: pattern {pattern.pattern!r} {reason}")
    return values


def compile_pattern(pattern: str, where: str) -> re.Pattern[str]:
    """Compiles a user's pattern.

    Raises:
      ConfigError: it is no regular expression.
    """
    try:
        return re.compile(pattern)
    except re.error as error:
        raise ConfigError(
            f"config.{where}: {pattern!r} is no regular expression: {error}"
        ) from error
