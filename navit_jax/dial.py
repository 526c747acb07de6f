"""The dials between cost and quality of a model.

A side, or a number of patches; of a SparseFormer its number of latent tokens too.
"""

import dataclasses
import numbers
from collections.abc import Mapping
from typing import Any

from navit_jax import config as config_lib
from navit_jax import experiment, models
from navit_jax.data import resolution
from navit_jax.errors import ConfigError

Side = float | int | str | None


def choose_law(
    config: Mapping[str, Any], side: Side = None, tokens: float | int | None = None
) -> resolution.Law:
    """The resolution that a dial stands for.

    Args:
      config: Of the run, whose largest side it is without a dial.
      side: In pixels, of the square with the picture's area; "native": its own.
      tokens: The most patches of a picture.

    Raises:
      ConfigError: both are given, or the model's positions do not reach so far.
    """
    if side is not None and tokens is not None:
        raise ConfigError(f"side={side} and tokens={tokens}: give one of them")
    if side is None and tokens is None:
        section = config["data"]["resolution"]
        law = config_lib.build(section, resolution.LAWS, "data.resolution")
        return law if law.largest is None else resolution.Fixed(law.largest)
    if side == "native":
        return resolution.Native()
    patch = models.patch_size(config["model"]["size"])
    longest = experiment.build_encoder(config).max_side
    asked: resolution.Law
    # True is a number to Python, of 1 pixel or token.
    if side is not None:
        if isinstance(side, str | bool) or not isinstance(side, numbers.Real):
            raise ConfigError(f"side={side!r}: give pixels, or 'native'")
        asked, given = resolution.Fixed(side), f"side={side}"
    else:
        if isinstance(tokens, bool) or not isinstance(tokens, numbers.Integral):
            raise ConfigError(f"tokens={tokens!r}: give a whole number")
        asked, given = resolution.Budget(int(tokens), patch), f"tokens={tokens}"
    if (asked.largest or 0) >= (longest + 1) * patch:
        raise ConfigError(
            f"{given}: the positions of this model reach {longest} patches of "
            f"{patch} pixels, so at most side={longest * patch} or "
            f"tokens={longest**2}"
        )
    return asked


def set_latents(model: Any, count: float | int) -> Any:
    """The predictor with another number of latent tokens an image, and no new weights.

    The learned tables of boxes and embeddings are interpolated (arXiv 2304.03768), so
    that any number begins with boxes that differ: on a grid as square as the number
    has factors. 48 is 8 x 6, and 47 a line across the middle of the picture.

    Args:
      model: A `Predictor`.

    Raises:
      ConfigError: its encoder is no SparseFormer, or no such number.
    """
    encoder = model.task.encoder
    if not isinstance(encoder, models.SparseFormer):
        raise ConfigError(
            f"count={count}: this model has no latent tokens; its dials are side and "
            "tokens"
        )
    whole = isinstance(count, numbers.Integral) and not isinstance(count, bool)
    if not whole or count < 1:
        raise ConfigError(f"count={count!r}: give a number of latent tokens")
    changes = {"counts": (int(count),), "allot": "fixed", "latents": None}
    config = {**model.config, "model": {**model.config["model"], **changes}}
    task = dataclasses.replace(model.task, encoder=encoder.clone(**changes))
    return dataclasses.replace(model, config=config, task=task)
