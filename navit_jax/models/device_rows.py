"""Tells what the current mesh is of, which of its axes split the rows of a batch, and
keeps them so.
"""

import math

import jax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

ROW_AXES = ("replica", "fsdp")


def find_platform() -> str:
    """Where this will run: "cpu", "gpu", "tpu"; of the mesh, if there is one."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    platform = device.platform if device else jax.default_backend()
    # A device calls itself gpu in some versions of jax, cuda or rocm in others.
    return "gpu" if platform in ("cuda", "rocm") else platform


def free_axes() -> dict[str, int]:
    """The axes of the current mesh, and their sizes; none without a mesh.

    But for those that a shard_map around us has split already.
    """
    mesh = jax.sharding.get_abstract_mesh()
    kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
    return {axis: mesh.shape[axis] for axis, kind in kinds if kind != AxisType.Manual}


def row_axes(num_rows: int) -> tuple[str, ...]:
    """Those over which so many rows are split; none if they do not divide."""
    axes = {axis: size for axis, size in free_axes().items() if axis in ROW_AXES}
    return tuple(axes) if num_rows % math.prod(axes.values()) == 0 else ()


def keep_rows(x: Float[Array, "B *S D"]) -> Float[Array, "B *S D"]:
    """The same, each row on its device and there as a whole, and so its gradient.

    Left to itself, XLA may gather the rows of all devices, or swap parts of their
    width, where it takes that for cheaper than to gather parameters.
    """
    rows = row_axes(len(x))
    return jax.lax.with_sharding_constraint(x, P(rows)) if rows else x
