"""The sets that are fetched on request: emoji, and screenshots of a manual."""

import importlib.util
import io
import json
import pathlib
import shutil
import subprocess
import sys
import tarfile

import pytest
from test_sources import own_cache, png

from navit_jax.data import open_sources, records
from navit_jax.data.builders import openmoji, screenshots
from navit_jax.errors import ConfigError, DataError

__all__ = ["own_cache"]

PACKAGES = records.cache_folder()  # of whoever runs the tests
EMOJI = {
    "annotation": "flag: Mali",
    "tags": "ML, flag, Mali",
    "openmoji_tags": "flag mali, west africa",
}


def test_a_caption_of_an_emoji_is_its_annotation_and_the_tags_that_add_a_word():
    assert openmoji.write_caption(EMOJI) == "flag: Mali, ML, west africa"


def test_a_package_that_is_not_the_known_one_is_refused(tmp_path, monkeypatch):
    path = tmp_path / openmoji.FILE
    with tarfile.open(path, "w:gz") as tar:
        tar.addfile(tarfile.TarInfo("package/data/openmoji.json"), io.BytesIO())
    with pytest.raises(ConfigError, match=r"has sha256 [0-9a-f]{64}, not 55ee7d1348"):
        openmoji.read_package(path)
    with pytest.raises(ConfigError, match=r"--package=/none cannot be read"):
        openmoji.read_package(pathlib.Path("/none"))
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(ConfigError, match=r"npm is not on .*npm pack openmoji@17.0.0"):
        openmoji.fetch(tmp_path)
    monkeypatch.setitem(sys.modules, "resvg_py", None)
    with pytest.raises(ConfigError, match=r"`pip install resvg-py==0.5.0` is needed"):
        openmoji.draw("<svg/>")


def needs_rasteriser():
    if not importlib.util.find_spec("resvg_py"):
        pytest.skip(f"`pip install {openmoji.RASTERISER}` is needed to draw SVGs")


def test_a_drawing_is_cut_to_what_is_visible_on_white():
    needs_rasteriser()
    svg = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 72 72">'
    svg += '<rect x="18" y="36" width="36" height="18" fill="#f00"/></svg>'
    picture = openmoji.draw(svg)
    assert picture.size == (openmoji.CANVAS // 2, openmoji.CANVAS // 4)
    assert picture.getcolors() == [(112 * 56, (255, 0, 0))]


@pytest.mark.slow
def test_the_emoji_are_built_equal_to_the_byte():
    needs_rasteriser()
    package = PACKAGES / "openmoji" / openmoji.FILE
    if not package.exists():
        pytest.skip(f"no {package}; `python -m {openmoji.__name__}` fetches it")
    command = [sys.executable, "-m", openmoji.__name__, "--check"]
    found = subprocess.run(
        [*command, f"--package={package}"], capture_output=True, text=True
    )
    assert found.returncode == 0, found.stderr[-2000:]
    assert "equal: 3 files" in found.stdout


PAGE = """
<div class="figure"><a id="x"></a><p class="title"><strong>Figure 16.15. The
 <span class="quote">\u201c<span class="quote">Print</span>\u201d</span>
 dialog</strong></p>
 <div class="figure-contents"><div class="mediaobject">
 <img src="images/menus/print.png" alt="no caption" /></div>
 <div class="mediaobject" align="center"><img src="images/menus/tab.png" />
 <div class="caption"><p>Its <em>tab</em>
 <img src="images/sign.png" />, &amp; more.</p></div></div>
</div></div><br class="figure-break" />
<img src="images/note.png" />
<div class="mediaobject"><img src="images/menus/alone.png" /></div>
<div class="mediaobject"><img src="images/tools/below.png" />
 <div class="caption"><p>Below</p></div></div>
"""


def test_a_caption_of_a_screenshot_is_the_title_of_its_figure_and_the_text_below():
    assert screenshots.read_captions(PAGE) == [
        ("menus/print.png", "The \u201cPrint\u201d dialog"),
        ("menus/tab.png", "The \u201cPrint\u201d dialog: Its tab, & more."),
        ("tools/below.png", "Below"),
    ]


def write_package(root, pages, pictures):
    """A .deb with a manual of these pages."""
    manual = root / "deb" / screenshots.MANUAL
    for file in pictures:
        path = manual / "images" / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(5, 7))
    for name, page in pages.items():
        (manual / name).write_text(page)
    control = root / "deb" / "DEBIAN" / "control"
    control.parent.mkdir(parents=True)
    control.write_text(
        "Package: gimp-help-en\nVersion: 1\nArchitecture: all\n"
        "Maintainer: x <x@example.org>\nDescription: x\n"
    )
    path = root / "gimp-help-en_1_all.deb"
    command = ["dpkg-deb", "--build", "-Znone", str(root / "deb"), str(path)]
    subprocess.run(command, check=True, capture_output=True)
    return path


def test_screenshots_become_a_folder_with_captions(tmp_path, capsys):
    if not shutil.which("dpkg-deb"):
        pytest.skip("dpkg-deb is missing")
    again = PAGE.replace("Below", "Below it").replace("tools/below", "../../up")
    again += PAGE.replace("Below", "Once more")
    pictures = ["menus/print.png", "menus/tab.png", "tools/below.png", "note.png"]
    pictures += ["../../up.png"]  # is there, but not below the pictures
    pages = {"a.html": PAGE, "b.html": again}
    for number in range(10):
        pages[f"c{number}.html"] = PAGE.replace("Print", f"Print {number}")
    package = write_package(tmp_path, pages, pictures)
    out = tmp_path / "out"
    screenshots.main([f"--package={package}", f"--out={out}"])
    said = capsys.readouterr().out.splitlines()
    assert said[0].endswith(f"14 captions of 3 pictures in {out}")
    section = json.loads(said[1].removeprefix("data.sources = ").replace("'", '"'))
    section["screenshots"]["split"] = "all"
    (source,), _ = open_sources(section)
    assert source.class_names == ("menus", "tools")
    found = {r.key: r.captions for r in map(source.__getitem__, range(3))}
    assert found["tools/below.png"] == ("Below", "Once more")
    titles = ["Print", *(f"Print {n}" for n in range(5))]
    expected = tuple(f"The \u201c{title}\u201d dialog" for title in titles)
    assert found["menus/print.png"] == expected
    shutil.rmtree(tmp_path / "deb")
    empty = write_package(tmp_path, {}, ["a.png"])
    with pytest.raises(DataError, match="holds no captioned picture below"):
        screenshots.build(empty, out)
    assert (out / "captions.jsonl").exists()
    (tmp_path / "bad.deb").write_bytes(b"")
    with pytest.raises(ConfigError, match=r"bad.deb is broken"):
        screenshots.build(tmp_path / "bad.deb", out)
