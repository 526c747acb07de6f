"""Peak matrix-product rate of a device, what model FLOPs utilisation is a share of."""

import math
import time
from typing import Any

import jax
import numpy as np
from absl import logging
from jax.sharding import AxisType

# Dense bfloat16 FLOP/s a chip, from the vendors' data sheets.
PEAK_BFLOAT16 = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
    "NVIDIA A100": 312e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
}


def peak_flops(device: Any) -> float:
    """FLOP/s of one device: from the table by the longest matching name.

    On a CPU the rate depends on the machine, so a float32 product of 1024 x 1024 is
    timed (about 50 ms) and shared evenly among the forced devices of the process. Of
    another accelerator that is not in the table it is a NaN: a product too small or of
    another precision would make a utilisation that looks like one and is none.
    """
    matches = [name for name in PEAK_BFLOAT16 if device.device_kind.startswith(name)]
    if matches:
        return PEAK_BFLOAT16[max(matches, key=len)]
    if device.platform != "cpu":
        logging.warning(
            "MFU is not reported: the peak of %r is not known; add it to the table of "
            "navit_jax/peak_flops.py",
            device.device_kind,
        )
        return math.nan
    side, times = 1024, []
    # A mesh of this device alone, or an ambient one would take the product everywhere.
    with jax.set_mesh(
        jax.make_mesh((1,), ("all",), (AxisType.Auto,), devices=[device])
    ):
        x = jax.device_put(np.ones((side, side), np.float32), device)
        product = jax.jit(lambda x: x @ x)
        product(x).block_until_ready()
        for _ in range(5):
            begun = time.perf_counter()
            product(x).block_until_ready()
            times.append(time.perf_counter() - begun)
    # The forced devices of one CPU share its cores.
    return 2 * side**3 / min(times) / jax.local_device_count()
