"""Turns the axes of a tensor of another library into ours, and back.

`how` is as in `layouts.py`. D width, H heads, K head width.
"""

import numpy as np
from jaxtyping import Float


def to_ours(
    value: Float[np.ndarray, "..."], how: str, kernel: bool, num_heads: int, flax: bool
) -> Float[np.ndarray, "..."]:
    """Our array; `kernel` False is a bias, or the tensor of a norm.

    Args:
      num_heads: H; 0: as many as are 64 wide.
      flax: Whether kernels are (in, out).
    """
    how, _, part = how.partition(" ")
    if part:
        index, parts = map(int, part.split("/"))
        value = np.split(value, parts)[index]
    if how in ("rows", "table"):
        rows = value.reshape(-1, value.shape[-1])
        return rows if how == "rows" else rows[None]
    if how in ("plain", "norm"):
        return value.reshape(-1)
    if how == "pairs":
        return value.reshape(-1, 2)
    if how == "window":
        return value.transpose(2, 3, 1, 0) if kernel else value
    num_heads = num_heads or max(len(value) // 64, 1)
    if not kernel:
        return value.reshape(num_heads, -1) if how == "heads" else value.reshape(-1)
    if how == "patches":
        if value.ndim == 4:
            value = value if flax else value.transpose(2, 3, 1, 0)
            return value.reshape(-1, value.shape[-1])
        return value if flax else value.T
    if how == "heads":
        value = value if flax else value.T
        return value.reshape(len(value), num_heads, -1)
    if how == "merge":
        value = value if flax else value.T
        return value.reshape(num_heads, -1, value.shape[-1])
    # Files before flax's Linen have axes of 1 x 1 windows.
    return value.reshape(value.shape[-2:]) if flax else value.T


def to_torch(
    value: Float[np.ndarray, "..."], how: str, kernel: bool
) -> Float[np.ndarray, "..."]:
    """The tensor of a module of torch, of `how` without parts."""
    if how == "rows":
        return value[None]
    if how in ("plain", "norm") or not kernel:
        return value.reshape(-1)
    if how == "patches":
        side = round((len(value) / 3) ** 0.5)
        return value.reshape(side, side, 3, -1).transpose(3, 2, 0, 1)
    if how == "heads":
        return value.reshape(len(value), -1).T
    if how == "merge":
        return value.reshape(-1, value.shape[-1]).T
    return value.T
