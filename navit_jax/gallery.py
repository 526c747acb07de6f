"""Captions with the pictures a two-tower run finds for them, and the other way round.

For the report. M pictures, S texts, P pairs (picture, text).
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float32, Integer

from navit_jax import (
    data,
    judges,
    page,
    predictor,
    retrieval,
    samples,
    text_embedder,
)
from navit_jax.data.bad_image import BadImage
from navit_jax.data.records import Record, Selection
from navit_jax.errors import ConfigError

# Answers to each question, and pictures that are looked through; they are all read.
ANSWERS = 5
MOST = 1000


class Found(NamedTuple):
    """What a model says of a set: all that can be used, or an even choice of it.

    Attributes:
      records: M.
      texts: S, distinct as `retrieval.list_pairs` has it.
      pairs: Which picture has which text.
      scores: Cosines.
    """

    records: Sequence[Record]
    texts: Sequence[str]
    pairs: Integer[np.ndarray, "P 2"]
    scores: Float32[np.ndarray, "M S"]


def show_gallery(
    model: predictor.Predictor, evals: Mapping[str, Mapping[str, Any]], num: int
) -> dict[str, str]:
    """HTML by title: for captions of the retrieval sets the best pictures, and for
    pictures the best captions; both "" without such sets.

    Args:
      evals: Of the run's config.
      num: Questions of all sets together, but at least one of each kind a set.

    Raises:
      ConfigError: the run has no text tower, or a set no caption of use.
      OSError: the pictures are not here.
    """
    sets = {k: v for k, v in evals.items() if v.get("name") == "retrieval"}
    by_caption = by_picture = ""
    for name, section in sets.items():
        found, share = _search(model, section), max(1, num // (2 * len(sets)))
        note = page.note(
            f"{name}: {len(found.records)} pictures and {len(found.texts)} captions of "
            f"{samples.describe(section)}; green: the caption is one of the picture's"
        )
        asked = _ask(found.scores.T, found.pairs[:, ::-1], share)
        by_caption += note + "".join(_show_caption(found, *each) for each in asked)
        asked = _ask(found.scores, found.pairs, share)
        by_picture += note + "".join(_show_picture(found, *each) for each in asked)
    return {
        "Captions and the pictures found": by_caption,
        "Pictures and the captions found": by_picture,
    }


def _search(model: predictor.Predictor, section: Mapping[str, Any]) -> Found:
    """Pictures and texts of a set, paired as its judge pairs them."""
    (source, *_), _ = data.open_sources(section["sources"])
    places = np.unique(np.linspace(0, len(source) - 1, MOST).round().astype(np.int32))
    records = list(judges.read_all(Selection(source, places)))
    files = [record.image for record in records]
    results = model.results("image", files, model.law())
    vectors = {r.place: r.value for r in results if not isinstance(r.value, BadImage)}
    texts, pairs = retrieval.list_pairs([record.captions for record in records])
    embedder = text_embedder.open_embedder(model.config, model.task, model.mesh)
    text_vectors, known = embedder.embed(model.params, texts)
    here = np.array(sorted(vectors), np.int64)
    used, chosen, pairs = retrieval.restrict(pairs[known[pairs[:, 1]]], here)
    if not len(pairs):
        raise ConfigError(judges.no_captions(source))
    used = here[used].tolist()
    scores = np.stack([vectors[i] for i in used]) @ text_vectors[chosen].T
    return Found([records[i] for i in used], [texts[i] for i in chosen], pairs, scores)


def _ask(
    scores: np.ndarray, pairs: Integer[np.ndarray, "P 2"], num: int
) -> list[tuple[int, list[tuple[int, bool]], int]]:
    """Questions spread evenly: (question, [(answer, whether it is right)], place).

    Args:
      scores: Of the answers to each question.
      pairs: Each a question with one that is right.

    Returns:
      The place is that of the first right answer among all, from 1.
    """
    asked = np.unique(np.linspace(0, len(scores) - 1, num).round().astype(int))
    questions = []
    for question in asked.tolist():
        order = np.argsort(-scores[question], kind="stable")
        right = np.isin(order, pairs[pairs[:, 0] == question, 1])
        best = list(zip(order.tolist(), right.tolist(), strict=True))[:ANSWERS]
        questions.append((question, best, int(right.argmax()) + 1))
    return questions


def _show_caption(
    found: Found, text: int, best: Sequence[tuple[int, bool]], place: int
) -> str:
    figures = "".join(
        f"<figure class='{_mark(right)}'>{page.thumbnail(found.records[i].image)}"
        f"<figcaption>{found.scores[i, text]:.2f}</figcaption></figure>"
        for i, right in best
    )
    question = f"{page.text(found.texts[text])}<br>{_place(place, found.records)}"
    return _question(question, f"<div class='samples'>{figures}</div>")


def _show_picture(
    found: Found, image: int, best: Sequence[tuple[int, bool]], place: int
) -> str:
    lines = "".join(
        f"<li class='{_mark(right)}'>{page.text(found.texts[i])} "
        f"<span>{found.scores[image, i]:.2f}</span></li>"
        for i, right in best
    )
    own = found.pairs[found.pairs[:, 0] == image, 1]
    told = "; ".join(found.texts[int(i)] for i in np.unique(own))
    picture = page.thumbnail(found.records[image].image)
    question = f"{picture}{page.text(told)}<br>{_place(place, found.texts)}"
    return _question(question, f"<ol>{lines}</ol>")


def _question(question: str, answers: str) -> str:
    return f"<div class='asked'><div>{question}</div>{answers}</div>"


def _mark(right: bool) -> str:
    return "right" if right else "wrong"


def _place(place: int, answers: Sequence[Any]) -> str:
    return f"<i>the right one: {place} of {len(answers)}</i>"
