"""A trained model for whoever has pictures: `navit_jax.load(workdir)`.

M pictures, C classes, D width.
"""

import dataclasses
import functools
import numbers
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Float32

from navit_jax import checkpoint, data, experiment, models, run_folder, sharding
from navit_jax import config as config_lib
from navit_jax.batch import BatchInfo, PackedBatch
from navit_jax.data import resolution
from navit_jax.data.bad_image import BadImage
from navit_jax.data.given import Given, check_pictures, plan_pictures
from navit_jax.data.records import Source
from navit_jax.errors import ConfigError
from navit_jax.tasks import Task

# Each a path, the bytes of a file, a Pillow image, or a uint8 array; or a source.
Pictures = Sequence[Any] | np.ndarray | Source
Side = float | int | str | None


class Result(NamedTuple):
    """What became of one picture.

    Attributes:
      place: Where it stands among the given ones.
      grid: (rows, columns) of its patches; (0, 0) of one that can not be used.
      value: The output, or the BadImage that says why there is none.
    """

    place: int
    grid: tuple[int, int]
    value: Any


@dataclasses.dataclass(frozen=True, eq=False)
class Predictor:
    """A run's model, applied to pictures of any size.

    Pictures are scaled in their own aspect, packed several to a row, and come back in
    the order they were given. What is packed beside a picture changes its numbers by
    rounding alone (below 1e-5 of the largest in float32).

    The dial between cost and quality is `side`, in pixels, of the square with the
    picture's area ("native": its own), or `tokens`, the most patches of a picture;
    without either it is the largest side of training. `upscale=False` keeps smaller
    pictures as they are, `True` enlarges them; None is as in training.

    Attributes:
      config: The run's.
      class_names: By number.
      task: As the run trained it.
      params: Of the checkpoint; the running mean where the run kept one.
      step: Of the checkpoint.
      mesh: Rows are split over its devices.
    """

    config: Mapping[str, Any] = dataclasses.field(repr=False)
    class_names: Sequence[str]
    task: Task = dataclasses.field(repr=False)
    params: Mapping[str, Any] = dataclasses.field(repr=False)
    step: int
    mesh: Mesh

    def predict(
        self,
        images: Pictures,
        *,
        side: Side = None,
        tokens: float | int | None = None,
        upscale: bool | None = None,
    ) -> Float32[np.ndarray, "M C"]:
        """The probability of each class, by picture; they sum to 1 for a softmax only.

        Raises:
          ValueError: a picture can not be used, a side that the model's positions do
            not reach, or the run's task knows no classes.
        """
        found = self._all("probabilities", images, side, tokens, upscale)
        return _stack(found, len(self.class_names))

    def embed(
        self,
        images: Pictures,
        *,
        side: Side = None,
        tokens: float | int | None = None,
        upscale: bool | None = None,
    ) -> Float32[np.ndarray, "M D"]:
        """The pooled vector of each picture, before the head; raises as `predict`."""
        found = self._all("pooled", images, side, tokens, upscale)
        return _stack(found, self._encoder.spec.width)

    def tokens(
        self,
        images: Pictures,
        *,
        side: Side = None,
        tokens: float | int | None = None,
        upscale: bool | None = None,
    ) -> list[Float32[np.ndarray, "rows columns D"]]:
        """The encoded patches of each picture, on its grid; raises as `predict`."""
        return self._all("tokens", images, side, tokens, upscale)

    def results(
        self,
        name: str,
        images: Pictures,
        law: resolution.Law,
        upscale: bool | None = None,
    ) -> Iterator[Result]:
        """One output of the task by picture, in the order of packing.

        Pictures that can not be used are results too.

        Args:
          name: "probabilities", "pooled", "tokens", or what else `task.outputs` has.
          law: The resolution of each picture; `law()` makes one.
          upscale: Whether smaller pictures are enlarged; None is as in training.

        Raises:
          ConfigError: the task has no such output.
          ValueError: `images` is no list of pictures.
        """
        check_pictures(images)
        if upscale is not None and not isinstance(upscale, bool):
            raise ConfigError(f"upscale={upscale!r}: give True, False or None")
        if not len(images):
            return
        stream = self._stream(images, law, upscale)
        for host, info in stream.batches(np.arange(stream.plan.rows)):
            # Not around the yield: whoever asks would go on under this mesh.
            with jax.set_mesh(self.mesh):
                batch = sharding.place(host, self.mesh)
                values = jax.device_get(self._output(self.params, batch, name))
            yield from _results(host, info, values, name == "tokens")

    def _all(self, name: str, images: Pictures, *dial: Any) -> list[Any]:
        side, tokens, upscale = dial
        found: dict[int, Any] = {}
        for result in self.results(name, images, self.law(side, tokens), upscale):
            if isinstance(result.value, BadImage):
                raise ValueError(
                    f"images[{result.place}] ({_describe(images[result.place])}) can "
                    f"not be used: {result.value}"
                )
            found[result.place] = result.value
        return [found[place] for place in range(len(found))]

    @functools.cached_property
    def _output(self) -> Any:
        def output(params: Any, batch: PackedBatch, name: str) -> jax.Array:
            outputs = self.task.outputs(params, batch)
            if name not in outputs:
                task = self.config["task"]["name"]
                raise ConfigError(
                    f"the task {task!r} of this run gives no {name!r}; it gives "
                    f"{', '.join(sorted(outputs))}"
                )
            return outputs[name]

        everywhere = NamedSharding(self.mesh, PartitionSpec())
        return jax.jit(output, static_argnums=2, out_shardings=everywhere)

    def law(
        self, side: Side = None, tokens: float | int | None = None
    ) -> resolution.Law:
        """The resolution that a dial stands for.

        Raises:
          ConfigError: both are given, or the model's positions do not reach so far.
        """
        patch = models.patch_size(self.config["model"]["size"])
        if side is not None and tokens is not None:
            raise ConfigError(f"side={side} and tokens={tokens}: give one of them")
        if side is None and tokens is None:
            section = self.config["data"]["resolution"]
            law = config_lib.build(section, resolution.LAWS, "data.resolution")
            return law if law.largest is None else resolution.Fixed(law.largest)
        asked: resolution.Law
        if side == "native":
            return resolution.Native()
        # True is a number to Python, of 1 pixel or token.
        if side is not None:
            if isinstance(side, str | bool) or not isinstance(side, numbers.Real):
                raise ConfigError(f"side={side!r}: give pixels, or 'native'")
            asked, given = resolution.Fixed(side), f"side={side}"
        else:
            if isinstance(tokens, bool) or not isinstance(tokens, numbers.Integral):
                raise ConfigError(f"tokens={tokens!r}: give a whole number")
            asked, given = resolution.Budget(int(tokens), patch), f"tokens={tokens}"
        longest = self._encoder.max_side
        if (asked.largest or 0) >= (longest + 1) * patch:
            raise ConfigError(
                f"{given}: the positions of this model reach {longest} patches of "
                f"{patch} pixels, so at most side={longest * patch} or "
                f"tokens={longest**2}"
            )
        return asked

    @functools.cached_property
    def _encoder(self) -> models.NaViT:
        return experiment.build_encoder(self.config)

    def _stream(
        self, images: Pictures, law: resolution.Law, upscale: bool | None
    ) -> data.Stream:
        section = self.config["data"]
        return plan_pictures(
            images if isinstance(images, Source) else Given(images),
            law,
            patch=models.patch_size(self.config["model"]["size"]),
            tokens=section["tokens"],
            slots=section["slots"],
            max_side=self._encoder.max_side,
            upscale=section.get("upscale", True) if upscale is None else upscale,
            square=section.get("square", False),
            num_labels=max(1, len(self.class_names)),
            codec=section.get("codec", "auto"),
            devices=self.mesh.size,
        )


