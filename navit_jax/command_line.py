"""Entry points: flags in, exit codes out (errors.py); a user's mistake is one line."""

import contextlib
import logging as std_logging
import pathlib
import sys
from collections.abc import Callable, Iterator

from absl import app, flags, logging
from ml_collections import config_flags

from navit_jax import config as config_lib
from navit_jax.errors import ConfigError


def define_config(required: bool = True) -> flags.FlagHolder:
    """Defines --config and its overrides, --config.section.key=value."""
    holder = config_flags.DEFINE_config_file(
        "config",
        None,
        "A config file, e.g. configs/smoke.py",
        lock_config=True,
    )
    if required:
        flags.mark_flag_as_required("config")
    return holder


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


def run(main: Callable[[], int | None]) -> None:
    """Parses flags, runs `main`, and ends the process with its exit code."""

    def parse(argv: list[str]) -> list[str]:
        with exit_codes():
            return _parse(argv)
        raise AssertionError("unreachable: exit_codes ends the process")

    def call(argv: list[str]) -> int | None:
        _quiet_libraries()
        with exit_codes():
            if argv[1:]:
                raise ConfigError(f"unknown arguments {argv[1:]}; flags start with --")
            return main()

    app.run(call, flags_parser=parse)


def _quiet_libraries() -> None:
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
        raise ConfigError(_explain(argv, error)) from error


def _explain(argv: list[str], error: Exception) -> str:
    paths = [a[2:].split("=", 1)[0] for a in argv if a.startswith("--config.")]
    section = _load(argv)
    known = sorted(config_lib.flatten(section)) if section is not None else []
    for path in paths:
        key = path.removeprefix("config.")
        if known and key not in known:
            return f"--{path}: no such key; {config_lib.nearest(key, known)}"
    return f"{' '.join(str(a) for a in error.args)} (in {' '.join(argv[1:])})"


def _load(argv: list[str]) -> dict | None:
    """The config of the command line without its overrides, None if it has none."""
    for arg in argv:
        if arg.startswith("--config="):
            values = flags.FlagValues()
            alone = ["config", arg]
            holder = config_flags.DEFINE_config_file(
                "config", flag_values=values, sys_argv=alone
            )
            values(alone)
            return config_lib.resolve(holder.value)
    return None
