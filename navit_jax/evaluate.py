"""Evaluates: `python -m navit_jax.evaluate --workdir=runs/demo --sides=32,64,128`.

Every set of `config.evals` is judged at each of its sides; (total, weight) of a metric
is summed over all images and divided once. Nothing is shuffled or dropped, and each
image counts exactly once.
"""

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from absl import flags, logging
from etils import epath
from jax.sharding import NamedSharding, PartitionSpec

from navit_jax import (
    checkpoint,
    command_line,
    data,
    experiment,
    run_folder,
    sharding,
)
from navit_jax import config as config_lib
from navit_jax.baselines import pixel_free
from navit_jax.errors import ConfigError
from navit_jax.metrics import Mean, interval_by_group
from navit_jax.tasks import Task

Params = Mapping[str, Any]


class Evaluator:
    """The eval sets of a config, each with its plan; one compilation for all."""

    def __init__(
        self,
        config: Mapping[str, Any],
        task: Task,
        mesh: jax.sharding.Mesh,
        class_names: Sequence[str],
    ):
        """Opens the sources of `config.evals` and plans every (set, side).

        Args:
          class_names: Of training; the sets must have the same ones.

        Raises:
          ConfigError: a set has other classes, or as `data.open_stream`.
        """
        self.mesh = mesh
        self.streams = {
            f"{name}_{side}": stream
            for name, section in config.get("evals", {}).items()
            for side, stream in experiment.build_eval_streams(config, section, name)
        }
        for stream in self.streams.values():
            for source in stream.loader.sources:
                data.check_classes(source, class_names)
        everywhere = NamedSharding(mesh, PartitionSpec())
        self._judge = jax.jit(
            lambda params, batch: (
                task.metrics(params, batch),
                batch.image_ids,
                batch.image_mask,
            ),
            out_shardings=everywhere,
        )

    def run(self, params: Params) -> dict[str, float]:
        """`eval/<set>_<side>/<metric>` of every set.

        Where the source knows near-duplicate groups, and a metric is by image, its 95 %
        interval is `<metric>_low` and `<metric>_high`.
        """
        values = {}
        for name, stream in self.streams.items():
            for metric, value in self._run_one(params, stream).items():
                values[f"eval/{name}/{metric}"] = value
        return values

    def _run_one(self, params: Params, stream: data.Stream) -> dict[str, float]:
        terms: list[dict[str, Mean]] = []
        ids: list[np.ndarray] = []
        num_images = 0
        rows = sharding.local_rows(self.mesh, stream.plan.rows)
        for host, info in stream.batches(rows):
            judged = self._judge(params, sharding.place(host, self.mesh))
            batch_terms, image_ids, image_mask = jax.device_get(judged)
            terms.append(batch_terms)
            num_images += int(image_mask.sum())
            ids.append(image_ids[..., 1].astype(np.int64))
            for name, reason in info.skipped:
                logging.warning("%s can not be used: %s", name, reason)
        groups = getattr(stream.loader.sources[0], "groups", None)
        values = {"images": float(num_images)}
        for metric in terms[0] if terms else ():
            total, weight = (
                np.concatenate(
                    [getattr(batch[metric], part).ravel() for batch in terms]
                )
                for part in ("total", "weight")
            )
            values[metric] = Mean(total=total.sum(), weight=weight.sum()).result()
            index = np.concatenate([batch.ravel() for batch in ids])
            if groups is not None and index.shape == weight.shape:
                here = weight > 0
                values[f"{metric}_low"], values[f"{metric}_high"] = interval_by_group(
                    total[here], weight[here], groups[index[here]]
                )
        return values


def evaluate(
    workdir: epath.PathLike,
    sides: Sequence[float | int] = (),
    split: str = "",
    step: int | str | None = None,
    baselines: bool = False,
) -> dict[str, float]:
    """Judges a checkpoint of a run; writes `evaluation.json` in its folder.

    Args:
      sides: In pixels; those of the config if empty.
      split: Of the eval sets' sources, e.g. "test"; that of the config if empty.
      step: Of the checkpoint; None is the newest, see `checkpoint.restore_params`.
      baselines: Whether to add what classifiers get that see no pixel.

    Returns:
      `eval/<set>_<side>/<metric>` by name, and `baseline/<name>/accuracy`.
    """
    workdir = epath.Path(workdir).absolute()
    config = run_folder.read_config(workdir)
    sections = {}
    for name, section in config.get("evals", {}).items():
        sources = {
            key: {**source, "split": split} if split else source
            for key, source in section["sources"].items()
        }
        replaced = {"sources": sources, **({"sides": list(sides)} if sides else {})}
        several = len(config["evals"]) > 1
        label = f"{name}_{split}" if split and several else split or name
        sections[label] = {**section, **replaced}
    if not sections:
        raise ConfigError("config.evals is empty: there is no set to judge on")
    config = {**config, "evals": sections}
    mesh = config_lib.call(sharding.make_mesh, config.get("mesh", {}), "mesh")
    class_names = run_folder.read_class_names(workdir)
    with jax.set_mesh(mesh):
        task = experiment.build_task(config, len(class_names))
        subtree = "ema" if experiment.train_options(config).ema else "params"
        restored = checkpoint.restore_params(
            workdir / "checkpoints", step, subtree, shardings=_replicated(mesh)
        )
        evaluator = Evaluator(config, task, mesh, class_names)
        values = evaluator.run(restored.state)
    if baselines:
        judged = next(iter(evaluator.streams.values()))
        training = experiment.build_stream(config)
        for name, value in pixel_free(training, judged).items():
            values[f"baseline/{name}/accuracy"] = value
    record = {"step": restored.step, "values": values, "command": sys.argv}
    (workdir / "evaluation.json").write_text(json.dumps(record, indent=2))
    return values


def format_table(values: Mapping[str, float]) -> str:
    """A line for each set, side and metric, with its interval where it has one."""
    lines = []
    for name, value in values.items():
        if name.endswith(("_low", "_high")):
            continue
        line = f"{name:40s} {value:8.4f}"
        if f"{name}_low" in values:
            low, high = values[f"{name}_low"], values[f"{name}_high"]
            line += f"  95 % interval by near-duplicate group {low:.3f} .. {high:.3f}"
        lines.append(line)
    return "\n".join(lines)


def _replicated(mesh: jax.sharding.Mesh) -> Callable[[Any], Any]:
    everywhere = NamedSharding(mesh, PartitionSpec())
    return lambda tree: jax.tree.map(lambda _: everywhere, tree)


def define_main() -> Callable[[], int]:
    """Defines the flags, and returns what reads them and evaluates."""
    workdir = flags.DEFINE_string("workdir", None, "Folder of the run", required=True)
    sides = flags.DEFINE_list("sides", [], "Sides in pixels, as 32,64,128")
    split = flags.DEFINE_string("split", "", "Split of the eval sets, e.g. test")
    step = flags.DEFINE_string("step", None, "A step, or `best`")
    baselines = flags.DEFINE_bool("baselines", False, "Add pixel-free classifiers")

    def main() -> int:
        chosen = step.value
        values = evaluate(
            workdir.value,
            [int(side) for side in sides.value],
            split.value,
            int(chosen) if chosen and chosen.isdecimal() else chosen,
            baselines.value,
        )
        print(format_table(values))
        return 0

    return main


if __name__ == "__main__":
    command_line.run(define_main())
