"""Judges a model on the eval sets of a config, each at several resolutions.

How a set is judged is one of `judges.JUDGES`. Nothing is shuffled or dropped, and each
image counts exactly once; texts are embedded once, for all resolutions of a set.
"""

import functools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from absl import logging
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from navit_jax import data, experiment, judges, reporting, sharding, text_embedder
from navit_jax.batch import PackedBatch
from navit_jax.data.plan import Plan
from navit_jax.data.quality import SHRUNK, Named
from navit_jax.errors import ConfigError, DataError
from navit_jax.judges import Metrics, Retrieval, ZeroShot
from navit_jax.judging import Asked, Judge, Texts
from navit_jax.mean_iou import MeanIou
from navit_jax.tasks import Task

Params = Mapping[str, Any]


class Evaluator:
    """The eval sets of a config, each with its judge, and its plan by resolution.

    Attributes:
      judges: By set.
      streams: By `<set>_<resolution>`.
      set_of: The set of each stream.
    """

    def __init__(
        self,
        config: Mapping[str, Any],
        task: Task,
        mesh: Mesh,
        class_names: Sequence[str],
        asked: str = "config.evals.{}.",
    ):
        """Opens the sources of `config.evals` and plans every (set, resolution).

        Args:
          class_names: Of training; sets that are judged by the task's own metrics, or
            by classes of pixels, must have the same ones.
          asked: As of `experiment.build_eval_streams`.

        Raises:
          ConfigError: a set has other classes, or asks for texts of a task that knows
            none, or as `judges.ZeroShot.ask` and `data.open_stream`.
        """
        self.mesh = mesh
        self.judges: dict[str, Judge] = {}
        self.streams: dict[str, data.Stream] = {}
        self.set_of: dict[str, str] = {}
        shards = math.prod(mesh.shape[axis] for axis in sharding.ROWS)
        for name, section in config.get("evals", {}).items():
            self.judges[name] = judges.build(section, f"evals.{name}")
            for label, stream in experiment.build_eval_streams(
                config, section, name, shards, asked
            ):
                self.streams[f"{name}_{label}"] = stream
                self.set_of[f"{name}_{label}"] = name
                judge, source = self.judges[name], stream.loader.sources[0]
                if isinstance(judge, Metrics | MeanIou):
                    data.check_classes(source, class_names)
                if isinstance(judge, ZeroShot):
                    judge.ask(source)  # Raises now, not at the first evaluation.
        self._embedder = None
        if any(isinstance(j, Retrieval | ZeroShot) for j in self.judges.values()):
            self._embedder = text_embedder.open_embedder(config, task, mesh)
        self._asked: dict[str, Asked] = {}
        # A caption comes with its picture: all sets share what is read once.
        self._training = functools.cache(
            lambda: judges.read_captions(
                data.open_sources(config["data"]["sources"])[0]
            )
        )
        self._shrunk, self._compiled = Named(SHRUNK), set()
        self._judge = jax.jit(
            lambda params, batch, compute: (
                compute(task, params, batch),
                batch.image_ids[..., 1],
                batch.image_mask,
                (batch.segment_ids > 0).sum(),
            ),
            static_argnums=2,
            out_shardings=NamedSharding(mesh, PartitionSpec()),
        )

    def check_name(self, metric: str) -> None:
        """Raises ConfigError for `eval/<set>_<resolution>/<metric>` of no set here."""
        sets = [f"eval/{name}" for name in self.streams]
        if metric and metric.rsplit("/", 1)[0] not in sets:
            raise ConfigError(
                f"config.checkpoint.best={metric!r} is of no evaluation; name a "
                f"metric, as accuracy, of {', '.join(sets) or 'config.evals: empty'}"
            )

    def run(
        self, params: Params, stop: Callable[[], bool] = lambda: False
    ) -> dict[str, float]:
        """`eval/<set>_<resolution>/<metric>` of every set; {} if it was told to stop.

        Where the source knows near-duplicate groups, and a metric is by image, its 95 %
        interval is `<metric>_low` and `<metric>_high`; agreement has one of any source.

        Args:
          stop: Whether to leave, asked before each batch. All processes judge the same
            number of batches, so they may agree on the answer.

        Raises:
          DataError: a set has no picture that can be used.
        """
        values, texts = {}, self._embed_texts(params)
        for name, stream in self.streams.items():
            judged = self._run_one(params, stream, stop, self.set_of[name], texts)
            if not judged:
                return {}
            if not judged["images"]:
                raise DataError(
                    f"no picture of the eval set {name} can be used: check the sources "
                    "of its section in config.evals"
                )
            for metric, value in judged.items():
                values[f"eval/{name}/{metric}"] = value
        return values

    def _embed_texts(self, params: Params) -> dict[str, Texts]:
        """What the texts of each set that asks for some are, at all its resolutions."""
        sources = {}
        for name, stream in self.streams.items():
            sources.setdefault(self.set_of[name], stream.loader.sources[0])
        found = {}
        for name, source in sources.items():
            if name not in self._asked:
                self._asked[name] = self.judges[name].read(source, self._training)
            if self._embedder and self._asked[name].texts:
                vectors = self._embedder.embed(params, self._asked[name].texts)
                found[name] = Texts(*vectors)
        return found

    def _run_one(
        self,
        params: Params,
        stream: data.Stream,
        stop: Callable[[], bool],
        name: str,
        texts: Mapping[str, Texts],
    ) -> dict[str, float]:
        judge, found, index = self.judges[name], [], []
        num_images = num_tokens = shrunk = 0
        seconds: list[float] = []
        rows = sharding.local_rows(self.mesh, stream.plan.rows)
        for host, info in reporting.watch(stream, name, rows):
            if stop():
                return {}
            judged, taken = self._time(params, host, judge)
            # The first call of a shape compiles it: timed again.
            if (shape := (judge.compute, host.segment_ids.shape)) not in self._compiled:
                self._compiled.add(shape)
                taken = self._time(params, host, judge)[1]
            seconds.append(taken)
            computed, images, image_mask, tokens = judged
            found.append(computed)
            index.append(np.where(image_mask, images.astype(np.int64), -1))
            num_images += int(image_mask.sum())
            num_tokens += int(tokens)
            shrunk += len(info.shrunk)
            self._shrunk.note(info.shrunk)
            for key, reason in info.skipped:
                logging.warning("%s can not be used: %s", key, reason)
        values = {
            "images": float(num_images),
            "tokens_per_image": num_tokens / max(num_images, 1),
            "upscaled": upscaled(stream.plan),
            "shrunk": float(shrunk),
            "seconds_per_image": sum(seconds) / max(num_images, 1),
        }
        if not num_images:
            return values
        return values | judge.conclude(
            self._asked[name],
            texts.get(name),
            jax.tree.map(lambda *parts: np.concatenate(parts), *map(_flatten, found)),
            np.concatenate(index).ravel(),
            stream.loader.sources[0],
        )

    def _time(
        self, params: Params, host: PackedBatch, judge: Judge
    ) -> tuple[Any, float]:
        """What a batch is judged as, and the seconds it took on the devices."""
        batch = jax.block_until_ready(sharding.place(host, self.mesh))
        begun = time.perf_counter()
        judged = jax.device_get(self._judge(params, batch, judge.compute))
        return judged, time.perf_counter() - begun


def upscaled(plan: Plan) -> float:
    """The share of an evaluation's images that are enlarged."""
    if plan.square:
        return float("nan")  # its sides change by different factors
    sizes = np.asarray(plan.tables[0], np.int64)
    own = np.sqrt(sizes.prod(1))
    side = plan.resolution(np.zeros(len(sizes)), sizes)
    return float((plan.upscale & (side > own * (1 + 1e-9)) & (own > 0)).mean())


def _flatten(found: Any) -> Any:
    """[B N ...] to [B x N ...]: slots, or tokens, in one line."""
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), found)
