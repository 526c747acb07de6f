"""Fills freshly initialised parameters from those of another run, by path pattern.

Nothing is silent: every parameter of both sides is in the table that comes back.
D width.
"""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from etils import epath
from jax.sharding import NamedSharding, PartitionSpec

from navit_jax import checkpoint, paths, saved_steps, storage
from navit_jax.config import nearest
from navit_jax.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class Origin:
    """Where one parameter came from.

    Attributes:
      name: Its path; the source's for an unused one.
      how: `loaded`, `interpolated`, `copied`, `initialised` or `unused`.
      source: The path and shape in the source; "" for an initialised one.
      shape: Its shape.
    """

    name: str
    how: str
    source: str
    shape: tuple[int, ...]


def check_begin(config: Mapping[str, Any], workdir: epath.Path) -> None:
    """As `check_section`, of a run that will read it: there is nothing saved."""
    resume = config.get("checkpoint", {}).get("resume")
    if not resume and not saved_steps.find(workdir / "checkpoints"):
        check_section(config["model"].get("init"))


def check_section(section: Mapping[str, Any] | None) -> None:
    """Refuses a section `model.init` whose source is not there; nothing is read.

    Raises:
      ConfigError: neither or both of weights and workdir are given, or there is none.
    """
    if not section:
        return
    workdir, weights = section.get("workdir", ""), section.get("weights", "")
    if bool(workdir) == bool(weights):
        raise ConfigError("config.model.init: give workdir or weights, one of them")
    if weights:
        # Not above: that package reports by this module.
        from navit_jax.weights import fetch

        try:
            path = fetch.find(weights)
        except ConfigError as error:
            raise ConfigError(f"config.model.init.weights: {error}") from error
        if not path.exists():
            raise ConfigError(f"config.model.init.weights: there is no {path}")
    elif not saved_steps.find(epath.Path(workdir) / "checkpoints"):
        raise ConfigError(
            f"config.model.init.workdir={workdir!r} has no checkpoint: give the folder "
            "of a run that has saved"
        )


def load_params(
    params: Any,
    source: Any,
    rules: Sequence[Any] = ((r"(.*)", r"\1"),),
    resample: Sequence[Any] = (),
    allow_unused: Sequence[str] = (),
) -> tuple[Any, list[Origin]]:
    """Fills parameters from a source.

    Args:
      params: Freshly initialised parameters, a nested dict; dtypes and shardings of the
        result are theirs. What is a `jax.ShapeDtypeStruct` stays one, and is not told.
      source: The parameters of another run, a nested dict.
      rules: (pattern of a path in params, path in the source) pairs; the first match
        wins, groups may be used as in `re.sub`, and "" keeps the parameter as it was
        initialised. So does a path that the source does not have.
      resample: (pattern, "interpolate" or "copy") pairs for tables of positions whose
        length differs, see RESAMPLERS.
      allow_unused: Patterns of source paths that may be left over.

    Returns:
      The parameters, and where each came from; print it with `format_table`.

    Raises:
      ConfigError: a shape differs and no pair of `resample` covers it, something in the
        source is left over, or a pattern matches nothing.
    """
    targets, given = paths.flatten(params), paths.flatten(source)
    templates = paths.pick(rules, targets, "", "model.init.rules")
    methods = paths.pick(resample, targets, "", "model.init.resample")
    where = "model.init.allow_unused"
    allowed = [paths.compile_pattern(pattern, where) for pattern in allow_unused]
    filled, origins, used = {}, [], set()
    for name, fresh in targets.items():
        wanted = _source_name(name, rules) if templates[name] else ""
        if wanted in given:
            used.add(wanted)
        if isinstance(fresh, jax.ShapeDtypeStruct):
            filled[name] = fresh
            continue
        if wanted not in given:
            filled[name] = fresh
            origins.append(Origin(name, "initialised", "", tuple(fresh.shape)))
            continue
        value = np.asarray(given[wanted])
        how = "loaded"
        if value.shape != fresh.shape:
            value, how = _resample(name, value, fresh, methods[name])
        value = np.asarray(value, fresh.dtype)
        filled[name] = jax.device_put(value, fresh.sharding)
        origin = f"{wanted} {given[wanted].shape}"
        origins.append(Origin(name, how, origin, tuple(fresh.shape)))
    unused = [name for name in given if name not in used]
    for name in unused:
        origins.append(Origin(name, "unused", name, tuple(given[name].shape)))
    refused = [n for n in unused if not any(p.fullmatch(n) for p in allowed)]
    if refused:
        raise ConfigError(
            f"{len(refused)} parameters of the source are not used: "
            f"{', '.join(refused)}.\n{format_table(origins)}\nMap them with "
            "config.model.init.rules, or list them in config.model.init.allow_unused"
        )
    return _like(params, filled), origins


