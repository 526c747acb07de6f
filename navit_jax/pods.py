"""What a step of a config takes on devices that may be elsewhere, as it is compiled.

The program is that of training: same code, same shardings. Memory, what is sent and the
compiler's own cycles are read from it; times are estimates made of them.
"""

import math
import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from absl import logging

from navit_jax import compile, experiment, hlo, host_signals, sharding, train_flops
from navit_jax import config as config_lib
from navit_jax.data import Stream
from navit_jax.errors import ConfigError
from navit_jax.topology import Chip, Topology

SPENT = re.compile(r"\(([\d.]+)([GM])\) exceeds")


class OutOfMemory(ConfigError):
    """The compiler found no room.

    Attributes:
      needed: Bytes a device, as far as the compiler says.
    """

    def __init__(self, needed: float):
        super().__init__(f"a device would need {needed / 2**30:.2f} GiB")
        self.needed = needed


class Step:
    """A training step, compiled for a topology.

    Attributes:
      text: Of the program.
      mesh: Sizes of the mesh's axes by name.
    """

    def __init__(
        self, config: Mapping[str, Any], stream: Stream, on: Topology, classes: int
    ):
        """Compiles it.

        Args:
          classes: Of the training sources.

        Raises:
          OutOfMemory: the compiler found no room.
        """
        section = config.get("mesh", {})
        mesh = config_lib.call(
            sharding.make_mesh, section, "mesh", devices=list(on.devices)
        )
        options, rows = experiment.train_options(config), stream.plan.rows
        sharding.rows_per_step(rows, mesh, options.accumulate)
        task = experiment.build_task(config, classes)
        where = sharding.batch_sharding(mesh)
        example = stream.example()
        with jax.set_mesh(mesh):
            program = compile.Program(config, task, example, mesh)
            batch = jax.tree.map(
                lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where),
                example,
            )
            numbers = host_signals.OWN + host_signals.SHARD * stream.plan.plan_shards
            signals = jax.ShapeDtypeStruct((rows, numbers), jnp.int32, sharding=where)
            step: Any = program.step()
            lowered = step.lower(program.abstract, batch, signals)
            try:
                self._compiled = lowered.compile()
            except jax.errors.JaxRuntimeError as error:
                if not (needed := read_needed(str(error))):
                    raise
                raise OutOfMemory(needed) from error
        try:
            self.text = self._compiled.as_text()
        except jax.errors.JaxRuntimeError as error:
            # The compiler can not always print what it has made.
            logging.warning("what is sent is not known: %s", str(error)[:200])
            self.text = ""
        self.mesh = dict(mesh.shape)
        self._abstract, self._batch = program.abstract, batch
        self.params = program.abstract.params

    def memory(self) -> dict[str, int]:
        """Bytes a device, by kind; `total` is the most at one time."""
        found: Any = self._compiled.memory_analysis()
        state = self._abstract
        own = {
            "parameters": _share(state.params),
            "optimizer": _share(state.opt_state),
            "running mean": _share(state.ema),
            "batch": _share(self._batch),
            "temporaries": found.temp_size_in_bytes,
            "program": found.generated_code_size_in_bytes,
        }
        total = found.argument_size_in_bytes + found.output_size_in_bytes
        total += found.temp_size_in_bytes + found.generated_code_size_in_bytes
        return own | {"total": total - found.alias_size_in_bytes}

    def sent(self) -> dict[str, dict[str, int]]:
        """Bytes and number of collectives of a step, by kind and axes of the mesh."""
        size, number = Counter[str](), Counter[str]()
        for each in hlo.read(self.text):
            along = hlo.name_axes(each.group, self.mesh)
            # Replicas alone are split over slices.
            along = "replica" if each.kind == hlo.SLICES else along
            name = f"{each.kind}, {along}"
            size[name] += each.size * each.times
            number[name] += each.times
        return {
            name: {"bytes": size[name], "number": number[name]} for name in sorted(size)
        }

    def network_seconds(self, chip: Chip) -> float:
        """Of all collectives, one after the other, each along one axis of a torus."""
        seconds, devices = 0.0, math.prod(self.mesh.values())
        for each in hlo.read(self.text):
            n = len(each.group) or devices
            shares = {
                "all-gather": (n - 1) / n,
                "all-to-all": (n - 1) / n,
                "all-reduce": 2 * (n - 1) / n,
                "reduce-scatter": n - 1,
                "collective-permute": 2,  # one of both ways
                hlo.SLICES: 1,
            }
            rate = chip.network if each.kind == hlo.SLICES else chip.link
            seconds += each.size * each.times * shares[each.kind] / rate
        return seconds


def read_needed(text: str) -> float:
    """Bytes that a compiler without room says it needs; 0 if it says something else."""
    if not (spent := SPENT.search(text)):
        return 0.0
    return float(spent[1]) * {"G": 2**30, "M": 2**20}[spent[2]]


