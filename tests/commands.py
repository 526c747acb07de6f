"""Commands of the package, run in this process: a new Python imports for seconds."""

import contextlib
import importlib
import inspect
import io
import logging
import subprocess
import sys
import textwrap
import warnings
from unittest import mock

import tiny
from absl import logging as absl_logging
from absl.testing import flagsaver


def run(module, *arguments, cwd=tiny.ROOT) -> subprocess.CompletedProcess:
    """What `python -m module arguments` prints, and its exit code.

    Flags, handlers of the log and the working directory are left as they were. What
    only a process of its own can show, as what a signal does to it, is not here.
    """
    found = importlib.import_module(module)
    _, main = inspect.getsource(found).split('\nif __name__ == "__main__":\n')
    out, err = io.StringIO(), io.StringIO()
    with contextlib.ExitStack() as stack:
        for context in (
            _new_log(err),
            flagsaver.flagsaver(),
            contextlib.chdir(cwd),
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
            mock.patch.object(sys, "argv", [module, *map(str, arguments)]),
            warnings.catch_warnings(),
        ):
            stack.enter_context(context)
        warnings.filterwarnings("ignore", "the load_module")  # of ml_collections
        try:
            exec(textwrap.dedent(main), vars(found))
            code = 0
        except SystemExit as end:
            code = end.code or 0
            if isinstance(code, str):  # as Python ends
                code = print(code, file=err) or 1
    return subprocess.CompletedProcess(module, code, out.getvalue(), err.getvalue())


@contextlib.contextmanager
def _new_log(stream):
    """The log of a new process, whose standard error is a stream."""
    root = logging.getLogger()
    levels = {logger: logger.level for logger in (root, absl_logging.get_absl_logger())}
    handler = absl_logging.ABSLHandler(absl_logging.PythonFormatter())
    handler.python_handler.setStream(stream)
    before, root.handlers[:] = list(root.handlers), []
    try:
        with mock.patch.object(absl_logging, "_absl_handler", handler):
            yield
    finally:
        root.handlers[:] = before
        for logger, level in levels.items():
            logger.setLevel(level)