def from_run(
    params: Any,
    *,
    workdir: str = "",
    weights: str = "",
    step: int | str | None = None,
    subtree: str = "params",
    rules: Sequence[Any] = ((r"(.*)", r"\1"),),
    resample: Sequence[Any] = (),
    allow_unused: Sequence[str] = (),
) -> Any:
    """Fills parameters from another run, or a file of weights; logs where from.

    This is section `model.init` of a config.

    Args:
      params: As of `load_params`, on a mesh.
      workdir: The folder of the other run.
      weights: Instead, a file as of `weights.read`, or a name that `weights.fetch`
        knows; its parameters are `encoder/`, `head/` or `image_head/`, and of CLIP's
        texts `text/`, `text_head/`, `log_scale`, unused where there is no `text/`.
      step, subtree: As of `checkpoint.restore_params`, of a run.
      rules, resample, allow_unused: As of `load_params`.

    Raises:
      ConfigError: neither or both are given; or as of `load_params`.
    """
    check_section({"workdir": workdir, "weights": weights})
    if weights:
        # Not above: that package reports by this module.
        from navit_jax.weights import fetch, read, texts

        found, spare = read(fetch.find(weights)), []
        if "text" not in params:
            spare = [rf"{root}(/.*)?" for root in texts.ROOTS]
        filled, origins = load_params(
            params, found.params, rules, resample, [*allow_unused, *spare]
        )
        logging.info(
            "from %s, whose config.model is %s:\n%s",
            weights,
            found.model,
            format_table(origins),
        )
        return filled
    folder = storage.locate(workdir) / "checkpoints"
    mesh = jax.tree.leaves(params)[0].sharding.mesh
    everywhere = NamedSharding(mesh, PartitionSpec())
    restored = checkpoint.restore_params(
        folder, step, subtree, lambda tree: jax.tree.map(lambda _: everywhere, tree)
    )
    filled, origins = load_params(params, restored.state, rules, resample, allow_unused)
    logging.info(
        "from step %d of %s:\n%s", restored.step, workdir, format_table(origins)
    )
    return filled


def format_table(origins: Sequence[Origin]) -> str:
    """The table of origins as text, one line a parameter, and a line of counts."""
    rows = [(o.how, o.name, str(o.shape), o.source) for o in origins]
    widths = [max((len(row[i]) for row in rows), default=0) for i in range(3)]
    lines = [
        "  ".join(
            [cell.ljust(width) for cell, width in zip(row[:3], widths, strict=True)]
            + [f"<- {row[3]}" if row[3] else ""]
        ).rstrip()
        for row in rows
    ]
    kinds = sorted({o.how for o in origins})
    counts = [f"{sum(o.how == kind for o in origins)} {kind}" for kind in kinds]
    return "\n".join([*lines, ", ".join(counts)])


def _source_name(name: str, rules: Sequence[Any]) -> str:
    for pattern, template in rules:
        if re.fullmatch(pattern, name):
            try:
                return re.sub(rf"\A(?:{pattern})\Z", template, name)
            except (re.error, IndexError) as error:
                raise ConfigError(
                    f"config.model.init.rules: {template!r} for {pattern!r}: {error}"
                ) from error
    return ""


def _resample(
    name: str, value: np.ndarray, fresh: jax.Array, method: str
) -> tuple[np.ndarray, str]:
    if not method:
        raise ConfigError(
            f"{name} has shape {tuple(fresh.shape)}, the source {value.shape}: "
            "initialise it anew by a rule (pattern, '') in config.model.init.rules and "
            "allow the source's to be unused, or, for positions, name it in "
            "config.model.init.resample"
        )
    if method not in RESAMPLERS:
        raise ConfigError(
            f"config.model.init.resample: {method!r}; {nearest(method, RESAMPLERS)}"
        )
    if value.ndim != fresh.ndim or value.shape[-1] != fresh.shape[-1]:
        raise ConfigError(
            f"{name} of shape {tuple(fresh.shape)} can not be resampled from "
            f"{value.shape}: rank and width must agree"
        )
    return RESAMPLERS[method](value, fresh)


def interpolate(table: np.ndarray, fresh: jax.Array) -> tuple[np.ndarray, str]:
    """Stretches a table [length D] linearly, or [side side D] bilinearly.

    Entries are points at half-integer places of [0, length], as pixels are; beyond the
    outermost the value stays. No smoothing before shrinking (antialias is off).
    """
    resized = jax.image.resize(
        jnp.asarray(table, jnp.float32), fresh.shape, "linear", antialias=False
    )
    return np.asarray(resized), "interpolated"


def copy(table: np.ndarray, fresh: jax.Array) -> tuple[np.ndarray, str]:
    """Copies the entries that both tables have; further ones stay as initialised.

    For absolute positions, where entry i means place i at every length.
    """
    sizes = zip(table.shape, fresh.shape, strict=True)
    shared = tuple(slice(min(pair)) for pair in sizes)
    result = np.array(fresh)
    result[shared] = table[shared]
    return result, "copied"


def _like(params: Any, leaves: Mapping[str, Any]) -> Any:
    return jax.tree.unflatten(jax.tree.structure(params), list(leaves.values()))


RESAMPLERS = {"interpolate": interpolate, "copy": copy}