def load(workdir: epath.PathLike, step: int | str | None = None) -> Predictor:
    """Opens the model of a run, finished or not, on the devices of this process.

    Args:
      step: Of the checkpoint: a number, "best", or None for the newest.

    Raises:
      ConfigError: the folder holds no run.
      CheckpointError: it has no such checkpoint.
    """
    workdir = epath.Path(workdir).absolute()
    config = run_folder.read_config(workdir)
    class_names = run_folder.read_class_names(workdir)
    mesh = sharding.make_mesh(devices=jax.local_devices())
    everywhere = NamedSharding(mesh, PartitionSpec())
    with jax.set_mesh(mesh):
        restored = checkpoint.restore_params(
            workdir / "checkpoints",
            step,
            "ema" if experiment.train_options(config).ema else "params",
            shardings=lambda tree: jax.tree.map(lambda _: everywhere, tree),
        )
    task = experiment.build_task(config, len(class_names))
    return Predictor(config, class_names, task, restored.state, restored.step, mesh)


def _results(
    host: PackedBatch, info: BatchInfo, values: np.ndarray, by_token: bool
) -> Iterator[Result]:
    reasons = dict(info.skipped)
    for row, names in enumerate(info.keys):
        for slot, name in enumerate(names):
            index = int(host.image_ids[row, slot, 1])
            rows, columns = grid = tuple(host.grids[row, slot].tolist())
            if not host.image_mask[row, slot]:
                yield Result(index, grid, BadImage(reasons[name]))
            elif by_token:
                own = values[row, host.segment_ids[row] == slot + 1]
                yield Result(index, grid, own.reshape(rows, columns, -1))
            else:
                yield Result(index, grid, values[row, slot])


def _describe(picture: Any) -> str:
    return (
        str(picture)
        if isinstance(picture, str | os.PathLike)
        else type(picture).__name__
    )


def _stack(found: list[Any], width: int) -> np.ndarray:
    return np.stack(found) if found else np.zeros((0, width), np.float32)
