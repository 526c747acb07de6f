"""Errors that end a run, each with the exit code that launchers act on.

0 done, 2 wrong use or config, 3 data below the quality limit, 4 numbers not finite,
5 no usable checkpoint, 42 saved after preemption: start me again, 43 hung, 44
another process of the run was lost: start me again.
"""


class ConfigError(ValueError):
    """The user's config or command is wrong: names the field, the value, the remedy."""

    exit_code = 2


class TooLarge(ConfigError):
    """A resolution is more than the positions, or a row, can hold.

    Attributes:
      text: The message without its subject, what asked for it.
    """

    def __init__(self, text: str, asked: str = "data.resolution"):
        super().__init__(f"{asked} {text}")
        self.text = text


class DataError(ValueError):
    """The data are below the quality limit, or a record breaks its contract."""

    exit_code = 3


class NumericsError(ArithmeticError):
    """Too many steps whose loss or gradient was not finite."""

    exit_code = 4


class CheckpointError(RuntimeError):
    """No checkpoint of the run can be used."""

    exit_code = 5


PREEMPTED = 42
HUNG = 43
LOST_PEER = 44
