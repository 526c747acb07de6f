"""Weights of other people as a `Predictor`: `navit_jax.load("vit_s14")`."""

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
from etils import epath
from jax.sharding import NamedSharding, PartitionSpec

from navit_jax import config as config_lib
from navit_jax import predictor, sharding, weights
from navit_jax.batch import PackedBatch
from navit_jax.errors import ConfigError
from navit_jax.metrics import Mean
from navit_jax.models import MODELS, patch_size
from navit_jax.tasks import Classification, Task
from navit_jax.weights import fetch, texts
from navit_jax.weights.files import READERS

# Pictures of the default size in a row.
IMAGES = 4
# In pixels, of what has no grid of its own, as SparseFormers.
SIDE = 224


@dataclasses.dataclass(frozen=True)
class Features:
    """An encoder without a head, as a task that nothing can train.

    Attributes:
      encoder: The packed encoder.
    """

    encoder: nn.Module

    def init(self, key: jax.Array, batch: PackedBatch) -> Mapping[str, Any]:
        """Fresh parameters."""
        row = batch.patches, batch.coords, batch.segment_ids, batch.grids
        return {"encoder": self.encoder.init(key, *row)["params"]}

    def weights(self, batch: PackedBatch) -> dict[str, jax.Array]:
        """Nothing is counted."""
        return {}

    def loss(
        self,
        params: Mapping[str, Any],
        batch: PackedBatch,
        key: jax.Array,
        weights: Mapping[str, jax.Array],
    ) -> tuple[jax.Array, dict[str, Mean]]:
        """Refused: there is none."""
        raise ConfigError("an encoder without a head has no loss: give a config.task")

    def outputs(
        self, params: Mapping[str, Any], batch: PackedBatch
    ) -> dict[str, jax.Array]:
        """`tokens` [B L D], `pooled` [B N D] and, with a class token, `class`.

        With a projection also `image` [B N E], which is not of length 1.
        """
        row = batch.patches, batch.coords, batch.segment_ids, batch.grids
        out: Any = self.encoder.apply({"params": params["encoder"]}, *row)
        if "image_head" in params:
            out["image"] = out["pooled"] @ params["image_head"]["kernel"]
        return out

    def metrics(self, params: Mapping[str, Any], batch: PackedBatch) -> dict[str, Mean]:
        """Nothing is judged."""
        return {}


def load(
    workdir: epath.PathLike, step: int | str | None = None, **replace: Any
) -> predictor.Predictor:
    """The model of a run, or of weights, on the devices of this process.

    Args:
      workdir: The folder of a run; or a checkpoint of another library, a file or a
        folder with `model.safetensors`; or a name that `weights.fetch` knows.
      step: Of a run, as in `predictor.load`.
      replace: Of a checkpoint, as in `weights.read`.

    Raises:
      ConfigError: there is nothing of the kind.
      CheckpointError: the run has no such checkpoint.
    """
    name, path = str(workdir), pathlib.Path(workdir)
    foreign = (path / "model.safetensors").is_file() or path.suffix in READERS
    if name in fetch.PACKAGES or foreign:
        return open_weights(name, **replace)
    if replace:
        raise ConfigError(f"{workdir} is no file of weights: {', '.join(replace)}")
    return predictor.load(workdir, step)


def open_weights(name: str, **replace: Any) -> predictor.Predictor:
    """A checkpoint of another library, by file or by name; arguments as of `load`.

    Pictures are seen at the size that its positions were trained for, unless a dial
    says otherwise; a head that classifies is kept.
    """
    found = weights.read(fetch.find(name), **replace)
    encoder = config_lib.build(found.model, MODELS, "model")
    side, positions = patch_size(found.model["size"]), found.model.get("positions", {})
    pixels = min(SIDE, encoder.max_side * side)
    if rows := positions.get("side"):
        pixels = round((rows * positions.get("columns", rows)) ** 0.5 * side)
    if name in fetch.PACKAGES:
        pixels = fetch.PACKAGES[name].side
    config = {
        "data": {
            "resolution": {"name": "fixed", "side": pixels},
            "tokens": IMAGES * max(pixels // side, 1) ** 2,
            "slots": 4 * IMAGES,
        },
        "model": found.model,
        "task": {"name": "features"},
    }
    task: Task = Features(encoder)
    class_names: list[str] = []
    if "head" in found.params:
        num_classes = found.params["head"]["dense"]["kernel"].shape[1]
        class_names = [str(i) for i in range(num_classes)]
        task = Classification(encoder, num_classes, "softmax")
    mesh = sharding.make_mesh(devices=jax.local_devices())
    everywhere = NamedSharding(mesh, PartitionSpec())
    images = {k: v for k, v in found.params.items() if k not in texts.ROOTS}
    params = jax.device_put(images, everywhere)
    return predictor.Predictor(config, class_names, task, params, 0, mesh)
