"""Fetches captioned screenshots of the GIMP manual: Debian's gimp-help-en.

`python -m navit_jax.data.builders.screenshots` unpacks the pictures into the cache
folder, writes their captions beside them, and prints the section of a config that opens
them. Licence: GFDL 1.2 or later, by the authors of the manual; nothing of it is in this
package.
"""

import argparse
import html
import json
import pathlib
import re
import shutil
import sys
import tempfile

from navit_jax.data.builders import debian
from navit_jax.data.folders import EXTENSIONS
from navit_jax.data.records import cache_folder
from navit_jax.errors import ConfigError, DataError

PACKAGE = "gimp-help-en"
MANUAL = pathlib.PurePath("usr", "share", "gimp", "2.0", "help", "en")
# Captions of a picture, the first: one photo is the original of 98 examples.
MOST = 6
# A figure and its pictures, in the order of the page.
PARTS = re.compile(
    r'<p class="title">(?P<title>.*?)</p>|<div class="mediaobject"[^>]*>\s*'
    r'(?:<img src="images/(?P<file>[^"]+)"[^>]*>)'
    r'(?:\s*<div class="caption">(?P<caption>.*?)</div>)?'
    r"|(?P<end><br class=\"figure-break\")",
    re.DOTALL,
)


def read_captions(page: str) -> list[tuple[str, str]]:
    """The pictures of a page, as (path below `images`, caption).

    A caption is the title of the figure without its number, the text below the
    picture, or both.
    """
    found, title = [], ""
    for part in PARTS.finditer(page):
        if part["title"] is not None:
            title = re.sub(
                r"^(Figure|Table|Example) [\d.A-Z]+\s+", "", _text(part["title"])
            )
        elif part["file"] is None:
            title = ""
        else:
            texts = [t for t in (title, _text(part["caption"] or "")) if t]
            if texts:
                found.append((html.unescape(part["file"]), ": ".join(texts)))
    return found


def _text(markup: str) -> str:
    text = html.unescape(re.sub(r"<[^>]+>", " ", markup))
    text = " ".join(text.split())
    # Marks that stand alone where a tag was.
    return re.sub("(?<=[\u201c\u2018(]) | (?=[\u201d\u2019).,;:!?])", "", text)


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
    try:
        main()
    except (ConfigError, DataError) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
