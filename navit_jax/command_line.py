"""Entry points: flags in, exit codes out (errors.py); a user's mistake is one line."""

import contextlib
import logging as std_logging
import pathlib
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from absl import app, flags, logging
from ml_collections import ConfigDict
from ml_collections.config_flags import config_flags

from navit_jax import processes
from navit_jax.errors import ConfigError


class ConfigParser(config_flags.ConfigFileFlagParser):
    """Loads a config file, open for keys and sections that it does not mention."""

    def parse(self, path: str) -> Any:
        """The config; each section that an override names is there."""
        file, colon, given = (path or "").partition(":")
        if path and not pathlib.Path(file).is_file():
            raise ValueError(f"there is no file {file}")
        try:
            config = super().parse(path)
        except (TypeError, ValueError) as error:
            # It comes with a traceback, of which the last line says it.
            said = str(error).strip().splitlines()[-1]
            if colon and "get_config() takes 0 positional arguments" in said:
                said = f"{file} takes no argument; given {given!r}"
            raise ValueError(said) from error
        if isinstance(config, ConfigDict):
            config.unlock()
            for argument in sys.argv:
                if argument.startswith(f"--{self.name}."):
                    key = argument.split("=")[0].removeprefix(f"--{self.name}.")
                    _add_sections(config, key.split(".")[:-1])
        return config


def _add_sections(config: Any, names: Sequence[str]) -> None:
    for name in names:
        if not isinstance(config, ConfigDict):
            return  # A key of a value is refused where it is set.
        if config.get(name) is None:
            config[name] = ConfigDict()
        config = config[name]


def define_config(required: bool = True) -> flags.FlagHolder:
    """Defines --config and its overrides, --config.section.key=value.

    A value has the type that the config file gives it; one of a key that the file does
    not mention is a Python literal, or else text. Nothing is evaluated. Keys that
    nothing reads are refused by `experiment.check_sections`.
    """
    holder = config_flags.DEFINE_config_file(
        "config",
        None,
        "A config file, e.g. configs/smoke.py",
        flag_values=flags.FLAGS,
        lock_config=False,
        accept_new_attributes=True,
    )
    flags.FLAGS["config"].parser = ConfigParser("config", lock_config=False)
    if required:
        flags.mark_flag_as_required("config")
    return holder


def define_step() -> Callable[[], int | str | None]:
    """Defines --step, a checkpoint: a number, `best`, or the newest if not given."""
    flag = flags.DEFINE_string("step", None, "A step, or `best`; default: the newest")

    def value() -> int | str | None:
        text = flag.value
        if text is None or text == "best":
            return text
        if not text.isdecimal():
            raise ConfigError(f"--step={text}: give a number, or best")
        return int(text)

    return value


def parse_side(text: str) -> int | float | str:
    """A side in pixels, or `native`."""
    if text == "native":
        return text
    try:
        side = float(text)
    except ValueError:
        side = 0.0
    if not 0 < side < float("inf"):
        raise ConfigError(f"side {text!r}: give pixels, as 64, or native")
    return int(side) if side == int(side) else side


def parse_counts(flag: str, texts: Sequence[str]) -> list[int]:
    """Whole numbers from 1."""
    for text in texts:
        if not text.isdecimal() or not int(text):
            raise ConfigError(f"--{flag}: {text!r} is no whole number from 1")
    return [int(text) for text in texts]


def parse_window(flag: str, texts: Sequence[str] | None) -> tuple[int, int] | None:
    """First and last step of a window; None if nothing is given."""
    if not texts:
        return None
    numbers = [int(text) for text in texts if text.isdecimal()]
    if len(texts) != 2 or len(numbers) != 2 or numbers[0] >= numbers[1]:
        raise ConfigError(f"--{flag}={','.join(texts)}: give two steps, as 10,15")
    return numbers[0], numbers[1]


def parse_answers(flag: str, texts: Sequence[str]) -> list[bool]:
    """`yes` and `no`."""
    for text in texts:
        if text not in ("yes", "no"):
            raise ConfigError(f"--{flag}: {text!r} is neither yes nor no")
    return [text == "yes" for text in texts]


@contextlib.contextmanager
def exit_codes() -> Iterator[None]:
    """Turns the errors of errors.py into their exit code and one line on stderr."""
    try:
        yield
    except Exception as error:
        code = getattr(error, "exit_code", None)
        if code is None:
            raise
        logging.debug("traceback", exc_info=True)
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        sys.exit(code)


def run(main: Callable[..., int | None], words: bool = False) -> None:
    """Parses flags, runs `main`, and ends the process with its exit code.

    Args:
      main: Takes nothing, or the list of the words beside the flags.
      words: Whether it takes them; else there must be none.
    """

    def parse(argv: list[str]) -> list[str]:
        with exit_codes():
            return _parse(argv)
        raise AssertionError("unreachable: exit_codes ends the process")

    def call(argv: list[str]) -> int | None:
        quiet_libraries()
        with processes.together(), exit_codes():
            if words:
                return main(argv[1:])
            if argv[1:]:
                raise ConfigError(f"unknown arguments {argv[1:]}; flags start with --")
            return main()

    app.run(call, flags_parser=parse)


def quiet_libraries() -> None:
    """Shows what this package says, and of libraries only what goes wrong."""
    ours = str(pathlib.Path(__file__).parent)
    handler = logging.get_absl_handler()
    handler.setFormatter(std_logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    handler.addFilter(
        lambda record: (
            record.levelno >= std_logging.WARNING or record.pathname.startswith(ours)
        )
    )
    logging.set_verbosity(max(logging.get_verbosity(), logging.INFO))


def _parse(argv: list[str]) -> list[str]:
    try:
        rest = flags.FLAGS(argv)
        if "config" in flags.FLAGS:
            _ = flags.FLAGS["config"].value  # raises if the file can not be loaded
        return rest
    except flags.Error as error:
        raise ConfigError(str(error)) from error
    except OSError as error:
        raise ConfigError(f"--config: {error}") from error
    except (KeyError, AttributeError, TypeError, ValueError) as error:
        # ml_collections raises these for --config.key=value with a wrong key or value.
        text = " ".join(str(a) for a in error.args)
        raise ConfigError(f"{text} (in {' '.join(argv[1:])})") from error
