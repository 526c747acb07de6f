"""A folder of pictures as a source: a class a sub-folder."""

import collections
import dataclasses
import functools
import os
import pathlib

from absl import logging

from navit_jax.data import caption_files
from navit_jax.data.records import Record, digest
from navit_jax.errors import ConfigError

EXTENSIONS = (
    *(".bmp", ".gif", ".jfif", ".jpe", ".jpeg", ".jpg", ".png"),
    *(".tif", ".tiff", ".webp"),
)
# These lie beside the pictures (`tables.py`).
TABLES = ("sizes-", "captions-")


@dataclasses.dataclass(frozen=True)
class Folder:
    """The pictures below a folder; see `folder`.

    Attributes:
      files: Paths below `folder`, sorted.
      class_names: The first-level folders, sorted; () when unlabelled.
      ignored: How many files were left out, by extension.
      captions: Of each file, if there is a file of captions.
      caption: That file.
    """

    name: str
    folder: str
    files: tuple[str, ...]
    class_names: tuple[str, ...]
    ignored: dict[str, int]
    captions: tuple[tuple[str, ...], ...] | None = None
    caption: str | None = None

    @functools.cached_property
    def _class_of(self) -> dict[str, int]:
        return {name: number for number, name in enumerate(self.class_names)}

    def fingerprint(self) -> str:
        """Of names, sizes and times of the files, and of the captions."""
        files = [(f, *_size_and_time(self.folder, f)) for f in self.files]
        return digest([*files, *(self.captions or ())])

    def pictures(self) -> "Folder":
        """It without captions, whose fingerprint is that of the pictures alone."""
        return dataclasses.replace(self, captions=None, caption=None)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Record:
        file = self.files[index]
        image = pathlib.Path(self.folder, file).read_bytes()
        labels = (self._class_of[file.split(os.sep)[0]],) if self.class_names else ()
        captions = self.captions[index] if self.captions else ()
        return Record(_key(file), image, labels, captions)


@dataclasses.dataclass(frozen=True)
class Captions:
    """The captions of a folder by themselves: no picture is read, or has to be there.

    Attributes:
      of: With captions.
    """

    of: Folder
    class_names: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """Of the folder, and so is what follows."""
        return self.of.name

    @property
    def folder(self) -> str:
        """Where tables are kept."""
        return self.of.folder

    def fingerprint(self) -> str:
        """Of the captions by name of picture."""
        return digest(zip(self.of.files, self.of.captions or (), strict=True))

    def __len__(self) -> int:
        return len(self.of)

    def __getitem__(self, index: int) -> Record:
        assert self.of.captions
        return Record(_key(self.of.files[index]), b"", (), self.of.captions[index])


def _key(file: str) -> str:
    """A name need not be UTF-8; a key is written to JSON."""
    return os.fsencode(file).decode("utf-8", "backslashreplace")


def _size_and_time(folder: str, file: str) -> tuple[int, int]:
    try:
        stat = os.stat(os.path.join(folder, file))
    except (
        OSError
    ):  # A dangling link: a picture that can not be read, when its turn comes.
        return -1, -1
    return stat.st_size, stat.st_mtime_ns


def _parts(root: str) -> dict[str, str]:
    """The sub-folder of each split that has one."""
    valid = ["val", "valid", "validation"]
    names = {"train": ["train"], "validation": valid, "test": ["test"]}
    parts = {
        split: name
        for split, choices in names.items()
        for name in choices
        if os.path.isdir(os.path.join(root, name))
    }
    return parts


def _is_held_out(file: str) -> bool:
    return int(digest([file])[:8], 16) % 10 == 0


def folder(
    path: str, labels: bool = True, split: str = "all", captions: str | None = None
) -> Folder:
    """Opens a folder of pictures, or a part of it.

    With sub-folders, each first-level one is a class, numbered in sorted order, and
    all pictures below it, at any depth, belong to it. Without sub-folders, or with
    `labels=False`, there are no labels. Files without an extension of EXTENSIONS and
    folders that are links are left out, counted and logged.

    Args:
      split: "all", "train" or "validation". If the folder has the sub-folders train and
        validation (or val, valid), that sub-folder, and "test" is another; if not, a
        tenth of the pictures is for validation, chosen by a hash of the path below the
        folder, so that a picture stays in its part when others come and go.
      captions: A .csv, .tsv, .jsonl or COCO .json that names pictures by their paths
        below `path` and has their captions; see `caption_files.py`. What it names and
        is not there, and pictures that it does not name, are counted and logged.

    Raises:
      ConfigError: the folder cannot be read, holds no picture, or holds pictures
        beside its class folders; an unknown split, or one without a picture; "all" of
        a folder of splits, or one that lacks a part; the captions cannot be read,
        or are of none of the pictures.
    """
    found = _open(path, labels, split)
    if captions is None:
        return found
    return _caption(found, os.path.abspath(os.path.expanduser(path)), captions)


