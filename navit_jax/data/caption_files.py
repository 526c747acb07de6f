"""Reads a file of captions that lies beside a folder of pictures.

A table with a header (.csv, .tsv), an object a line (.jsonl), or the annotations of
COCO (.json). It names pictures by their paths below the folder; several rows of one
picture are several captions of it.
"""

import csv
import io
import json
import os
import pathlib
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from navit_jax.errors import ConfigError

# What columns and keys are called: the first of these that is there.
FILES = ("file", "file_name", "filename", "filepath", "image")
CAPTIONS = ("caption", "captions", "text", "title")
SURROGATES = re.compile(r"[\ud800-\udfff]")


def read(path: str) -> dict[str, list[str]]:
    """The captions by path of the picture, in the order of the file.

    What is no UTF-8 becomes surrogates in paths, as the names of files do, and U+FFFD
    in captions. An empty caption stays, one that is missing does not.

    Raises:
      ConfigError: the file cannot be read, or a line of it is none of these.
    """
    extension = os.path.splitext(path)[1].lower()
    if extension not in READERS:
        raise ConfigError(
            f"captions={path!r}: known are {', '.join(READERS)} (docs/data.md)"
        )
    try:
        data = pathlib.Path(path).expanduser().read_bytes()
    except OSError as error:
        raise ConfigError(f"captions={path!r} cannot be read: {error}") from error
    text = data.decode("utf-8-sig", "surrogateescape")
    found: dict[str, list[str]] = {}
    for line, file, captions in READERS[extension](text, path):
        if not isinstance(file, str) or not file:
            raise ConfigError(f"{path}:{line} names no picture: {file!r} is no path")
        texts = [captions] if isinstance(captions, str) else captions
        if texts is None:
            texts = []
        if not isinstance(texts, list) or not all(isinstance(t, str) for t in texts):
            raise ConfigError(
                f"{path}:{line} has {captions!r} for a caption: give a text, or a list"
            )
        known = found.setdefault(os.path.normpath(file), [])
        known += [SURROGATES.sub("\ufffd", text) for text in texts]
    if not found:
        raise ConfigError(f"captions={path!r} is empty: it names no picture")
    return found


Rows = Iterator[tuple[int | str, Any, Any]]


def _table(text: str, path: str, dialect: str) -> Rows:
    # Strict: a quote that stands for itself would else swallow the lines after it.
    reader = csv.reader(io.StringIO(text, newline=""), dialect, strict=True)
    rows = iter(reader)
    try:
        header = next(rows, [])
        file, caption = (_choose(header, names, path) for names in (FILES, CAPTIONS))
        places = header.index(file), header.index(caption)
        for row in rows:
            if row and len(row) != len(header):
                raise ConfigError(
                    f"{path}:{reader.line_num} has {len(row)} columns, the header "
                    f"{len(header)}: quote what holds a separator or a quote, or write "
                    "a .jsonl"
                )
            if row:
                yield reader.line_num, row[places[0]], row[places[1]]
    except csv.Error as error:
        raise ConfigError(
            f"{path}:{reader.line_num}: {error}; put fields with quotes into quotes, "
            'each doubled ("a ""big"" cat"), or write a .jsonl'
        ) from error


def _lines(text: str, path: str) -> Rows:
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"{path}:{number} is no JSON: {error}") from error
        if not isinstance(row, Mapping):
            raise ConfigError(f"{path}:{number} is no object with a picture's path")
        file = _choose(row, FILES, f"{path}:{number}")
        named = [name for name in CAPTIONS if name in row]
        yield number, row[file], row[named[0]] if named else None


def _coco(text: str, path: str) -> Rows:
    try:
        found = json.loads(text)
        files = {image["id"]: image["file_name"] for image in found["images"]}
        for number, one in enumerate(found["annotations"]):
            where = f"annotations[{number}]"
            if one["image_id"] not in files:
                raise ConfigError(
                    f"{path}:{where}: no image has id {one['image_id']!r}"
                )
            yield where, files[one["image_id"]], one["caption"]
    except (ValueError, RecursionError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{path} is no JSON: {error}") from error
    except (KeyError, TypeError) as error:
        raise ConfigError(
            f"{path} is not laid out as COCO's captions, {{'images': [{{'id', "
            f"'file_name'}}], 'annotations': [{{'image_id', 'caption'}}]}}: {error!r}"
        ) from error


def _choose(found: Iterable[str], names: tuple[str, ...], where: str) -> str:
    for name in names:
        if name in found:
            return name
    raise ConfigError(f"{where} has {list(found)}, and none of {', '.join(names)}")


READERS = {
    ".csv": lambda text, path: _table(text, path, "excel"),
    ".tsv": lambda text, path: _table(text, path, "excel-tab"),
    ".jsonl": _lines,
    ".json": _coco,
}
