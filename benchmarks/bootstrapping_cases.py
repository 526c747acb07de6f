"""What a bootstrapped student is compared with: each turns pictures into vectors.

One picture a row, so that none pays for another's padding. B rows, L tokens a row, D
width, M pictures.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from navit_jax import agreement, compile, data, experiment, models, sharding, teach
from navit_jax.batch import PackedBatch
from navit_jax.dial import set_latents
from navit_jax.errors import ConfigError
from navit_jax.models import flops
from navit_jax.predictor import Predictor

Vectors = np.ndarray
Config = Mapping[str, Any]


class Case(NamedTuple):
    """One way to a vector.

    Attributes:
      config: Its `model` cuts the pictures.
      encoder: Whose FLOPs are counted.
      side: Of pictures, in pixels.
      encode: (params, batch) -> [B 1 D].
      keep: Patches that are not dropped, of each picture; 0 is all.
    """

    config: Config
    encoder: models.Encoder
    side: int
    encode: Callable[[Any, PackedBatch], jax.Array]
    params: Any
    keep: int = 0


def open_student(run: Predictor, side: int, count: int = 0, params: Any = None) -> Case:
    """The student with another number of latent tokens, 0 for its own.

    Args:
      params: Instead of the checkpoint's.
    """
    run = set_latents(run, count) if count else run
    task: Any = run.task

    def encode(params: Any, batch: PackedBatch) -> jax.Array:
        return task.outputs(params, batch)["student"]

    return Case(
        run.config, task.encoder, side, encode, run.params if params is None else params
    )


def open_teacher(run: Predictor, side: int, keep: int = 0, name: str = "") -> Case:
    """The teacher, which reads patches of its own size cut from the pictures.

    Args:
      keep: Of its patches, at random; the class token stays.
      name: Of its representation; "" is what the student learns.
    """
    section, own = run.config["task"], run.config["task"]["teacher"]
    target = section.get("target") or section.get("representation", "pooled")
    changes = {"teacher_side": 0, "representation": name or target, "inherit": ()}
    square = run.config["data"].get("square", False) or section.get("teacher_side", 0)
    config = {
        **run.config,
        "model": own,
        "task": {**section, **changes, "target": ""},
        "data": {**run.config["data"], "square": bool(square)},
    }
    task: Any = experiment.build_task(_uncached(config), len(run.class_names))

    def encode(params: Any, batch: PackedBatch) -> jax.Array:
        return task.vectors_of_teacher(params, drop(batch, keep) if keep else batch)

    encoder = experiment.build_encoder(config)
    return Case(config, encoder, side, encode, run.params, keep)


def start(run: Predictor, stream: data.Stream) -> Any:
    """The parameters with which a run began: its tail inherited, its front random."""
    config = _uncached(run.config)
    with jax.set_mesh(run.mesh):
        program = compile.Program(config, run.task, stream.example(), run.mesh)
        return program.first_state().params


def check_teachers(run: Predictor, other: Predictor) -> None:
    """Raises ConfigError if the vectors of two runs can not be compared."""
    tasks: list[Any] = [run.task, other.task]
    own, others = ({**task.about(), "teacher_side": 0} for task in tasks)
    if own != others:
        raise ConfigError(
            f"--plain: its run learns {others}, the other {own}: give one that learns "
            "the same of the same teacher"
        )


def drop(batch: PackedBatch, keep: int) -> PackedBatch:
    """Keeps so many random patches of the picture of each row, by its number."""
    keys = jax.vmap(jax.random.fold_in, (None, 0))(
        jax.random.key(0), batch.image_ids[:, 0, 1]
    )
    L = batch.segment_ids.shape[1]
    chance = jax.vmap(lambda key: jax.random.uniform(key, (L,)))(keys)
    order = jnp.argsort(jnp.where(batch.segment_ids > 0, chance, 2), -1)[:, :keep]
    return dataclasses.replace(
        batch,
        patches=jnp.take_along_axis(batch.patches, order[..., None], 1),
        coords=jnp.take_along_axis(batch.coords, order[..., None], 1),
        segment_ids=jnp.take_along_axis(batch.segment_ids, order, 1),
    )


def open_stream(case: Case, source: Config, images: int) -> data.Stream:
    """A source, cut for a case: one whole picture a row, `images` rows a batch."""
    patch = models.patch_size(case.config["model"]["size"])
    section = {
        "name": "agreement",
        "sources": {"judged": source},
        "sides": (case.side,),
        "rows": images,
        "slots": 1,
        "tokens": (case.side // patch) ** 2,
    }
    ((_, stream),) = experiment.build_eval_streams(case.config, section, "judged")
    return stream


def compute_vectors(case: Case, source: Config, images: int, mesh: Any) -> Vectors:
    """[M D] of all pictures of a source; 0 of those that can not be used."""
    with jax.set_mesh(mesh):
        stream = open_stream(case, source, images)
        return teach.run(case.encode, case.params, stream, mesh)


def agree(
    vectors: Mapping[str, Vectors], target: str
) -> tuple[np.ndarray, dict[str, dict[str, np.ndarray]]]:
    """How near each comes to the target, and one vector that is always the same.

    Returns:
      Which pictures could be used [M], as the others have a vector of 0; and by name
      what `agreement.compare` says of these.
    """
    there = np.asarray(vectors[target].any(1))
    seen = {name: own[there] for name, own in vectors.items()}
    teacher = seen[target]
    unit = teacher / np.linalg.norm(teacher, axis=1, keepdims=True)
    constant = np.tile(unit.mean(0), (len(unit), 1))
    named = {"constant, the mean vector": constant, **seen}
    return there, {n: agreement.compare(own, teacher) for n, own in named.items()}


def prepare_call(
    case: Case, source: Config, images: int, mesh: Any
) -> Callable[[], object]:
    """Encodes the first pictures of a source, which are on the device, and waits."""
    stream = open_stream(case, source, images)
    host, _ = next(iter(stream.batches(np.arange(images))))
    with jax.set_mesh(mesh):
        batch = sharding.place(host, mesh)
    encode = jax.jit(case.encode)

    def call() -> object:
        with jax.set_mesh(mesh):
            return jax.block_until_ready(encode(case.params, batch))

    return call


def count_flops(case: Case) -> float:
    """Of one square picture, two a multiply-add; heads are not counted."""
    patch = models.patch_size(case.config["model"]["size"])
    num, encoder = (case.side // patch) ** 2, case.encoder
    if isinstance(encoder, models.SparseFormer):
        return encoder.forward_flops(num, 1)
    special = int(encoder.class_token) + encoder.registers
    tokens, values = (case.keep or num) + special, 3 * patch**2
    counted = flops.forward_flops(
        tokens, tokens**2, 1, encoder.spec, values, encoder.pooling
    )
    # No patch is embedded for a class token.
    return counted - 2 * special * values * encoder.spec.width


def list_tokens(given: Sequence[str], case: Case) -> list[int]:
    """The numbers of latent tokens asked for; none of a student without them."""
    if not isinstance(case.encoder, models.SparseFormer):
        return []
    return sorted({*map(int, given), *case.encoder.allowed})


def _uncached(config: Config) -> dict[str, Any]:
    return {**config, "data": {**config["data"], "teacher": ""}}
