"""Fetches captioned screenshots of the GIMP manual: Debian's gimp-help-en.

`python -m navit_jax.data.builders.screenshots` unpacks the pictures into the cache
folder, writes their captions beside them, and prints the section of a config that opens
them. Licence: GFDL 1.2 or later, by the authors of the manual; nothing of it is in this
package.
"""

import argparse
import json
import pathlib
import re
import shutil
import tempfile
from collections.abc import Iterable
from html.parser import HTMLParser

from navit_jax import command_line
from navit_jax.data.builders import debian
from navit_jax.data.folders import EXTENSIONS
from navit_jax.data.records import cache_folder
from navit_jax.errors import DataError

PACKAGE = "gimp-help-en"
MANUAL = pathlib.PurePath("usr", "share", "gimp", "2.0", "help", "en")
# Captions of a picture, the first: one photo is the original of 98 examples.
MOST = 6


class Page(HTMLParser):
    """Collects the pictures of a page, and what is written of each.

    Attributes:
      found: (path below `images`, caption).
    """

    def __init__(self):
        super().__init__()
        self.found: list[tuple[str, str]] = []
        self._title = self._caption = self._file = ""
        # What is open, and the text of it if it is a title or a caption.
        self._kinds: list[str] = []
        self._texts: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Begins a title, a picture or its caption; a figure ends with a break."""
        given = dict(attrs)
        kind = given.get("class") or ""
        if tag in ("p", "div"):
            self._kinds.append(kind)
            if kind == "mediaobject":
                self._file = self._caption = ""
            if kind in ("title", "caption"):
                self._texts = []
        elif tag == "img" and "mediaobject" in self._kinds and not self._file:
            # Others are signs in the caption.
            root, _, file = (given.get("src") or "").partition("/")
            self._file = file if root == "images" else ""
        elif tag == "br" and kind == "figure-break":
            self._title = ""

    def handle_data(self, data: str) -> None:
        """Takes a piece of text."""
        self._texts.append(data)

    def handle_endtag(self, tag: str) -> None:
        """Ends a title or a caption; with its object a picture has all it gets."""
        if tag not in ("p", "div") or not self._kinds:
            return
        kind = self._kinds.pop()
        if kind == "title":
            number = r"^(Figure|Table|Example) [\d.A-Z]+\s+"
            self._title = re.sub(number, "", _join(self._texts))
        elif kind == "caption":
            self._caption = _join(self._texts)
        elif kind == "mediaobject" and self._file:
            texts = [text for text in (self._title, self._caption) if text]
            self.found += [(self._file, ": ".join(texts))] if texts else []


def _join(texts: Iterable[str]) -> str:
    text = " ".join(" ".join(texts).split())
    # Marks that stand alone where a tag was.
    return re.sub("(?<=[\u201c\u2018(]) | (?=[\u201d\u2019).,;:!?])", "", text)


def read_captions(page: str) -> list[tuple[str, str]]:
    """The pictures of a page, as (path below `images`, caption).

    A caption is the title of the figure without its number, the text below the
    picture, or both.
    """
    parser = Page()
    parser.feed(page)
    parser.close()
    return parser.found


def build(package: pathlib.Path, output: pathlib.Path) -> tuple[int, int]:
    """Writes pictures and `captions.jsonl` below `output`, whole or not at all.

    Returns:
      How many captions there are, and pictures.

    Raises:
      ConfigError: there is no dpkg-deb, or the package is broken.
      DataError: it holds no captions where they are expected.
    """
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent) as name:
        debian.unpack([package], pathlib.Path(name))
        root, made = pathlib.Path(name, MANUAL), pathlib.Path(name, "made")
        captions: dict[str, list[str]] = {}
        for page in sorted(root.glob("*.html")):
            for file, caption in read_captions(page.read_text("utf-8", "replace")):
                known = captions.setdefault(file, [])
                known += [caption] * (caption not in known and len(known) < MOST)
        there = root / "images"
        captions = {
            file: captions[file]
            for file in sorted(captions)
            # A class is a sub-folder: what lies beside them is buttons of the pages.
            if "/" in file and ".." not in file and (there / file).suffix in EXTENSIONS
            if (there / file).is_file() and not (there / file).is_symlink()
        }
        if not captions:
            raise DataError(f"{package} holds no captioned picture below {MANUAL}")
        for file in captions:
            target = made / "images" / file
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(there / file, target)
        rows = [json.dumps({"file": f, "captions": c}) for f, c in captions.items()]
        (made / "captions.jsonl").write_text("\n".join(rows) + "\n")
        shutil.rmtree(output, ignore_errors=True)
        made.rename(output)
    return sum(map(len, captions.values())), len(captions)


def main(argv: list[str] | None = None) -> None:
    """Fetches the package unless it is there, and unpacks it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--package", help=f"the file {PACKAGE}_*.deb, if it is here")
    parser.add_argument("--out", help="a folder; default: in the cache folder")
    options = parser.parse_args(argv)
    folder = cache_folder() / PACKAGE
    if not options.package and not debian.find([PACKAGE], folder):
        debian.fetch([PACKAGE], folder, "--package FILE")
    package = pathlib.Path(options.package or debian.find([PACKAGE], folder)[0])
    output = pathlib.Path(options.out or cache_folder() / "screenshots").absolute()
    number, pictures = build(package, output)
    print(f"{package.name}: {number} captions of {pictures} pictures in {output}")
    section = {"name": "folder", "path": f"{output}/images", "split": "train"}
    section |= {"captions": f"{output}/captions.jsonl"}
    print(f"data.sources = {{'screenshots': {section}}}")


if __name__ == "__main__":
    with command_line.exit_codes():
        main()
