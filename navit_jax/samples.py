"""Pictures of the eval sets with what a run's model says of them, for the report."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from navit_jax import data, judges, page, predictor, text_embedder, zero_shot
from navit_jax.data.bad_image import BadImage
from navit_jax.data.records import Source


def show_samples(
    model: predictor.Predictor, evals: Mapping[str, Mapping[str, Any]], num: int
) -> str:
    """HTML of pictures spread evenly over each eval set, and their predictions.

    Of a run with texts these are the sets of name `zero_shot`; "" if there are none.

    Args:
      evals: Of the run's config.
      num: Pictures of all sets together, but at least one a set.

    Raises:
      ConfigError: the task predicts no classes.
      OSError: the pictures are not here.
    """
    note = ""
    if hasattr(model.task, "embed_text"):
        evals = {k: v for k, v in evals.items() if v.get("name") == "zero_shot"}
        note = ", by what its classes are called"
    share = max(1, num // max(len(evals), 1))
    return "".join(
        page.note(f"{name}{note}: {describe(section)}")
        + _show(model, section, share, f"evals.{name}")
        for name, section in evals.items()
    )


def describe(section: Mapping[str, Any]) -> str:
    """Of which pictures a set is, by the sources of its section."""
    told = []
    for source in section["sources"].values():
        rest = [f"{k}={v}" for k, v in source.items() if k not in ("name", "weight")]
        told.append(source["name"] + (f" ({', '.join(rest)})" if rest else ""))
    return " and ".join(told)


def list_sets(config: Mapping[str, Any]) -> list[list[str]]:
    """(what, of which pictures, judged how, at which sizes) of training and each set.

    Args:
      config: Of a run.
    """
    rows = [["training", describe(config["data"]), "", ""]]
    for name, section in config.get("evals", {}).items():
        sizes = (*section.get("sides", ()), *section.get("budgets", ()))
        judge = section.get("name", "metrics")
        told = [describe(section), judge, ", ".join(map(str, sizes))]
        rows.append([f"eval/{name}", *told])
    return rows


def _show(
    model: predictor.Predictor, section: Mapping[str, Any], num: int, where: str
) -> str:
    (source, *_), _ = data.open_sources(section["sources"])
    places = np.unique(np.linspace(0, len(source) - 1, num).round().astype(int))
    records = [source[int(place)] for place in places]
    output, names, ask = "probabilities", model.class_names, np.asarray
    judge = judges.build(section, where)
    if isinstance(judge, judges.ZeroShot):
        output, (names, ask) = "image", _name_classes(model, judge, source)
    shown = [""] * len(records)
    files = [record.image for record in records]
    for found in model.results(output, files, model.law()):
        record, value = records[found.place], found.value
        labels = [names[label] for label in record.labels]
        said = value if isinstance(value, BadImage) else ask(value)
        shown[found.place] = _figure(record.image, labels, said, names)
    return f"<div class='samples'>{''.join(shown)}</div>"


def _name_classes(
    model: predictor.Predictor, judge: judges.ZeroShot, source: Source
) -> tuple[Sequence[str], Callable[[np.ndarray], np.ndarray]]:
    """What classes are called, and their probabilities [C] from a picture's vector."""
    names = judge.names or list(map(zero_shot.call_class, source.class_names))
    embedder = text_embedder.open_embedder(model.config, model.task, model.mesh)
    classes = embedder.embed_classes(model.params, names, judge.templates)
    return names, lambda v: embedder.compare(model.params, v[None], classes)[0]


def _figure(
    picture: bytes, labels: Sequence[str], value: Any, names: Sequence[str]
) -> str:
    truth = page.text(", ".join(labels)) or "no label"
    if isinstance(value, BadImage):
        said = f"can not be used: {page.text(value)}"
        return f"<figure><figcaption>{said}<br><i>{truth}</i></figcaption></figure>"
    best = int(value.argmax())
    right = "right" if names[best] in labels else "wrong" if labels else ""
    return (
        f"<figure class='{right}'>{page.thumbnail(picture)}"
        f"<figcaption><b>{page.text(names[best])}</b> {value[best]:.2f}<br>"
        f"<i>{truth}</i></figcaption></figure>"
    )
