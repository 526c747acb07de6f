"""Zero-shot classification: by what classes are called, with no weight of their own.

A class is the mean of the embeddings of its name in every template (Radford et al.
2021, section 3.1.4). C classes, S prompts of all classes, E embedding width.
"""

import re
from collections.abc import Iterable, Sequence

import numpy as np
from jaxtyping import Bool, Float

from navit_jax.data.tokenizer import clean
from navit_jax.errors import ConfigError

# The name alone.
TEMPLATES = ("{}",)


def list_prompts(names: Sequence[str], templates: Sequence[str]) -> list[str]:
    """Every name in every template, class by class.

    Raises:
      ConfigError: names or templates are no list of text, two names are alike, or a
        template has not one place for the name.
    """
    for field, values in (("classes", names), ("templates", templates)):
        one = isinstance(values, str) or not all(isinstance(v, str) for v in values)
        if one or not len(values):
            raise ConfigError(f"{field}={values!r}: give a list of texts")
    alike = [name.strip().casefold() for name in names]
    if twice := [n for n, a in zip(names, alike, strict=True) if alike.count(a) > 1]:
        raise ConfigError(
            f"classes: {twice} are alike, and a picture can not be told to be of one "
            "of them; call each class otherwise"
        )
    for template in templates:
        if template.count("{}") != 1:
            raise ConfigError(
                f"templates: {template!r} has not one place for the name of a class; "
                "write it as {}, like 'a drawing of {}'"
            )
    return [template.replace("{}", name) for name in names for template in templates]


def average_prompts(
    prompts: Float[np.ndarray, "S E"], num_classes: int
) -> Float[np.ndarray, "C E"]:
    """The embeddings of classes from those of their prompts; of length 1 like these."""
    means = prompts.reshape(num_classes, -1, prompts.shape[-1]).mean(1)
    return means / np.maximum(np.linalg.norm(means, axis=-1, keepdims=True), 1e-12)


def call_class(name: str) -> str:
    """What to call a class of a source: its name without the path, in words."""
    return name.rsplit("/", 1)[-1].replace("_", " ")


def find_absent(
    names: Sequence[str], captions: Iterable[str]
) -> Bool[np.ndarray, " C"]:
    """Which names no caption holds, as whole words in a row, of any case.

    Another form of the word, such as its plural, is another word.
    """
    wanted = {_words(name) for name in names}
    lengths = {len(words) for words in wanted}
    seen: set[tuple[str, ...]] = set()
    for caption in captions:
        words = _words(caption)
        for length in lengths:
            starts = range(len(words) - length + 1)
            seen |= wanted & {words[start : start + length] for start in starts}
    return np.array([_words(name) not in seen for name in names], bool)


def _words(text: str) -> tuple[str, ...]:
    return tuple(re.findall(r"\w+", clean(text).casefold()))