def account(
    config: Mapping[str, Any], stream: Stream, on: Topology, classes: int
) -> dict[str, Any]:
    """Everything that is known of a config on a topology, for JSON.

    Args:
      classes: Of the training sources.

    Raises:
      OutOfMemory: the compiler found no room.
    """
    step, chip = Step(config, stream, on, classes), on.chip
    plan, report = stream.plan, stream.plan.report()
    tokens = plan.rows * plan.tokens
    counts = {
        "images": report["images_per_row"] * plan.rows,
        "tokens": tokens * (1 - report["padding"]),
        "attention_pairs": report["attention_work"] * tokens * plan.tokens,
    }
    if plan.captions:
        texts = counts["images"]
        text = report["text_tokens"] / report["images"] * texts
        # As if all texts were as long.
        counts |= {"texts": texts, "text_tokens": text}
        counts["text_attention_pairs"] = text**2 / texts
    count = train_flops.flops_counter(config, step.params)
    flops, num = count(counts), len(on.devices)
    attention = flops - count(
        {k: 0 if k.endswith("attention_pairs") else v for k, v in counts.items()}
    )
    # Kernels are not in the compiler's cycles.
    cycles = hlo.count_cycles(step.text)
    compiler = cycles / chip.clock + attention / num / chip.flops if cycles else 0.0
    seconds = {
        "products at the peak": flops / num / chip.flops,
        "compiler": compiler,
        "network": step.network_seconds(chip),
    }
    at_best = max(seconds.values())
    without_overlap = max(compiler, seconds["products at the peak"])
    without_overlap += seconds["network"]
    return {
        "topology": on.text,
        "devices": num,
        "mesh": step.mesh,
        "rows": plan.rows,
        "tokens": plan.tokens,
        "accumulate": experiment.train_options(config).accumulate,
        "remat": config["model"].get("remat", "light"),
        "memory": step.memory() | {"device": chip.memory},
        "largest": hlo.largest(step.text),
        "flops": flops,
        "sent": step.sent(),
        "seconds": seconds | {"at best": at_best, "without overlap": without_overlap},
        "images_per_second": counts["images"] / without_overlap,
        "mfu": flops / num / chip.flops / without_overlap,
        "days": config["steps"] * without_overlap / 86400,
        "padding": report["padding"],
        "images_per_row": report["images_per_row"],
        "constants": {
            "flops": chip.flops,
            "clock": chip.clock,
            "link": chip.link,
            "network": chip.network,
        },
    }


def find_room(
    config: Mapping[str, Any], stream: Stream, on: Topology, classes: int
) -> list[tuple[str, str]]:
    """What three knobs do to the memory of a device: name, and bytes or a remark."""
    train, model = config.get("train", {}), config["model"]
    twice = 2 * train.get("accumulate", 1)
    knobs = {
        f"config.train.accumulate={twice}": {"train": {**train, "accumulate": twice}},
        "config.model.remat=full": {"model": {**model, "remat": "full"}},
        f"config.train.accumulate={twice} and config.model.remat=full": {
            "train": {**train, "accumulate": twice},
            "model": {**model, "remat": "full"},
        },
    }
    found = []
    for name, changes in knobs.items():
        try:
            step = Step({**config, **changes}, stream, on, classes)
            total = step.memory()["total"] / 2**30
            found.append((name, f"{total:.2f} GiB, fits"))
        except OutOfMemory as error:
            found.append((name, f"{error.needed / 2**30:.2f} GiB, does not fit"))
        except ConfigError as error:
            found.append((name, str(error)))
    return found


def _share(tree: Any) -> int:
    """Bytes a device of arrays that are described."""
    leaves = jax.tree.leaves(tree)
    shapes = [leaf.sharding.shard_shape(leaf.shape) for leaf in leaves]
    return sum(
        math.prod(shape) * leaf.dtype.itemsize
        for leaf, shape in zip(leaves, shapes, strict=True)
    )


def stand_in(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config with the embedded drawings for sets that may not be here."""
    sources = {"clipart": {"name": "clipart", "split": "train"}}
    changes = {"sources": sources, "teacher": "", "rand_augment": ""}
    return {**config, "data": {**config["data"], **changes}, "evals": {}}


def format_account(found: Mapping[str, Any]) -> str:
    """A table of lines."""
    memory, seconds = found["memory"], found["seconds"]
    mesh = ", ".join(f"{axis} {size}" for axis, size in found["mesh"].items())
    parts = [
        f"{name} {size / 2**30:.2f}"
        for name, size in memory.items()
        if name not in ("total", "device") and size
    ]
    lines = [
        ("topology", f"{found['topology']}: {found['devices']} devices, mesh {mesh}"),
        ("batch", f"{found['rows']:,} rows x {found['tokens']} tokens, accumulate "
         f"{found['accumulate']}, remat {found['remat']}"),
        ("memory of a device", f"{memory['total'] / 2**30:.2f} of "
         f"{memory['device'] / 2**30:.0f} GiB: {', '.join(parts)}"),
        *(("" if i else "largest buffers", f"{size / 2**20:,.0f} MiB {shape} {name}")
          for i, (size, shape, name) in enumerate(found["largest"])),
        *(("" if i else "sent in a step", f"{each['bytes'] / 2**20:,.1f} MiB in "
           f"{each['number']} {name}")
          for i, (name, each) in enumerate(found["sent"].items())),
        ("FLOPs of a step", f"{found['flops']:.3e}"),
        ("estimate of a step", f"{seconds['at best']:.3f} s at best, "
         f"{seconds['without overlap']:.3f} s if nothing overlaps: products at the "
         f"peak {seconds['products at the peak']:.3f}, the compiler's cycles "
         f"{seconds['compiler']:.3f}, network {seconds['network']:.3f}"),
        ("estimate without overlap", f"{found['images_per_second']:,.0f} images/s, "
         f"MFU {found['mfu']:.1%}, {found['days']:.2f} days for the run"),
        ("packing", f"padding {found['padding']:.2%}, {found['images_per_row']:.2f} "
         "images a row"),
        ("constants", ", ".join(f"{k} {v:.4g}" for k, v in found["constants"].items())),
    ]  # fmt: skip
    width = max(len(name) for name, _ in lines)
    return "\n".join(f"{name:{width}s}  {value}" for name, value in lines)
