"""The report's page: how it looks, the HTML of its parts, and the file it becomes.

Text that comes from data or configs is escaped, pictures are in the page itself.
"""

import base64
import contextlib
import html
import io
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from etils import epath
from PIL import Image

from navit_jax.data import images
from navit_jax.errors import ConfigError

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 62rem;
       margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
table { border-collapse: collapse; font-size: 13px; display: block; overflow-x: auto; }
td, th { border-bottom: 1px solid #ddd; padding: .2rem .8rem .2rem 0; text-align: left;
         vertical-align: top; font-variant-numeric: tabular-nums; }
img, svg { max-width: 100%; height: auto; }
code, pre { font-size: 12.5px; background: #f6f6f6; }
pre { padding: .6rem; overflow-x: auto; } .note { color: #666; }
.samples { display: flex; flex-wrap: wrap; gap: .7rem; }
figure { margin: 0; font-size: 12px; border-top: 3px solid #bbb; padding-top: 3px; }
figure img { height: 88px; display: block; } figcaption { max-width: 9rem; }
figure.right { border-color: #54a24b; } figure.wrong { border-color: #e45756; }
.asked { display: grid; grid-template-columns: 15rem 1fr; gap: 1rem; font-size: 13px;
         padding: .6rem 0; border-bottom: 1px solid #ddd; overflow-wrap: anywhere; }
.asked img { display: block; width: 7.4rem; height: 88px; object-fit: contain;
             object-position: left; margin-bottom: .2rem; }
.asked i, .asked span { color: #666; } .asked ol { margin: 0; padding-left: 1.6rem; }
li.right { color: #2f7a28; font-weight: 600; }
"""
HEIGHT = 88  # pixels of a thumbnail


def build(title: str, parts: Iterable[str]) -> str:
    """The whole page of some HTML."""
    return (
        "<!doctype html><html lang='en'><head><meta charset='utf-8'>"
        "<meta name='viewport' content='width=device-width'>"
        f"<title>{text(title)}</title><style>{STYLE}</style></head>"
        f"<body><h1>{text(title)}</h1>{''.join(parts)}</body></html>"
    )


def text(value: Any) -> str:
    """Anything, as it is read."""
    return html.escape(str(value))


def note(value: Any) -> str:
    """A line in small print."""
    return f"<p class='note'>{text(value)}</p>"


def section(title: str, content: str) -> str:
    """HTML under a heading; "" without any."""
    return f"<h2>{text(title)}</h2>{content}" if content else ""


def table(rows: Iterable[Sequence[Any]], header: Sequence[Any] = ()) -> str:
    """Cells of text, row by row."""
    head = "".join(f"<th>{text(cell)}</th>" for cell in header)
    lines = [f"<tr>{head}</tr>"] if header else []
    for row in rows:
        lines.append("<tr>" + "".join(f"<td>{text(c)}</td>" for c in row) + "</tr>")
    return f"<table>{''.join(lines)}</table>"


def fold(content: str) -> str:
    """HTML that is shown on request."""
    return f"<details><summary>show</summary>{content}</details>"


def embed_image(file: bytes, kind: str, title: str = "") -> str:
    """The picture of a file, `kind` as in image/png."""
    data = base64.b64encode(file).decode()
    return f"<img alt='{text(title)}' src='data:image/{kind};base64,{data}'>"


def thumbnail(picture: bytes) -> str:
    """A file of any kind that the model reads, small.

    Raises:
      BadImage: it can not be used.
    """
    height, width = size = images.read_size(picture)
    target = HEIGHT, max(1, min(4 * HEIGHT, round(width * HEIGHT / height)))
    pixels, _ = images.read(picture, size, target)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format="jpeg", quality=85)
    return embed_image(file.getvalue(), "jpeg")


def write(output: epath.Path, compose: Callable[[], str]) -> None:
    """Writes what `compose` returns in one move: a page is whole, or as it was.

    Raises:
      ConfigError: it can not be written; where this is known before, nothing is
        composed.
    """
    # A device or a link, as /dev/stdout, must not be replaced by a file.
    # Of a device epath's `is_file` is true.
    plain = os.path.isfile(output) and not os.path.islink(output)
    moved = plain or not os.path.lexists(output)
    new = output.with_name(f"{output.name}.tmp") if moved else output
    try:
        with _told(output):
            new.open("a").close()
        page = compose()
        with _told(output):
            new.write_text(page)
            if moved:
                new.replace(output)
    finally:
        if moved and new.exists():
            new.unlink()


@contextlib.contextmanager
def _told(output: epath.Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ConfigError(
            f"--output={output} can not be written: {error}; name a file in a folder "
            "that exists and has room"
        ) from error
