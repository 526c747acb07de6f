"""Copies parameters of one part of a tree to another, whole or some layers of them.

A student that bootstraps from a teacher begins with the teacher's last blocks.
"""

import re
from collections.abc import Sequence
from typing import Any

import jax

from navit_jax import paths
from navit_jax.config import nearest
from navit_jax.errors import ConfigError

WHERE = "task.inherit"


def inherit(params: Any, rules: Sequence[Any]) -> Any:
    """The parameters, those that a rule names replaced by a copy of others.

    Args:
      params: A nested dict of arrays, or of shapes.
      rules: (pattern of a path, path in the same tree) pairs; the first match wins, and
        groups may be used as in `re.sub`. A path may end in the layers that are taken
        of stacked parameters: r"teacher/blocks/\\1[4:]".

    Raises:
      ConfigError: a rule matches nothing, or names what is not there or has another
        shape.
    """
    leaves = paths.flatten(params)
    wanted = paths.pick(rules, leaves, "", WHERE)
    patterns = [paths.compile_pattern(pattern, WHERE) for pattern, _ in rules]
    copied = {}
    for name, leaf in leaves.items():
        copied[name] = leaf
        if not wanted[name]:
            continue
        pattern = next(p for p in patterns if p.fullmatch(name))
        source, layers = _split(pattern.sub(wanted[name], name))
        if source not in leaves:
            raise ConfigError(
                f"config.{WHERE}: {name} is to be as {source}: "
                + nearest(source, leaves)
            )
        found = leaves[source][layers] if layers else leaves[source]
        if found.shape != leaf.shape:
            raise ConfigError(
                f"config.{WHERE}: {name} has shape {leaf.shape}, {source} "
                f"{found.shape}: choose the layers, as {source}[4:], or the sizes of "
                "config.model and config.task.teacher, so that they agree"
            )
        copied[name] = found.astype(leaf.dtype)
    return jax.tree.unflatten(jax.tree.structure(params), list(copied.values()))


def _split(path: str) -> tuple[str, slice | None]:
    """A path, and the layers that its end asks for."""
    match = re.fullmatch(r"(.*)\[(-?\d*:-?\d*)\]", path)
    if match is None:
        return path, None
    return match[1], paths.parse_layers(match[2], WHERE)
