"""Reads a file of captions that lies beside a folder of pictures.

A table with a header (.csv, .tsv), an object a line (.jsonl), or the annotations of
COCO (.json). It names pictures by their paths below the folder; several rows of one
picture are several captions of it.
"""

import codecs
import csv
import io
import json
import os
import pathlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from navit_jax.data.tokenizer import BROKEN, SURROGATES
from navit_jax.errors import ConfigError

# What columns and keys are called: the first of these that is there; of captions the
# first that is not null.
FILES = ("file", "file_name", "filename", "filepath", "image")
CAPTIONS = ("caption", "captions", "text", "title")
# Spreadsheets write it as "Unicode text".
UTF16 = codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE


def read(path: str) -> dict[str, list[str]]:
    """The captions by path of the picture, in the order of the file.

    What is no UTF-8 becomes surrogates in paths, as the names of files do, and U+FFFD
    in captions; UTF-16 is told by its mark of byte order. An empty caption stays, one
    that is missing does not.

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
    if data.startswith(UTF16):
        text = data.decode("utf-16", "replace")
    else:
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
        known += [SURROGATES.sub(BROKEN, text) for text in texts]
    if not found:
        raise ConfigError(f"captions={path!r} is empty: it names no picture")
    return found


Rows = Iterator[tuple[int | str, Any, Any]]


def _table(text: str, path: str, dialect: str) -> Rows:
    # Strict: a quote that stands for itself would else swallow the lines after it.
    reader = csv.reader(io.StringIO(text, newline=""), dialect, strict=True)
    # Of the whole process. A caption of any length is for the tokenizer to cut.
    limit = csv.field_size_limit(len(text))
    try:
        rows = [(reader.line_num, row) for row in reader if row]
    except csv.Error as error:
        raise ConfigError(
            f"{path}:{reader.line_num}: {error}; put fields with quotes into quotes, "
            'each doubled ("a ""big"" cat"), or write a .jsonl'
        ) from error
    finally:
        csv.field_size_limit(limit)
    header = rows[0][1] if rows else []
    file, caption = (
        header.index(_choose(header, names, path)) for names in (FILES, CAPTIONS)
    )
    for line, row in rows[1:]:
        if len(row) != len(header):
            raise ConfigError(
                f"{path}:{line} has {len(row)} columns, the header {len(header)}: "
                "quote what holds a separator or a quote, or write a .jsonl"
            )
        yield line, row[file], row[caption]


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
        given = [row[name] for name in CAPTIONS if row.get(name) is not None]
        yield number, row[file], given[0] if given else None


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
