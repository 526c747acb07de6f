"""`python -m navit_jax.weights inspect FILE` and `convert FILE FOLDER`.

`inspect` prints what of a checkpoint becomes what of ours, what is left over, and what
of the model the file does not say; `convert` writes it as safetensors in the naming of
transformers, or under our own names what it has not, with a config.json that says it
all.
"""

import argparse
import json
import pathlib
import pprint
import sys
from typing import Any

from etils import epath

from navit_jax import run_folder
from navit_jax.errors import ConfigError
from navit_jax.initialise import format_table
from navit_jax.weights import texts
from navit_jax.weights.fetch import find
from navit_jax.weights.read import Weights, read
from navit_jax.weights.write import write


def describe(weights: Weights) -> str:
    """What `inspect` prints."""
    lines = [format_table(weights.origins), f"layout: {weights.layout}"]
    lines += [f"config.model = {pprint.pformat(weights.model, sort_dicts=False)}"]
    if weights.text:
        lines += [
            f"config.task.text = {pprint.pformat(weights.text, sort_dicts=False)}"
        ]
    lines += [
        f"assumed, as the file does not say it: {name} = "
        f"{weights.model[name]!r} (--set {name}=...)"
        for name in weights.assumed
    ]
    return "\n".join(lines)


def parse(argument: str) -> tuple[str, Any]:
    """`eps=1e-5` as a name and a value.

    Raises:
      ConfigError: it has no "=".
    """
    name, equals, value = argument.partition("=")
    if not equals:
        raise ConfigError(f"--set {argument}: write NAME=VALUE, as activation=gelu")
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, value


def main() -> None:
    """Reads the command line and does what it says."""
    parser = argparse.ArgumentParser(prog="python -m navit_jax.weights")
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("inspect", "convert"):
        command = commands.add_parser(name)
        command.add_argument("file", help="a checkpoint, or a name that fetch knows")
        if name == "convert":
            command.add_argument("folder", help="to write")
        command.add_argument("--grid", type=int, nargs=2, metavar=("ROWS", "COLUMNS"))
        command.add_argument("--set", action="append", default=[], metavar="NAME=VALUE")
        command.add_argument("--allow-unused", action="append", default=[])
    options = parser.parse_args()
    try:
        replace = dict(map(parse, options.set))
        if options.command == "convert":
            folder = epath.Path(options.folder)
            run_folder.check_writable(folder, f"the folder {folder}")
        weights = read(
            find(options.file), options.grid, options.allow_unused, **replace
        )
        print(describe(weights))
        if options.command == "convert":
            images = {k: v for k, v in weights.params.items() if k not in texts.ROOTS}
            kind = write(pathlib.Path(options.folder), weights.model, images)
            named = f"as transformers names a {kind}" if kind else "under our own names"
            print(f"written: {options.folder}, {named}")
    except ConfigError as error:
        print(f"{options.command}: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
