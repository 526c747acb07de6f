"""The one error of reading pictures: this picture can not be used, and why."""


class BadImage(ValueError):
    """A picture that can not be used; the run goes on without it.

    Attributes:
      reason: `empty` no bytes; `not_image` not the signature of a JPEG, PNG, WebP, GIF,
        BMP or TIFF; `truncated` the data end too early; `zero_size` a side of 0;
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
