"""Files of a run's folder, which may be on object storage.

There an object is written whole or not at all, and there is no append, no rename of one
over another, no lock. Everything that a run writes itself goes through here or is
written once; checkpoints are orbax's.
"""

import time
from collections.abc import Sequence

from etils import epath

# Lines of a part of a log, which is written anew with each of them.
PART_LINES = 1000
# In which somebody else's object of the same name shows, if it was written before.
SETTLE_SECONDS = 2.0


def is_local(path: epath.Path) -> bool:
    """Whether a path is one of this machine's file systems."""
    return "://" not in str(path)


def locate(folder: epath.PathLike) -> epath.Path:
    """The folder, from the root: of a disk's, or as it is of object storage."""
    path = epath.Path(folder)
    return path.absolute() if is_local(path) else path


def store(path: epath.Path, contents: str | bytes) -> None:
    """Writes in one move: others may be reading, and a kill must not cut it."""
    data = contents.encode() if isinstance(contents, str) else contents
    if not is_local(path):
        path.write_bytes(data)
        return
    new = path.with_name(f"{path.name}.tmp")
    new.write_bytes(data)
    new.replace(path)


def create(path: epath.Path, text: str) -> bool:
    """Makes a file, if there is none; of those who try at one time one succeeds.

    Args:
      text: Nobody else's.
    """
    if is_local(path):
        try:
            # etils has no mode "x".
            with open(path, "x") as file:
                file.write(text)
        except FileExistsError:
            return False
        return True
    if path.exists():
        return False
    path.write_text(text)
    # Who wrote last has it, and all others see that.
    time.sleep(SETTLE_SECONDS)
    return path.read_text() == text


class Log:
    """Lines that are appended; on object storage in numbered parts."""

    def __init__(self, path: epath.Path, lines: Sequence[str]):
        """Begins with some lines; what else was there is gone.

        Args:
          path: Of the log, or of its first part.
        """
        self._path = path
        size = max(1, len(lines)) if is_local(path) else PART_LINES
        parts = [lines[i : i + size] for i in range(0, len(lines), size)] or [[]]
        for number, part in enumerate(parts):
            where, text = _part(path, number), _join(part)
            # A cut last line would spoil the next.
            if not where.exists() or where.read_text() != text:
                store(where, text)
        for old in find_parts(path)[len(parts) :]:
            old.unlink()
        self._number, self._lines = len(parts) - 1, list(parts[-1])

    def append(self, line: str) -> None:
        """Adds a line, that of no break."""
        if is_local(self._path):
            with self._path.open("a") as file:
                file.write(line + "\n")
            return
        if len(self._lines) >= PART_LINES:
            self._number, self._lines = self._number + 1, []
        self._lines.append(line)
        store(_part(self._path, self._number), _join(self._lines))


def read_log(path: epath.Path) -> list[str]:
    """The lines of all parts of a log; [] if there is none."""
    return [line for part in find_parts(path) for line in part.read_text().splitlines()]


def find_parts(path: epath.Path) -> list[epath.Path]:
    """The parts of a log, in their order."""
    if not path.exists():
        return []
    found, number = [path], 1
    while (part := _part(path, number)).exists():
        found.append(part)
        number += 1
    return found


def _part(path: epath.Path, number: int) -> epath.Path:
    return path.with_name(f"{path.stem}-{number}{path.suffix}") if number else path


def _join(lines: Sequence[str]) -> str:
    return "".join(f"{line}\n" for line in lines)
