"""Judges a model on the eval sets of a config, each at several resolutions.

(total, weight) of a metric is summed over all images and divided once. Nothing is
shuffled or dropped, and each image counts exactly once. M images.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from absl import logging
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Float

from navit_jax import calibration, data, experiment, sharding
from navit_jax.batch import PackedBatch
from navit_jax.data.plan import Plan
from navit_jax.data.quality import SHRUNK, Named
from navit_jax.errors import ConfigError, DataError
from navit_jax.metrics import Mean, interval_by_group
from navit_jax.tasks import Task

Params = Mapping[str, Any]


class Evaluator:
    """The eval sets of a config, each with its plan."""

    def __init__(
        self,
        config: Mapping[str, Any],
        task: Task,
        mesh: Mesh,
        class_names: Sequence[str],
    ):
        """Opens the sources of `config.evals` and plans every (set, resolution).

        Args:
          class_names: Of training; the sets must have the same ones.

        Raises:
          ConfigError: a set has other classes, or as `data.open_stream`.
        """
        self.mesh = mesh
        self.streams = {
            f"{name}_{label}": stream
            for name, section in config.get("evals", {}).items()
            for label, stream in experiment.build_eval_streams(config, section, name)
        }
        for stream in self.streams.values():
            for source in stream.loader.sources:
                data.check_classes(source, class_names)
        self._shrunk, self._compiled = Named(SHRUNK), set()
        self._judge = jax.jit(
            lambda params, batch: (
                task.metrics(params, batch),
                batch.image_ids,
                batch.image_mask,
                (batch.segment_ids > 0).sum(),
            ),
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
        interval is `<metric>_low` and `<metric>_high`.

        Args:
          stop: Whether to leave, asked before each batch. All processes judge the same
            number of batches, so they may agree on the answer.

        Raises:
          DataError: a set has no picture that can be used.
        """
        values = {}
        for name, stream in self.streams.items():
            judged = self._run_one(params, stream, stop)
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

    def _run_one(
        self, params: Params, stream: data.Stream, stop: Callable[[], bool]
    ) -> dict[str, float]:
        terms: list[dict[str, Mean]] = []
        ids: list[np.ndarray] = []
        num_images = num_tokens = shrunk = 0
        seconds: list[float] = []
        rows = sharding.local_rows(self.mesh, stream.plan.rows)
        for host, info in stream.batches(rows):
            if stop():
                return {}
            judged, taken = self._time(params, host)
            if host.segment_ids.shape not in self._compiled:
                # The first call of a shape compiles it: timed again.
                self._compiled.add(host.segment_ids.shape)
                taken = self._time(params, host)[1]
            seconds.append(taken)
            batch_terms, image_ids, image_mask, tokens = judged
            terms.append(batch_terms)
            num_images += int(image_mask.sum())
            num_tokens += int(tokens)
            shrunk += len(info.shrunk)
            self._shrunk.note(info.shrunk)
            ids.append(image_ids[..., 1].astype(np.int64))
            for name, reason in info.skipped:
                logging.warning("%s can not be used: %s", name, reason)
        values = {
            "images": float(num_images),
            "tokens_per_image": num_tokens / max(num_images, 1),
            "upscaled": upscaled(stream.plan),
            "shrunk": float(shrunk),
            "seconds_per_image": sum(seconds) / max(num_images, 1),
        }
        groups = getattr(stream.loader.sources[0], "groups", None)
        flat = {name: _flatten(terms, name) for name in (terms[0] if terms else ())}
        for name, (total, weight) in flat.items():
            values[name] = Mean(total=total.sum(), weight=weight.sum()).result()
            index = np.concatenate([batch.ravel() for batch in ids])
            if groups is not None and index.shape == weight.shape:
                here = weight > 0
                values[f"{name}_low"], values[f"{name}_high"] = interval_by_group(
                    total[here], weight[here], groups[index[here]]
                )
        if "confidence" in flat and flat["confidence"][1].any():
            here = flat["confidence"][1] > 0
            confidence, right = (flat[k][0][here] for k in ("confidence", "accuracy"))
            error = calibration.calibration_error(confidence, right)
            values["calibration_error"] = error
            values["calibrated_error"] = calibration.calibrated_error(confidence)
        return values

    def _time(self, params: Params, host: PackedBatch) -> tuple[Any, float]:
        """What a batch is judged as, and the seconds it took on the devices."""
        batch = jax.block_until_ready(sharding.place(host, self.mesh))
        begun = time.perf_counter()
        judged = jax.device_get(self._judge(params, batch))
        return judged, time.perf_counter() - begun


def upscaled(plan: Plan) -> float:
    """The share of an evaluation's images that are enlarged."""
    if plan.square:
        return float("nan")  # its sides change by different factors
    sizes = np.asarray(plan.tables[0], np.int64)
    own = np.sqrt(sizes.prod(1))
    side = plan.resolution(np.zeros(len(sizes)), sizes)
    return float((plan.upscale & (side > own * (1 + 1e-9)) & (own > 0)).mean())


def _flatten(
    terms: Sequence[Mapping[str, Mean]], name: str
) -> tuple[Float[np.ndarray, " M"], Float[np.ndarray, " M"]]:
    """Totals and weights of one metric over all batches."""
    totals = [np.ravel(batch[name].total) for batch in terms]
    weights = [np.ravel(batch[name].weight) for batch in terms]
    return np.concatenate(totals), np.concatenate(weights)
