"""Converts tar shards of image and text, laid out as by webdataset, to array_record.

`python -m navit_jax.data.tars --tars='/data/cc3m/*.tar' --output=/data/cc3m` writes a
TFDS set with its table of sizes, a file a tar, and prints the section of a config that
opens it. Called again after a stop, it goes on. Tars are read from front to end, and no
member is ever written by its own name.
"""

import functools
import glob
import itertools
import json
import os
import pathlib
from collections.abc import Callable, Iterable, Iterator, Sequence

import tqdm
from absl import flags

from navit_jax import command_line
from navit_jax.data import images, record_files
from navit_jax.data.folders import EXTENSIONS
from navit_jax.data.record_files import Entry, Written
from navit_jax.data.tar_samples import read_members, read_samples
from navit_jax.errors import ConfigError

PICTURES = frozenset(extension[1:] for extension in EXTENSIONS)


def read_captions(
    parts: dict[str, bytes], json_key: str | None, lines: bool
) -> list[bytes]:
    """The captions of a sample, as they are stored; see `convert`.

    Raises:
      ValueError: the json is none, or has something else than text under the key.
    """
    if json_key is None:
        texts = [parts["txt"]] if "txt" in parts else []
        return (
            [line for t in texts for line in t.split(b"\n") if line.strip()]
            if lines
            else texts
        )
    try:
        found = json.loads(parts.get("json", b"{}").decode("utf-8-sig", "replace"))
    except RecursionError as error:
        raise ValueError("nested too deep") from error
    if not isinstance(found, dict):
        raise ValueError("no object")
    value = found.get(json_key)
    texts = [] if value is None else value if isinstance(value, list) else [value]
    if not all(isinstance(text, str) for text in texts):
        raise ValueError(f"{json_key!r} holds no text")
    return [text.encode("utf-8", "surrogatepass") for text in texts]


def read_entries(
    path: pathlib.Path,
    json_key: str | None,
    lines: bool,
    advance: Callable[[int], object],
) -> Iterator[Entry]:
    """What becomes of each sample of a tar."""
    wanted = PICTURES | {"txt" if json_key is None else "json"}
    for name, parts, reason in read_samples(read_members(path, wanted, advance)):
        key = f"{path.name}/{name}" if name else path.name
        found = [data for extension, data in parts.items() if extension in PICTURES]
        if not reason and len(found) != 1:
            reason = "several_pictures" if found else "no_picture"
        if reason:
            yield Entry(key, reason)
            continue
        try:
            captions = read_captions(parts, json_key, lines)
        except ValueError:
            yield Entry(key, "bad_json")
            continue
        captions = [caption.strip() for caption in captions]
        try:
            size = images.read_size(found[0])
        except images.BadImage as error:
            yield Entry(key, error.reason)
            continue
        example = record_files.make_example(key, found[0], captions)
        yield Entry(key, "", example, size, "" if captions else "without a caption")


def convert(
    tars: Sequence[pathlib.Path],
    output: pathlib.Path,
    json_key: str | None = None,
    lines: bool = False,
) -> Written:
    """Writes the set, or the files of it that are not there yet.

    Args:
      tars: Each has samples of members that follow each other: a picture as it is,
        `KEY.jpg` or another of EXTENSIONS, beside `KEY.txt` or `KEY.json`. The key of
        a record is `TAR/KEY`.
      json_key: What of `KEY.json` holds the caption, or a list of captions; None: the
        whole `KEY.txt` is one caption.
      lines: Each line of `KEY.txt` that is not blank is a caption.

    Raises:
      ConfigError: the folder holds something else.
      DataError: no picture can be used.
    """
    stats = [os.stat(path) for path in tars]
    made = {
        "tars": [[p.name, s.st_size] for p, s in zip(tars, stats, strict=True)],
        "json": json_key,
        "lines": lines,
    }
    ends = list(itertools.accumulate(stat.st_size for stat in stats))
    desc = f"{len(tars)} tar{'s' * (len(tars) != 1)}"
    with tqdm.tqdm(total=ends[-1], desc=desc, unit="B", unit_scale=True) as bar:
        shards = [
            functools.partial(read_entries, path, json_key, lines, bar.update)
            for path in tars
        ]
        return record_files.write_set(output, "pairs", made, shards, ends, bar)


def find(patterns: Iterable[str]) -> list[pathlib.Path]:
    """The files of the patterns, sorted, each once.

    Raises:
      ConfigError: a pattern matches none, or two files have one name.
    """
    found: dict[str, pathlib.Path] = {}
    for pattern in patterns:
        paths = sorted(glob.glob(os.path.expanduser(pattern)))
        if not paths:
            raise ConfigError(f"--tars: no file matches {pattern!r}")
        for path in map(pathlib.Path, paths):
            if found.setdefault(path.name, path) != path:
                raise ConfigError(
                    f"--tars: {found[path.name]} and {path} share a name, which is "
                    "part of the keys: convert them to folders of their own"
                )
    return [path for _, path in sorted(found.items())]


def define_main() -> Callable[[], int]:
    """Defines the flags, and returns what reads them and converts."""
    tars = flags.DEFINE_list("tars", None, "Tars or patterns, by comma", required=True)
    output = flags.DEFINE_string("output", None, "A new folder", required=True)
    json_key = flags.DEFINE_string(
        "json", None, "Captions are under this key of KEY.json, not in KEY.txt"
    )
    lines = flags.DEFINE_bool("lines", False, "Each line of KEY.txt is a caption")

    def main() -> int:
        if lines.value and json_key.value is not None:
            raise ConfigError("--lines is of KEY.txt, --json of KEY.json: give one")
        folder = pathlib.Path(output.value).expanduser().absolute()
        found = find(tars.value)
        convert(found, folder, json_key.value, lines.value).tell(folder, "pairs")
        return 0

    return main


if __name__ == "__main__":
    command_line.run(define_main())
