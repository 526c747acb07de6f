"""Small SparseFormers for tests, on packed rows of four images."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from packed import image, pack

from navit_jax.models.sparseformer import SparseFormer

IMAGES = [image(1, (3, 4)), image(2, (5, 2)), image(3, (1, 1)), image(4, (4, 6))]
BATCH = jax.tree.map(jnp.asarray, pack([IMAGES[:3], IMAGES[3:]]))
SMALL = {
    "latents": 4, "channels": 8, "points": 4, "out_points": 3, "focus_width": 16,
    "width": 16, "depth": 1, "num_heads": 2, "mlp": 32, "repeats": 2, "rank": 4,
}  # fmt: skip
# Half of what is compiled, where nothing is asked of repeats.
ONCE = {"repeats": 1}


def build(version="v2", shape=(), **attributes) -> Any:
    return SparseFormer(
        f"{version}_micro/2", shape={**SMALL, **dict(shape)}, **attributes
    )


def row(batch):
    return batch.patches, batch.coords, batch.segment_ids, batch.grids


def trace(model: Any):
    """Shapes of the parameters; nothing is compiled."""
    return jax.eval_shape(model.init, jax.random.key(0), *row(BATCH))


def start(model: Any):
    """Parameters with noise, so that boxes move and tokens mix by what they see."""
    return _start(_plain(model))[1]


def untrained(model: Any):
    return _start(_plain(model))[0]


def _plain(model) -> Any:
    """A model of the same parameters, so that few are compiled."""
    once = {} if model.full_shape.stages else ONCE
    shape = {**model.shape, **once}
    return SparseFormer(model.size, shape, freeze_roi=model.freeze_roi)


@functools.cache
def _start(model: Any):
    def draw(key):
        params = model.init(key, *row(BATCH))
        leaves, tree = jax.tree.flatten(params)
        keys = jax.random.split(jax.random.key(1), len(leaves))
        noisy = [
            x + 0.1 * jax.random.normal(k, x.shape)
            for x, k in zip(leaves, keys, strict=True)
        ]
        return params, jax.tree.unflatten(tree, noisy)

    return jax.jit(draw)(jax.random.key(0))


def apply(model: Any, batch=BATCH, params: Any = None, keys=None):
    params = start(model) if params is None else params
    return _compiled(model)(params, *row(batch), keys)


@functools.cache
def _compiled(model: Any):
    return jax.jit(model.apply)


def put(params: Any, section: str, **changes):
    """The parameters with others in a section."""
    own = params["params"]
    return {"params": {**own, section: {**own[section], **changes}}}


@functools.cache
def differentiate(model: Any):
    """Compiles (value, outputs) and gradient of outputs times given weights.

    By parameters, of (parameters, weights of `pooled`, weights of `rois`).
    """

    def total(params, by_pooled, by_rois):
        out = model.apply(params, *row(BATCH))
        value = (out["pooled"] * by_pooled).sum() + (out["rois"] * by_rois).sum()
        return value, out

    return jax.jit(jax.value_and_grad(total, has_aux=True))
