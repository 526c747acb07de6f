"""Pictures of the eval sets with what a run's model says of them, for the report."""

import base64
import html
import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath
from PIL import Image

from navit_jax import data, predictor
from navit_jax.data import images
from navit_jax.data.bad_image import BadImage
from navit_jax.errors import ConfigError

HEIGHT = 88  # pixels, as shown


def show_samples(workdir: epath.Path, config: Mapping[str, Any], num: int) -> str:
    """HTML of pictures spread evenly over each eval set, and their predictions.

    Args:
      num: Pictures of all sets together, but at least one a set.

    Raises:
      ConfigError: the config has no eval set, or the task predicts no classes.
      CheckpointError: there is no checkpoint.
      OSError: the pictures are not here.
    """
    evals = config.get("evals", {})
    if not evals:
        raise ConfigError("config.evals is empty")
    model, share = predictor.load(workdir), max(1, num // len(evals))
    return "".join(
        f"<p class='note'>{html.escape(name)}</p>{_show(model, section, share)}"
        for name, section in evals.items()
    )


def _show(model: predictor.Predictor, section: Mapping[str, Any], num: int) -> str:
    (source, *_), _ = data.open_sources(section["sources"])
    places = np.unique(np.linspace(0, len(source) - 1, num).round().astype(int))
    records = [source[int(place)] for place in places]
    names = model.class_names
    shown = [""] * len(records)
    files = [record.image for record in records]
    for found in model.results("probabilities", files, model.law()):
        record = records[found.place]
        labels = [names[label] for label in record.labels]
        shown[found.place] = _figure(record.image, labels, found.value, names)
    return f"<div class='samples'>{''.join(shown)}</div>"


def _figure(
    picture: bytes, labels: Sequence[str], value: Any, names: Sequence[str]
) -> str:
    truth = html.escape(", ".join(labels)) or "no label"
    if isinstance(value, BadImage):
        said = f"can not be used: {html.escape(str(value))}"
        return f"<figure><figcaption>{said}<br><i>{truth}</i></figcaption></figure>"
    best = int(value.argmax())
    right = "right" if names[best] in labels else "wrong" if labels else ""
    return (
        f"<figure class='{right}'><img alt='' src='{_thumbnail(picture)}'>"
        f"<figcaption><b>{html.escape(names[best])}</b> {value[best]:.2f}<br>"
        f"<i>{truth}</i></figcaption></figure>"
    )


def _thumbnail(picture: bytes) -> str:
    height, width = size = images.read_size(picture)
    target = HEIGHT, max(1, min(4 * HEIGHT, round(width * HEIGHT / height)))
    pixels, _ = images.read(picture, size, target)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format="jpeg", quality=85)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"
