"""Vocabularies as other people keep them: SentencePiece models, tokenizers JSON.

The libraries are the extra `text`, imported when a vocabulary is first opened.
"""

import dataclasses
import functools
import importlib
import pathlib
from typing import Any, Protocol, runtime_checkable

from etils import epath

from navit_jax.errors import ConfigError


@runtime_checkable
class Vocabulary(Protocol):
    """Pieces of text by number; survives pickle, used from several threads."""

    @property
    def contents(self) -> bytes:
        """The file itself, so that nothing is looked for on another machine."""
        ...

    @property
    def marks(self) -> bool:
        """Whether a text gets the marks that its authors put around it."""
        ...

    @property
    def size(self) -> int:
        """One more than the largest id."""
        ...

    def encode(self, text: str, length: int) -> list[int]:
        """The ids of the text, marks included, cut to `length` of them."""
        ...


@dataclasses.dataclass(frozen=True)
class SentencePiece:
    """A SentencePiece model, as of T5; the mark is its end of text, if it has one."""

    contents: bytes
    marks: bool

    @functools.cached_property
    def _processor(self) -> Any:
        library = load_library("sentencepiece")
        return library.SentencePieceProcessor(model_proto=self.contents)

    def __reduce__(self):
        return SentencePiece, (self.contents, self.marks)

    @property
    def size(self) -> int:
        """As in Vocabulary, and so are the other members."""
        return self._processor.vocab_size()

    def encode(self, text: str, length: int) -> list[int]:
        """Ids of the text; the end stays where the text is cut."""
        end = self._processor.eos_id()
        ends = [end] if self.marks and end >= 0 else []
        return self._processor.encode(text)[: length - len(ends)] + ends


@dataclasses.dataclass(frozen=True)
class HuggingFace:
    """A `tokenizer.json` of Hugging Face, as of CLIP; marks are its post-processor's.

    Whether the file itself asks to pad or to cut makes no difference, and a mark that a
    caption spells out is text like other text.
    """

    contents: bytes
    marks: bool

    @functools.cached_property
    def _tokenizer(self) -> Any:
        tokenizer = load_library("tokenizers").Tokenizer.from_buffer(self.contents)
        tokenizer.no_padding()
        tokenizer.no_truncation()
        tokenizer.encode_special_tokens = True
        return tokenizer

    def __reduce__(self):
        # The library's own pickle forgets `encode_special_tokens`.
        return HuggingFace, (self.contents, self.marks)

    @property
    def size(self) -> int:
        """As in Vocabulary, and so are the other members."""
        return max(self._tokenizer.get_vocab(with_added_tokens=True).values()) + 1

    def encode(self, text: str, length: int) -> list[int]:
        """Ids of the text; marks stay where the text is cut."""
        encoding = self._tokenizer.encode(text, add_special_tokens=False)
        around = self._tokenizer.num_special_tokens_to_add(False) if self.marks else 0
        encoding.truncate(length - around)
        if self.marks:
            encoding = self._tokenizer.post_process(encoding)
        return encoding.ids


def load_library(package: str) -> Any:
    """Imports a library of the extra `text`.

    Raises:
      ConfigError: it is not installed.
    """
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise ConfigError(
            f"captions need the package {package}: `pip install -e .[text]`"
        ) from error


def read(path: str | pathlib.Path, marks: bool) -> Vocabulary:
    """Opens a vocabulary, whose format its contents tell.

    Raises:
      ConfigError: there is no such file, it is no vocabulary, or the library that reads
        it is not installed.
    """
    file = epath.Path(path).expanduser()
    try:
        contents = file.read_bytes()
    except OSError as error:
        raise ConfigError(
            f"vocabulary={str(path)!r} cannot be read ({error.strerror}): give the "
            "path of a SentencePiece .model or of a tokenizer.json"
        ) from error
    kind = HuggingFace if contents.lstrip()[:1] == b"{" else SentencePiece
    vocabulary = kind(contents, marks)
    try:
        if not contents or vocabulary.size <= 0:
            raise ValueError("it is empty")
    except ConfigError:
        raise
    except Exception as error:  # Each library has classes of its own.
        raise ConfigError(
            f"vocabulary={str(path)!r} is neither a SentencePiece .model nor a "
            f"tokenizer.json of Hugging Face (a vocab.json or merges.txt alone will "
            f"not do): {str(error)[:200]}"
        ) from error
    return vocabulary
