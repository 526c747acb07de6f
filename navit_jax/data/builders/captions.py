"""Turns the metadata of an openclipart drawing into one clean caption.

Title and keywords were typed by hundreds of authors; many titles are the name of a
series or of the author, and many keywords are accidents of scripts. The folder of a
picture is never used: it would give the class away.
"""

import html
import pathlib
import re
from xml.etree import ElementTree

DC = "{http://purl.org/dc/elements/1.1/}"
RDF = "{http://www.w3.org/1999/02/22-rdf-syntax-ns#}"

# Titles that name a collection, not what is seen.
SERIES = {
    "advertising",
    "aiga symbol signs",
    "australian maps",
    "blueberry - iconset",
    "etiquette icons",
    "homes clipart",
    "lemon svg theme",
    "map symbols",
    "r15 general",
    "r16 sibmission",
    "road signs",
    "sallite",
    "svg road signs",
    "various cliparts",
}
# Keywords that say where a file lay or who drew it.
NOISE = {
    "architetto francesco rollandin",
    "appicon",
    "clip art",
    "clipart",
    "en",
    "hash",
    "lemon theme icon",
    "mapsym",
    "miscellany",
    "musicsym",
    "musicstuff",
    "networksym",
    "openclipart",
    "signs and symbols",
    "signs and symbols traffic",
    "theme",
    "unsorted",
    "weathersym",
}
# Words of file names that stand for an author or a format.
MARKS = {
    *("aiga", "aj", "bb", "bw", "bwh", "by", "clipart", "fc", "ganson", "md"),
    *("mimooh", "openclipart", "symbol", "zazou"),
}


def read_metadata(path: pathlib.Path) -> tuple[str, list[str], list[str]]:
    """Reads (title, keywords, creators) of an SVG; empty where there is nothing."""
    try:
        tree = ElementTree.fromstring(path.read_bytes())
    except (FileNotFoundError, ElementTree.ParseError):
        return "", [], []
    title = next((e.text or "" for e in tree.iter(DC + "title")), "")
    keywords = [
        "".join(item.itertext())
        for subject in tree.iter(DC + "subject")
        for item in subject.iter(RDF + "li")
    ]
    creators = [" ".join(e.itertext()) for e in tree.iter(DC + "creator")]
    return title, keywords, creators


def write_caption(
    key: str, title: str, keywords: list[str], creators: list[str]
) -> str:
    """Writes title and keywords as one lower-case text without junk.

    A title that is a series or an author is replaced by the words of the file's name.
    Keywords already said are dropped; the rest are sorted.
    """
    names = {w for c in creators for w in _words(c)}
    head = _clean_title(title, names) or _clean_stem(key, names)
    parts = [head] if head else []
    for keyword in sorted({_tidy(k) for k in keywords}):
        junk = keyword in NOISE or re.search(
            r"hash\(|@|/|clipart|^\W*$|^\d\d ", keyword
        )
        said = set(_words(keyword)) <= set(_words(" ".join(parts)))
        if not (junk or said or set(_words(keyword)) <= names):
            parts.append(keyword)
    return ", ".join(parts) or _tidy(title)


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def _tidy(text: str) -> str:
    text = html.unescape(text).replace("_", " ")
    # Control characters of broken encodings.
    text = re.sub(r"[\x00-\x1f\x7f-\x9f]+", " ", text)
    return " ".join(text.split()).lower()


def _clean_title(title: str, names: set[str]) -> str:
    # CamelCase and a number glued to a word come from file names.
    title = re.sub(r"(?<=[a-z]{2})(?=[A-Z])", " ", title)
    title = re.sub(r"(?<=[a-z]{2})\d+$", "", title)
    title = re.sub(r"\(email:[^)]*\)|\s-\s(RPG map elements)$", "", title)
    text = _tidy(title)
    if text in SERIES or re.search(r"^clipart by|collection by|hash\(0x|@", text):
        return ""
    kept = [w for w in text.split() if w.strip("().,") not in names | {"openclipart"}]
    return " ".join(kept) if any(re.search(r"[^\W\d]", w) for w in kept) else ""


def _clean_stem(key: str, names: set[str]) -> str:
    stem = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", pathlib.PurePosixPath(key).stem)
    stem = re.sub(r"(?<=[a-zA-Z]{2})\d+", " ", stem)
    words = [w for w in re.split(r"[\s_\-.]+", stem.lower()) if w]
    # The packager appended the author, cut at a fixed length, and a number.
    while words and (
        re.match(r"\d", words[-1]) or any(n.startswith(words[-1]) for n in names)
    ):
        words.pop()
    return " ".join(
        w for w in words if not re.match(r"\d|.$", w) and w not in MARKS | names
    )