def _caption(found: Folder, root: str, path: str) -> Folder:
    """Gives the pictures their captions; `root` is what the file's paths are below."""
    known: dict[str, list[str]] = {}
    for name, captions in caption_files.read(path).items():
        below = os.path.relpath(name, root) if os.path.isabs(name) else name
        known.setdefault(below, []).extend(captions)
    names = [os.path.relpath(os.path.join(found.folder, f), root) for f in found.files]
    given = tuple(tuple(known.get(name, ())) for name in names)
    lacking = len(given) - sum(map(bool, given))
    if lacking == len(given):
        raise ConfigError(
            f"captions={path!r} has captions of none of the {len(given)} pictures of "
            f"{found.name}: it names {next(iter(known))!r}, but there is {names[0]!r}; "
            f"name them by their paths below {root}"
        )
    gone = [n for n in known.keys() - {*names} if not _is_picture(root, n)]
    if gone or lacking:
        logging.warning(
            "%s: %d pictures have no caption in %s; it names %d that are not there%s",
            found.name, lacking, path, len(gone), f", as {min(gone)!r}" if gone else "",
        )  # fmt: skip
    where = os.path.abspath(os.path.expanduser(path))
    return dataclasses.replace(found, captions=given, caption=where)


def _is_picture(root: str, file: str) -> bool:
    """Whether a file is there that may be of another part of the folder."""
    known = os.path.splitext(file)[1].lower() in EXTENSIONS
    return known and os.path.lexists(os.path.join(root, file))


def _open(path: str, labels: bool, split: str) -> Folder:
    """As `folder`, without captions."""
    root = os.path.abspath(os.path.expanduser(path))
    parts = _parts(root)
    paired = {"train", "validation"} <= parts.keys()
    if labels and parts and (split == "all" or not paired):
        raise ConfigError(
            f"path={path!r} has sub-folders {', '.join(sorted(parts.values()))}, which "
            "are splits, not classes: give it both train and validation and name a "
            "split, or give the path of one of them"
        )
    if split not in ("all", *(parts or ("train", "validation"))):
        raise ConfigError(
            f"split={split!r} of path={path!r}: known are all, train and validation, "
            "and test if the folder has sub-folders of these names"
        )
    if split in parts:
        return _open(os.path.join(root, parts[split]), labels, "all")
    files: list[str] = []
    ignored: collections.Counter[str] = collections.Counter()

    def fail(error: OSError) -> None:
        raise ConfigError(f"path={path!r} cannot be read: {error}") from error

    for parent, folders, names in os.walk(root, onerror=fail):
        links = [f for f in folders if os.path.islink(os.path.join(parent, f))]
        ignored["linked folders"] += len(links)
        for name in names:
            extension = os.path.splitext(name)[1].lower()
            if extension in EXTENSIONS:
                files.append(os.path.relpath(os.path.join(parent, name), root))
            elif not (parent == root and name.startswith(TABLES)):
                ignored[extension or "no extension"] += 1
    ignored += collections.Counter()  # Drops zeros.
    if ignored:
        counts = ", ".join(f"{n} {e}" for e, n in sorted(ignored.items()))
        logging.warning("%s: left out, not pictures by name: %s", root, counts)
    if not files:
        raise ConfigError(
            f"path={path!r} holds no picture ({', '.join(EXTENSIONS)}); "
            f"{sum(ignored.values())} other files"
        )
    flat = [f for f in files if os.sep not in f]
    if labels and flat and len(flat) < len(files):
        raise ConfigError(
            f"path={path!r} holds {len(flat)} pictures, such as {min(flat)!r}, beside "
            "its class folders: move them, or give labels=False"
        )
    classes = {f.split(os.sep)[0] for f in files} if labels and not flat else set()
    name = os.path.basename(root)
    if split != "all":
        name = f"{name}:{split}"  # Its size table is one of its own.
        files = [f for f in files if _is_held_out(f) == (split == "validation")]
    if not files:
        raise ConfigError(
            f"split={split!r} of path={path!r} holds no picture: there are too few; "
            "use split='all', and another folder for the other part"
        )
    return Folder(
        name,
        root,
        tuple(sorted(files)),
        tuple(sorted(classes)),
        dict(ignored),
    )
