"""Loading processes leave signals to the process that they load for."""

import multiprocessing
import os
import signal
import threading


def follow_parent(index: int, count: int) -> None:
    """Makes this worker deaf to SIGTERM and SIGINT, and ends it with its parent.

    Ctrl-C, and launchers that stop a whole process group, signal the workers too; the
    run needs them until it has saved.

    Args:
      index, count: Of this worker and in all, as grain gives them; not used.
    """
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
