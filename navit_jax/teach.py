"""Runs a teacher over its training data once, and keeps what it says.

`python -m navit_jax.teach --config=CONFIG --side=224 --out=DIR`; a run with
`--config.data.teacher=DIR` then reads the vectors, and its teacher rests in training.
Whole images are shown, without crop and flip; so the run must not crop either.

M images, E width.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from absl import flags, logging
from etils import epath
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Float32

from navit_jax import (
    command_line,
    compile,
    data,
    experiment,
    initialise,
    processes,
    reporting,
    run_folder,
    sharding,
)
from navit_jax import config as config_lib
from navit_jax.batch import PackedBatch
from navit_jax.data import teacher_outputs
from navit_jax.errors import TooLarge

# Of a student and its teacher's parameters, those that the teacher's vectors are of.
PARTS = "teacher", "head"


def teach(config: Mapping[str, Any], side: int | float | str, out: str) -> None:
    """Writes the vectors of all images of all training sources.

    Args:
      config: Resolved; its task has a teacher.
      side: At which images are planned, in pixels or "native".
      out: The folder.

    Raises:
      ConfigError: the task has no teacher, or as of `experiment.build_eval_streams`, or
        the folder can not be written.
    """
    config = {**config, "data": {**config["data"], "teacher": ""}}
    experiment.check_sections(config)
    processes.check_same({**config, "side": side}, out)
    initialise.check_section(config["model"].get("init"))
    run_folder.check_writable(epath.Path(out).expanduser(), f"--out={out}")
    mesh = config_lib.call(sharding.make_mesh, config.get("mesh", {}), "mesh")
    whole = experiment.build_stream(config)
    task: Any = experiment.build_task(config, whole.num_classes)
    about = experiment.about_teacher(config, task)
    streams = _open(config, side, mesh)
    with jax.set_mesh(mesh):
        program = compile.Program(config, task, whole.example(), mesh)
        params = program.first_params(PARTS)
        for name, stream in streams.items():
            vectors = run(task.vectors_of_teacher, params, stream, mesh)
            (read,), _ = data.open_sources({name: config["data"]["sources"][name]})
            if jax.process_index() == 0:
                teacher_outputs.write(out, name, read, vectors, about, side)
            logging.info("%s: %s vectors of %s", out, vectors.shape, name)


def _open(
    config: Mapping[str, Any], side: int | float | str, mesh: Mesh
) -> dict[str, data.Stream]:
    """The pictures of each source, once."""
    shards = int(np.prod([mesh.shape[axis] for axis in sharding.ROWS]))
    streams = {}
    for name, section in config["data"]["sources"].items():
        source = {k: v for k, v in section.items() if k != "weight"}
        asked = {"sources": {name: source}, "sides": (side,)}
        try:
            found = experiment.build_eval_streams(config, asked, name, shards)
            ((_, streams[name]),) = found
        except TooLarge as error:
            raise TooLarge(error.text, f"--side={side}") from error
    return streams


def run(
    encode: Callable[[Any, PackedBatch], jax.Array],
    params: Any,
    stream: data.Stream,
    mesh: Mesh,
) -> Float32[np.ndarray, "M E"]:
    """The vectors of all images of a stream; 0 of those that have no pixels.

    Args:
      encode: (params, batch) -> [B N E].
    """
    everywhere = NamedSharding(mesh, PartitionSpec())
    compute = jax.jit(
        lambda params, batch: (
            encode(params, batch),
            batch.image_ids[..., 1],
            batch.image_mask,
        ),
        out_shardings=everywhere,
    )
    found: np.ndarray | None = None
    rows = sharding.local_rows(mesh, stream.plan.rows)
    for host, info in reporting.watch(stream, "teacher", rows):
        placed = sharding.place(host, mesh)
        vectors, index, there = jax.device_get(compute(params, placed))
        if found is None:
            num = len(stream.loader.sources[0])
            found = np.zeros((num, vectors.shape[-1]), np.float32)
        found[index[there]] = vectors[there]
        for key, reason in info.skipped:
            logging.warning("%s can not be used: %s", key, reason)
    assert found is not None, "a source has images"
    return found


def define_main() -> Callable[[], int]:
    """Defines the flags, and returns what reads them and runs the teacher."""
    config = command_line.define_config()
    side = flags.DEFINE_string("side", "native", "In pixels, or native")
    out = flags.DEFINE_string("out", None, "A folder", required=True)
    start = processes.define_flags()

    def main() -> int:
        start(out.value)
        resolved = config_lib.resolve(config.value)
        teach(resolved, command_line.parse_side(side.value), out.value)
        return 0

    return main


if __name__ == "__main__":
    command_line.run(define_main())
