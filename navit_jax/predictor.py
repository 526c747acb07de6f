"""A trained model for whoever has pictures: `navit_jax.load(workdir)`.

M pictures, K texts, C classes, D width, E width that pictures and texts share.
"""

import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from absl.logging import WARNING
from etils import epath
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Float32

from navit_jax import (
    checkpoint,
    data,
    experiment,
    models,
    reporting,
    run_folder,
    sharding,
    storage,
    text_embedder,
    zero_shot,
)
from navit_jax.batch import PackedBatch
from navit_jax.data import resolution
from navit_jax.data.bad_image import BadImage
from navit_jax.data.given import Given, check_pictures, plan_pictures
from navit_jax.data.quality import SHRUNK, Named
from navit_jax.data.records import Source
from navit_jax.dial import Side, choose_law
from navit_jax.errors import ConfigError
from navit_jax.results import Result, describe, list_results, stack
from navit_jax.tasks import Task

# Each a path, the bytes of a file, a Pillow image, or a uint8 array; or a source.
Pictures = Sequence[Any] | np.ndarray | Source


@dataclasses.dataclass(frozen=True, eq=False)
class Predictor:
    """A run's model, applied to pictures of any size.

    Pictures are scaled in their own aspect, packed several to a row, and come back in
    the order they were given. What is packed beside a picture changes its numbers by
    rounding alone: below 1e-5 of the largest in float32, 1e-2 in bfloat16.

    The dial between cost and quality is `side`, in pixels, of the square with the
    picture's area ("native": its own), or `tokens`, the most patches of a picture;
    without either it is the largest side of training. `upscale=False` keeps smaller
    pictures as they are, `True` enlarges them; None is as in training. What is longer
    than the model's positions reach, or than `given.LONGEST` patches, is seen smaller;
    the log names such pictures.

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
        return stack(found, len(self.class_names))

    def embed(
        self,
        images: Pictures,
        *,
        side: Side = None,
        tokens: float | int | None = None,
        upscale: bool | None = None,
    ) -> Float32[np.ndarray, "M width"]:
        """A vector of each picture; raises as `predict`.

        Of a run with texts that in the shared space, of E and of length 1, which can be
        compared with those of `embed_text`; of others the pooled one, of D, before the
        head.
        """
        if hasattr(self.task, "embed_text"):
            found = self._all("image", images, side, tokens, upscale)
            return stack(found, self._embedder.task.width)
        found = self._all("pooled", images, side, tokens, upscale)
        return stack(found, self._encoder.spec.width)

    def embed_text(self, texts: Sequence[str]) -> Float32[np.ndarray, "K E"]:
        """The vector of each text in the space of `embed`, of length 1.

        Raises:
          ConfigError: the run has no text tower.
          ValueError: `texts` is no list of texts, or the run's tokenizer leaves one of
            them out, as it says nothing.
        """
        return self._embedder.embed_all(self.params, texts)

    def similarity(
        self,
        images: Pictures,
        texts: Sequence[str],
        *,
        side: Side = None,
        tokens: float | int | None = None,
        upscale: bool | None = None,
    ) -> Float32[np.ndarray, "M K"]:
        """The cosine of each picture with each text; raises as `embed_text`."""
        found = self.embed_text(texts)
        dial = {"side": side, "tokens": tokens, "upscale": upscale}
        return self.embed(images, **dial) @ found.T

    def zero_shot(
        self,
        images: Pictures,
        classes: Sequence[str],
        templates: Sequence[str] = zero_shot.TEMPLATES,
        *,
        side: Side = None,
        tokens: float | int | None = None,
        upscale: bool | None = None,
    ) -> Float32[np.ndarray, "M C"]:
        """The probability of each class by what it is called, by picture.

        A class is the mean of its name's embeddings in all templates. Of a run with the
        softmax loss it is the softmax over these classes of scale x cosine, as in
        training; with the sigmoid each class has its own, and they sum to anything.

        Args:
          templates: Texts with one {} for the name.

        Raises:
          ValueError: as `embed_text`.
        """
        dial = {"side": side, "tokens": tokens, "upscale": upscale}
        vectors = self._embedder.embed_classes(self.params, classes, templates)
        return self._embedder.compare(self.params, self.embed(images, **dial), vectors)

    def tokens(
        self,
        images: Pictures,
        *,
        side: Side = None,
        tokens: float | int | None = None,
        upscale: bool | None = None,
    ) -> list[Float32[np.ndarray, "rows columns D"]]:
        """The encoded patches of each picture, on its grid; raises as `predict`."""
        if isinstance(self._encoder, models.SparseFormer):
            raise ConfigError("a SparseFormer has no tokens of patches; use `embed`")
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
        stream, shrunk = self._stream(images, law, upscale), Named(SHRUNK, WARNING)
        for host, info in reporting.watch(stream, "pictures"):
            # Not around the yield: whoever asks would go on under this mesh.
            with jax.set_mesh(self.mesh):
                batch = sharding.place(host, self.mesh)
                values = jax.device_get(self._output(self.params, batch, name))
            shrunk.note(info.shrunk)
            yield from list_results(host, info, values, name == "tokens")

    def _all(self, name: str, images: Pictures, *dial: Any) -> list[Any]:
        side, tokens, upscale = dial
        found: dict[int, Any] = {}
        for result in self.results(name, images, self.law(side, tokens), upscale):
            if isinstance(result.value, BadImage):
                raise ValueError(
                    f"images[{result.place}] ({describe(images[result.place])}) can "
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
                    f"{', '.join(sorted(outputs))}: use another method of the model"
                )
            return outputs[name].astype("float32")

        everywhere = NamedSharding(self.mesh, PartitionSpec())
        return jax.jit(output, static_argnums=2, out_shardings=everywhere)

    def law(
        self, side: Side = None, tokens: float | int | None = None
    ) -> resolution.Law:
        """The resolution that a dial stands for; raises as `choose_law`."""
        return choose_law(self.config, side, tokens)

    @functools.cached_property
    def _embedder(self) -> text_embedder.TextEmbedder:
        return text_embedder.open_embedder(self.config, self.task, self.mesh)

    @functools.cached_property
    def _encoder(self) -> models.Encoder:
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
            num_labels=0,
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
    return restore(workdir, step, sharding.make_mesh(devices=jax.local_devices()))


def restore(workdir: epath.PathLike, step: int | str | None, mesh: Mesh) -> Predictor:
    """As `load` on a mesh, which need not be the one that the run trained on.

    Of several processes only what judges batches can use one over all their devices.
    """
    workdir = storage.locate(workdir)
    config = run_folder.use_own_vocabulary(workdir, run_folder.read_config(workdir))
    class_names = run_folder.read_class_names(workdir)
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
