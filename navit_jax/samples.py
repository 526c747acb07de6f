"""Pictures of an eval set with what a run's model says of them, for the report."""

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
    """HTML of pictures spread evenly over the first eval set, and their predictions.

    Raises:
      ConfigError: the config has no eval set, or the task predicts no classes.
      CheckpointError: there is no checkpoint.
      OSError: the pictures are not here.
    """
    sections = list(config.get("evals", {}).values())
    if not sections:
        raise ConfigError("config.evals is empty")
    (source, *_), _ = data.open_sources(sections[0]["sources"])
    places = np.unique(np.linspace(0, len(source) - 1, num).round().astype(int))
    records = [source[int(place)] for place in places]
    model = predictor.load(workdir)
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
