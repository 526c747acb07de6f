"""What a run's SparseFormer looks at, for the report.

Boxes and points over pictures of its eval set, their density, and by the objects of
composed scenes how much of it is foreground.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from navit_jax import (
    data,
    experiment,
    foreground,
    look_pictures,
    models,
    page,
    pictures,
    predictor,
    samples,
)
from navit_jax.data import composites, images
from navit_jax.data.bad_image import BadImage
from navit_jax.data.records import Record
from navit_jax.errors import ConfigError
from navit_jax.foreground import Look
from navit_jax.models import latents
from navit_jax.models import rois as boxes

# Pictures that are drawn, those whose points are pooled, and scenes that are measured.
DRAWN, POOLED, SCENES = 4, 48, 200
LONGEST = 320  # pixels of a drawn picture
SPLIT = "validation"
TITLES = ("Where it looks", "Density of its samples", "Looking at objects")


def watch(model: Any) -> predictor.Predictor:
    """The same predictor, which also tells what its tokens look at."""
    encoder = model.task.encoder.clone(capture=True)
    task = dataclasses.replace(model.task, encoder=encoder)
    return dataclasses.replace(model, task=task)


def look(
    model: predictor.Predictor, records: Sequence[Record]
) -> list[Look | BadImage]:
    """What a model of `watch` looks at in each picture, at its largest side."""
    found: list[Any] = [None] * len(records)
    files = [record.image for record in records]
    for result in model.results("looks", files, model.law()):
        value = result.value
        if not isinstance(value, BadImage):
            value = value[:, ~np.isnan(value[0, :, 0])]
            points = value[..., 4:].reshape(*value.shape[:2], -1, 2)
            value = Look(value[..., :4], points)
        found[result.place] = value
    return found


def start(encoder: models.SparseFormer, count: int) -> Look:
    """What `count` tokens look at before any step of training, at each stage."""
    shape = encoder.full_shape
    rois = boxes.resize_table(jnp.asarray(latents.start_boxes(shape)), count)
    grid = jnp.broadcast_to(boxes.point_grid(shape.points), (1, count, shape.points, 2))
    points = boxes.place_points(rois[None], grid)
    return Look(np.asarray(rois)[None], np.asarray(points))


def show_looks(
    model: predictor.Predictor, evals: Mapping[str, Mapping[str, Any]]
) -> dict[str, str]:
    """HTML by title; {} of a run whose encoder does not choose where it looks.

    Args:
      evals: Of the run's config; pictures are of the first set.

    Raises:
      ConfigError: the task does not tell.
      OSError: the pictures are not here.
    """
    encoder = experiment.build_encoder(model.config)
    if not isinstance(encoder, models.SparseFormer):
        return {}
    watched, parts = watch(model), []
    for name, section in list(evals.items())[:1]:
        parts = _show_pictures(watched, name, section)
    parts = parts or [""] * 2
    return dict(zip(TITLES, [*parts, _show_objects(watched, encoder)], strict=True))


def _show_pictures(
    model: predictor.Predictor, name: str, section: Mapping[str, Any]
) -> list[str]:
    """Boxes with points, and their density."""
    (source, *_), _ = data.open_sources(section["sources"])
    places = np.unique(np.linspace(0, len(source) - 1, POOLED).round().astype(int))
    records = [source[int(place)] for place in places]
    seen = [
        (record, found)
        for record, found in zip(records, look(model, records), strict=True)
        if isinstance(found, Look)
    ]
    if not seen:
        raise ConfigError(f"{name}: none of {len(records)} pictures can be used")
    chosen = np.unique(np.linspace(0, len(seen) - 1, DRAWN).round().astype(int))
    shown = [_read(seen[i][0].image) for i in chosen]
    drawn, every = [seen[i][1] for i in chosen], [found for _, found in seen]
    told = f"{name}: {samples.describe(section)}"
    return [
        page.note(f"{told}. {CAPTION}")
        + _embed(look_pictures.draw_looks(shown, drawn), "png", TITLES[0]),
        page.note(f"{told}. {DENSITY}")
        + _embed(look_pictures.draw_density(shown, drawn, every), "jpeg", TITLES[1]),
    ]


CAPTION = (
    "A column for each time that the tokens look; dots are all points they read, and "
    f"{look_pictures.TOKENS} tokens have their box and points in a colour of their own."
)
DENSITY = (
    "Points near each place (a top-hat kernel), in multiples of an even spread; below, "
    "of many pictures together."
)


def _read(picture: bytes) -> np.ndarray:
    size = images.read_size(picture)
    scale = min(1, LONGEST / max(size))
    height, width = (max(1, round(side * scale)) for side in size)
    return images.read(picture, size, (height, width))[0]


def _embed(drawing: Any, kind: str, title: str) -> str:
    return page.embed_image(pictures.encode(drawing, kind), kind, title)


def measure_scenes(
    model: predictor.Predictor, encoder: models.SparseFormer, num: int
) -> tuple[composites.Composites, dict[str, np.ndarray]]:
    """`foreground.measure` of scenes with known objects, which are not of training.

    Raises:
      ConfigError: what scenes are made of is not built here.
    """
    scenes = composites.composites(SPLIT, num, labels="none")
    records, measures, starts = [scenes[i] for i in range(num)], [], {}
    for record, found in zip(records, look(model, records), strict=True):
        assert isinstance(found, Look), "scenes are pictures"
        assert record.objects is not None, "of scenes all objects are known"
        count = found.rois.shape[1]
        if count not in starts:
            starts[count] = start(encoder, count)
        mask = record.objects.instances > 0
        measures.append(foreground.measure(found, starts[count], mask))
    return scenes, foreground.join(measures)


def _show_objects(model: predictor.Predictor, encoder: models.SparseFormer) -> str:
    try:
        scenes, found = measure_scenes(model, encoder, SCENES)
    except ConfigError as error:
        return page.note(f"Not measured: {error}")
    low, high = scenes.share
    about = page.note(
        f"{len(scenes)} scenes of {scenes.name}, whose objects have {low:.0%} to "
        f"{high:.0%} of the side and cover {found['even'].mean():.1%} of the pixels. "
        "Lift: the share of points in objects over that of an even grid, of a Gaussian "
        f"at the centre (deviation {foreground.SIGMA:.2g} of the sides) and of the "
        "boxes and points at initialisation, in the same scenes; in brackets 95 % "
        "intervals by scene. Whether bootstrapping from a teacher leads to better "
        "localisation than training from scratch is not decided by these numbers where "
        "the teacher was tuned for saliency, as ViT-S/14 of this project was."
    )
    return (
        about
        + page.table(list_shares(found), SHARES)
        + "<p></p>"
        + page.table(list_boxes(found), BOXES)
    )


SHARES = (
    "", "points in objects", "lift over an even grid", "over a centre Gaussian",
    "over initialisation",
)  # fmt: skip
BOXES = (
    "", "area of a box", "over initialisation", "drift since then, sides",
    "points out of the picture",
)  # fmt: skip
OTHERS = {"even grid": "even", "centre Gaussian": "centre", "initialisation": "start"}


def list_shares(found: Mapping[str, np.ndarray]) -> list[list[str]]:
    """The share of points in objects, and its lifts, of each stage.

    And of what it is compared with, over what is named before it.

    Args:
      found: Of `foreground.join`.
    """
    compare, lines = foreground.compare, []
    others = {name: found[key] for name, key in OTHERS.items()}
    for number, (name, own) in enumerate(others.items()):
        lifts = [str(compare(own, o)) for o in list(others.values())[:number]]
        lines.append([name, str(compare(own)), *lifts, *[""] * (3 - number)])
    for stage, own in enumerate(found["inside"].T, 1):
        lifts = [str(compare(own, other)) for other in others.values()]
        lines.append([f"stage {stage}", str(compare(own)), *lifts])
    return lines


def list_boxes(found: Mapping[str, np.ndarray]) -> list[list[str]]:
    """The area of boxes, their drift, and points out of the picture; as above."""
    compare, start = foreground.compare, found["start_area"]
    lines = [["initialisation", str(compare(start)), "", "", ""]]
    by_stage = (found[key].T for key in ("area", "drift", "outside"))
    for stage, (area, *rest) in enumerate(zip(*by_stage, strict=True), 1):
        areas = [str(compare(area)), str(compare(area, start))]
        lines.append([f"stage {stage}", *areas, *(str(compare(x)) for x in rest)])
    return lines
