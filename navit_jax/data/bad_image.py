"""The one error of reading pictures: this picture can not be used, and why."""

import contextlib
from collections.abc import Iterator


class BadImage(ValueError):
    """A picture that can not be used; the run goes on without it.

    Attributes:
      reason: `empty` no bytes; `not_image` not the signature of a JPEG, PNG, WebP, GIF,
        BMP, TIFF or NPY; `truncated` the data end too early; `zero_size` a side of 0;
        `too_large` a side or the pixels over the limit; `size_changed` neither the
        planned size nor its aspect; `undecodable` everything else.
      detail: For people.
    """

    def __init__(self, reason: str, detail: str = ""):
        # Both are passed on, so that the error survives the way between processes.
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = detail

    def __str__(self) -> str:
        return f"{self.reason}: {self.detail}" if self.detail else self.reason


@contextlib.contextmanager
def decoding() -> Iterator[None]:
    """Goes around what Pillow does with a file, and nothing else.

    What is raised within is the picture's fault; what our own code raises is not.
    """
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:
        reason = "truncated" if "truncated" in str(error) else "undecodable"
        raise BadImage(reason, f"{type(error).__name__}: {error}") from error
