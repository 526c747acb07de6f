"""From a caption to its tokens, whatever the caption is.

Padding is told by segment ids, never by a token id: every id of the vocabulary may
stand in a text. T tokens of a caption.
"""

import dataclasses
import functools
import hashlib
import pathlib
import re

import numpy as np
from jaxtyping import Int32

from navit_jax.data import vocabularies
from navit_jax.data.records import digest
from navit_jax.data.vocabularies import Vocabulary
from navit_jax.errors import ConfigError

# Trained on the embedded captions by `python -m navit_jax.data.text`.
DEFAULT = pathlib.Path(__file__).parent / "clipart.model"
# Raise it when `Tokenizer.encode` gives other ids for the same caption and file.
VERSION = 2
# No token stands for more characters than this, but for those that are left out.
LONGEST_TOKEN = 256
CONTROLS = re.compile(r"[\x00-\x1f\x7f-\x9f]+")
SURROGATES = re.compile(r"[\ud800-\udfff]")
BROKEN = "\ufffd"


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """Makes captions tokens; survives pickle, used from several threads.

    Attributes:
      vocabulary: See `vocabularies.read`.
      length: Tokens of a caption at most, marks included.
      empty: "skip" leaves out a caption that says nothing, "keep" gives its marks.
      broken: Of captions that were no UTF-8, "replace" keeps what could be read, "skip"
        leaves them out.
    """

    vocabulary: Vocabulary
    length: int = 24
    empty: str = "skip"
    broken: str = "replace"

    @property
    def vocab_size(self) -> int:
        """One more than the largest id."""
        return self.vocabulary.size

    @functools.cached_property
    def fingerprint(self) -> str:
        """Hexadecimal; differs if any caption may have other tokens."""
        contents = hashlib.sha256(self.vocabulary.contents).hexdigest()
        settings = (self.vocabulary.marks, self.length, self.empty, self.broken)
        return digest([VERSION, contents, *settings])

    @functools.cached_property
    def _marks(self) -> list[int]:
        return self.vocabulary.encode("", self.length)

    def encode(self, caption: str) -> Int32[np.ndarray, " T"]:
        """The tokens of a caption, marks included; none if it is to be left out."""
        text = clean(caption)
        if BROKEN in text and self.broken == "skip":
            return np.zeros(0, np.int32)
        looked_at = LONGEST_TOKEN * self.length
        ids = self.vocabulary.encode(text[:looked_at], self.length)
        while len(ids) < self.length and looked_at < len(text):
            # It leaves out characters, as of no width, or makes one of many unknown.
            looked_at *= 4
            ids = self.vocabulary.encode(text[:looked_at], self.length)
        if ids == self._marks and self.empty == "skip":
            ids = []
        return np.array(ids, np.int32)


def clean(caption: str) -> str:
    """Makes one line of a caption that any library takes; "" if nothing is to be seen.

    Control characters are blanks, blanks are single; of a surrogate without its other
    half, the sign for what can not be read is left. Letters, emoji and marks of the
    direction of writing stay as they are.
    """
    text = SURROGATES.sub(BROKEN, CONTROLS.sub(" ", caption))
    text = " ".join(text.split())
    seen = any(c.isprintable() and c not in f" {BROKEN}" for c in text)
    return text if seen else ""


def open_tokenizer(
    vocabulary: str | None = None,
    length: int = 24,
    marks: bool = True,
    empty: str = "skip",
    broken: str = "replace",
) -> Tokenizer:
    """Opens the tokenizer that a config names.

    Args:
      vocabulary: The path of a SentencePiece .model or of a tokenizer.json; None: the
        one of the package, trained on the embedded captions.
      length: Tokens of a caption at most, marks included; the paper's 24.
      marks: Whether to put around a text what the vocabulary's authors do, such as
        T5's end and CLIP's start and end.
      empty, broken: As in Tokenizer.

    Raises:
      ConfigError: the vocabulary cannot be used, or an argument is not one of these.
    """
    for name, value, known in (
        ("empty", empty, ("skip", "keep")),
        ("broken", broken, ("replace", "skip")),
    ):
        if value not in known:
            raise ConfigError(f"{name}={value!r} is unknown; known: {', '.join(known)}")
    if not isinstance(marks, bool):
        raise ConfigError(f"marks={marks!r}: give True or False")
    opened = vocabularies.read(DEFAULT if vocabulary is None else vocabulary, marks)
    if length <= (around := len(opened.encode("", 1000))):
        raise ConfigError(
            f"length={length} has no room for a word beside {around} marks: raise it, "
            "or give marks=False"
        )
    if empty == "keep" and not around:
        raise ConfigError(
            "empty='keep' needs a mark to stand for an empty caption: the vocabulary "
            "has none, or marks=False; use 'skip'"
        )
    return Tokenizer(opened, length, empty, broken)
