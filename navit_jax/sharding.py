"""Places parameters, optimizer states and batches on a mesh of devices.

A mesh has the axes (replica, fsdp, tensor). Rows of a batch are split over (replica,
fsdp), attention heads and MLP hidden units over tensor, the width D over fsdp. H heads,
K head width, F hidden units.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from absl import logging
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from navit_jax import paths
from navit_jax.errors import ConfigError

AXES: tuple[str, ...] = ("replica", "fsdp", "tensor")
ROWS = ("replica", "fsdp")

# (pattern, axes of the last dimensions of a parameter); the first match wins, and one
# without a match, or with fewer dimensions than the axes, is replicated.
RULES: tuple[tuple[str, tuple["str | None", ...]], ...] = (
    (r".*/(query|key|value)/kernel", ("fsdp", "tensor", None)),  # D H K
    (r".*/(query|key|value)/bias", ("tensor", None)),  # H K
    (r".*/out/kernel", ("tensor", None, "fsdp")),  # H K D
    (r".*/mlp/up/kernel", ("fsdp", "tensor")),  # D F
    (r".*/mlp/up/bias", ("tensor",)),  # F
    (r".*/mlp/down/kernel", ("tensor", "fsdp")),  # F D
    (r"(.*/)?(head/dense|image_head|text_head)/kernel", ("fsdp", None)),  # D C, D E
    (r"(.*/)?(kernel|embedding)", (None, "fsdp")),  # P D
)


def make_mesh(
    replica: int = 1,
    fsdp: int = -1,
    tensor: int = 1,
    devices: Sequence[Any] | None = None,
) -> Mesh:
    """The mesh (replica, fsdp, tensor) over all devices; -1 is what the others leave.

    Of several slices of TPUs, replicas alone are split over them: between slices is the
    slow network, which then carries gradients and nothing else.

    Raises:
      ConfigError: the sizes do not make up the number of devices, or replicas that of
        slices; it names those that would.
    """
    devices = jax.devices() if devices is None else list(devices)
    sizes = dict(zip(AXES, (replica, fsdp, tensor), strict=True))
    total = len(devices)
    asked = ", ".join(f"{axis}={size}" for axis, size in sizes.items())
    free = [axis for axis, size in sizes.items() if size == -1]
    for axis, size in sizes.items():
        if size < 1 and size != -1:
            raise ConfigError(f"config.mesh.{axis}={size}: take 1 or more, or -1")
    if len(free) > 1:
        raise ConfigError(f"config.mesh ({asked}): only one axis may be -1")
    fixed = math.prod(size for size in sizes.values() if size != -1)
    if free and total % fixed == 0:
        sizes[free[0]] = total // fixed
    elif free or fixed != total:
        raise ConfigError(
            f"config.mesh ({asked}) does not make up {total} devices; "
            + _possible(sizes, total)
        )
    shape, types = tuple(sizes.values()), (AxisType.Auto,) * len(AXES)
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if slices == 1:
        return jax.make_mesh(shape, AXES, types, devices=devices)
    if devices[0].platform != "tpu":
        # Each host of CPUs or GPUs counts as a slice, which `jax.make_mesh` refuses.
        return Mesh(np.asarray(devices, object).reshape(shape), AXES, types)
    if shape[0] % slices:
        raise ConfigError(
            f"config.mesh.replica={shape[0]}: the devices are {slices} slices, and "
            f"replicas alone are split over them: take a multiple of {slices}"
        )
    within, across = (shape[0] // slices, *shape[1:]), (slices, 1, 1)
    return Mesh(
        mesh_utils.create_hybrid_device_mesh(within, across, devices), AXES, types
    )


def _possible(sizes: Mapping[str, int], total: int) -> str:
    """For each axis, the sizes nearest to its own that fit when only it changes."""
    hints = []
    for axis, size in sizes.items():
        others = math.prod(n for name, n in sizes.items() if name != axis and n > 0)
        if size == -1 or total % others:
            continue
        free = -1 in sizes.values()
        fits = _divisors(total // others) if free else [total // others]
        hints.append(f"{axis}={_join(_nearest(size, fits))}")
    return "possible: " + (
        " or ".join(hints) or f"{AXES[1]}=-1 with the other axes 1 ({total} in all)"
    )


def rows_per_step(rows: int, mesh: Mesh, accumulate: int = 1) -> int:
    """The global rows of one of `accumulate` parts of a batch of `rows` rows.

    Raises:
      ConfigError: the rows are not whole on each device in each part; it names the
        nearest values that are.
    """
    devices = math.prod(mesh.shape[axis] for axis in ROWS)
    if accumulate < 1:
        raise ConfigError(f"accumulate={accumulate}: take 1 or more")
    whole = devices * accumulate
    if rows < 1 or rows % whole:
        near = [n for n in (rows // whole * whole, -(-rows // whole) * whole) if n]
        parts = [
            n for n in _divisors(max(rows, 1)) if rows > 0 and rows % (devices * n) == 0
        ]
        remedy = f"data.rows={_join(sorted(set(near)) or [whole])}"
        if parts:
            remedy += f", or accumulate={_join(_nearest(accumulate, parts))}"
        raise ConfigError(
            f"config.data.rows={rows} is no multiple of {whole} = {devices} devices "
            f"that split rows x accumulate {accumulate}; the nearest values: {remedy}"
        )
    return rows // accumulate


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


def _nearest(wanted: int, values: Sequence[int]) -> list[int]:
    """The largest value up to the wanted one, and the smallest from it."""
    below = [n for n in values if n <= wanted][-1:]
    above = [n for n in values if n >= wanted][:1]
    return sorted({*below, *above})


def _join(values: Sequence[int]) -> str:
    return " or ".join(map(str, values))


def param_specs(params: Any, mesh: Mesh, rules: Sequence[Any] = RULES) -> dict[str, P]:
    """The axes each parameter is split over, by its path.

    A rule's axes are those of the parameter's last dimensions, so the layer axis that
    scanned blocks have in front is never split. A dimension that its axis does not
    divide is kept whole, and logged.

    Args:
      params: The parameters, or their shapes and dtypes.
      rules: (pattern, axes) pairs.
    """
    specs, whole = {}, []
    compiled = [(paths.compile_pattern(p, "mesh.rules"), axes) for p, axes in rules]
    for name, leaf in paths.flatten(params).items():
        own = len(leaf.shape) - paths.is_stacked(name)
        axes = next((axes for p, axes in compiled if p.fullmatch(name)), ())
        axes = axes if len(axes) <= own else ()
        spec = [*[None] * (len(leaf.shape) - len(axes)), *axes]
        for dim, axis in enumerate(spec):
            if axis and leaf.shape[dim] % mesh.shape[axis]:
                spec[dim] = None
                whole.append(f"{name} {leaf.shape} over {axis}={mesh.shape[axis]}")
        specs[name] = P(*spec)
    if whole:
        logging.info("Kept whole, the axis does not divide: %s", "; ".join(whole))
    return specs


def state_shardings(
    state: Any, params: Any, mesh: Mesh, rules: Sequence[Any] = RULES
) -> Any:
    """A sharding for each leaf of a state: parameters, and what goes with them.

    A leaf whose path ends in a parameter's path takes that parameter's axes if the
    shapes agree, or those without the missing dimension if it is a factored moment.
    It may have fewer layers, those that are not frozen. Everything else is replicated.

    Args:
      state: A tree of shapes and dtypes: parameters, optimizer state, averages, counts.
      params: The parameters in it, or their shapes and dtypes.
    """
    shapes = {name: tuple(leaf.shape) for name, leaf in paths.flatten(params).items()}
    specs = param_specs(params, mesh, rules)

    def place_leaf(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        steps = paths.name(path).split("/")
        tails = ("/".join(steps[i:]) for i in range(len(steps)))
        name = next((tail for tail in tails if tail in shapes), None)
        if name is None:
            return NamedSharding(mesh, P())
        shape, whole = tuple(leaf.shape), shapes[name]
        if shape and paths.is_stacked(name):
            whole = (shape[0], *whole[1:])
        return NamedSharding(mesh, _fit(shape, whole, specs[name]))

    return jax.tree_util.tree_map_with_path(place_leaf, state)


def _fit(shape: tuple[int, ...], whole: tuple[int, ...], spec: P) -> P:
    """The spec for a leaf of `shape` that goes with a parameter of shape `whole`."""
    if shape == whole:
        return spec
    without = {
        tuple(axis for i, axis in enumerate(spec) if i != dim)
        for dim in range(len(whole))
        if whole[:dim] + whole[dim + 1 :] == shape
    }
    # Of a square kernel the shape does not tell which dimension is gone.
    return P(*without.pop()) if len(without) == 1 else P()


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows over (replica, fsdp), whatever dimensions follow."""
    return NamedSharding(mesh, P(ROWS))


def local_rows(mesh: Mesh, rows: int) -> np.ndarray:
    """The global rows, ascending, that this process must give to `place`.

    Processes that share rows, because tensor spans them, all give them.
    """
    places = batch_sharding(mesh).addressable_devices_indices_map((rows,)).values()
    return np.unique(np.concatenate([np.arange(rows)[place] for place in places]))


def place(batch: Any, mesh: Mesh) -> Any:
    """Makes global arrays of this process's rows: numpy in, jax.Array out."""
    rows = batch_sharding(mesh)
    return jax.tree.map(
        lambda x: jax.make_array_from_process_local_data(rows, x), batch
    )


def fetch(batch: Any, mesh: Mesh) -> Any:
    """The numpy arrays of this process's rows that `place` took."""
    local = multihost_utils.global_array_to_host_local_array(batch, mesh, P(ROWS))
    return jax.device_get(local)
