"""The focusing unit against plain code in float64, and where its gradients end."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_sparseformer import build, start
from test_sampling import read

from navit_jax.models.feature_maps import Maps
from navit_jax.models.focusing import State, View, build_unit

RNG = np.random.default_rng(0)
CELLS = RNG.standard_normal((3, 5, 8))
MAPS = Maps(
    cells=jnp.pad(jnp.float32(CELLS), ((0, 2), (0, 0), (0, 0)))[None, None],
    slots=jnp.array([[0]]),
    starts=jnp.array([[0]]),
    columns=jnp.array([[1]]),
    sizes=jnp.array([[[3, 5]]]),
)
VIEW = View(MAPS, jnp.array([[1, 1, 1]]))
TOKENS = RNG.standard_normal((1, 3, 16))
BOXES = RNG.uniform(-0.2, 1.2, (1, 3, 4))


def erf_gelu(x):
    return x * (1 + np.vectorize(math.erf)(x / 2**0.5)) / 2


class Plain:
    """The unit in numpy, one image, token by token."""

    def __init__(self, shape, params):
        self.shape, self.params = shape, params

    def norm(self, x, name):
        x = (x - x.mean()) / np.sqrt(x.var() + self.shape.eps)
        return x * self.params[name]["scale"] + self.params[name]["bias"]

    def dense(self, x, name, params=None):
        own = (params or self.params)[name]
        return x @ own["kernel"] + own.get("bias", 0)

    def run(self, tokens, boxes):
        points = np.zeros((len(tokens), self.shape.points, 2))
        for name in self.shape.focus:
            if name == "attend":
                tokens = tokens + self.attend(tokens)
                continue
            for q, (x, box) in enumerate(zip(tokens, boxes, strict=True)):
                if name == "mlp":
                    hidden = self.dense(
                        self.norm(x, "norm_2"), "up", self.params["mlp"]
                    )
                    tokens[q] += self.dense(
                        erf_gelu(hidden), "down", self.params["mlp"]
                    )
                elif name == "adjust":
                    boxes[q] = self.adjust(x, box)
                elif name == "locate":
                    tokens[q] += self.locate(box)
                else:
                    points[q], added = self.sample(x, box)
                    tokens[q] += added
        return tokens, boxes, points

    def attend(self, tokens):
        own = self.params["attention"]
        normed = np.stack([self.norm(x, "norm_1") for x in tokens])
        query, key, value = (
            np.einsum("qd,dhk->hqk", normed, own[name]["kernel"])
            + own[name]["bias"][:, None]
            for name in ("query", "key", "value")
        )
        weights = np.exp(query @ key.swapaxes(1, 2) / key.shape[-1] ** 0.5)
        weights /= weights.sum(-1, keepdims=True)
        out = own["out"]
        return np.einsum("hqk,hkd->qd", weights @ value, out["kernel"]) + out["bias"]

    def adjust(self, x, box):
        x = self.norm(x, "adjustment_norm")
        if "adjustment_hidden" in self.params:
            x = erf_gelu(self.dense(x, "adjustment_hidden"))
        tx, ty, tw, th = self.dense(x, "adjustment")
        x0, y0, x1, y1 = box
        w, h = abs(x1 - x0), abs(y1 - y0)
        x, y = (x0 + x1) / 2 + tx * w, (y0 + y1) / 2 + ty * h
        w, h = w * np.exp(tw), h * np.exp(th)
        return x - w / 2, y - h / 2, x + w / 2, y + h / 2

    def locate(self, box):
        frequencies = 128 ** (np.arange(4) / 3)
        angles = np.pi * np.outer(box, frequencies)
        x = np.concatenate([np.sin(angles[:, ::2]), np.cos(angles[:, 1::2])], 1)
        return self.dense(self.norm(x.ravel(), "position_norm"), "position")

    def sample(self, token, box):
        x0, y0, x1, y1 = box
        offsets = self.dense(self.norm(token, "sampling_norm"), "sampling")
        offsets = self.params["grid"] + offsets.reshape(-1, 2)
        offsets -= offsets.mean(0)
        offsets /= 3 * (offsets.std(0, ddof=1) + 1e-5)
        centre = np.array([x0 + x1, y0 + y1]) / 2
        points = centre + offsets * abs(np.array([x1 - x0, y1 - y0]))
        x = np.array([read(CELLS, x, y, self.shape.padding) for x, y in points])
        made = self.dense(self.norm(token, "mixing_norm"), "down")
        made = self.dense(made, "generator")
        channels, rest = made[: 8 * 8].reshape(8, 8), made[8 * 8 :].reshape(3, 4)
        x = x @ channels
        if not self.shape.mixing_bias:  # the second version
            return points, self.dense(erf_gelu(rest @ x).ravel(), "mixed")
        x = rest @ erf_gelu(x + self.params["channel_bias"])
        x = erf_gelu(x + self.params["point_bias"][:, None])
        return points, self.dense(x.ravel(), "mixed")


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_a_unit_is_that_of_plain_code_in_float64(version):
    model = build(version)
    own = start(model)["params"]["focusing"]
    plain = Plain(
        model.full_shape, jax.tree.map(lambda x: np.asarray(x, np.float64), own)
    )
    tokens, boxes, points = plain.run(TOKENS[0].copy(), BOXES[0].copy())
    unit = build_unit(model, "focusing", jnp.float32).clone(name=None)
    state = State(jnp.float32(TOKENS), jnp.float32(BOXES))
    found = jax.jit(unit.apply)({"params": own}, state, VIEW, {})
    np.testing.assert_allclose(found.points[0], points, atol=1e-5)
    np.testing.assert_allclose(found.rois[0], boxes, atol=1e-5)
    np.testing.assert_allclose(found.tokens[0], tokens, atol=2e-4)
    looked = boxes if version == "v1" else BOXES[0]  # one moves first, one at last
    np.testing.assert_allclose(found.looked[0], looked, atol=1e-5)


def test_gradients_to_coordinates_are_kept_within_the_clamp_over_the_sides():
    # One point a token is at the centre: (x0 + x1) / 2.
    def slope(clamp):
        model = build("v1", {"points": 1, "out_points": 2}, gradient_clamp=clamp)
        unit = build_unit(model, "focusing", jnp.float32)
        unit = unit.clone(operations=("sample",), name=None)
        state = State(jnp.float32(TOKENS), jnp.float32(BOXES))
        params = jax.jit(unit.init)(jax.random.key(0), state, VIEW, {})

        def total(rois):
            out: Any = unit.apply(params, state._replace(rois=rois), VIEW, {})
            return 100 * jnp.square(out.tokens).sum()

        return jax.jit(jax.grad(total))(state.rois)

    free, clamp = slope(0.0), 0.05
    # Maps are 5 cells wide and 3 high; a coordinate gets half of each corner's.
    limits = clamp / np.array([5, 3, 5, 3]) / 2
    assert (abs(free) > limits).any(1).any()
    np.testing.assert_allclose(
        slope(clamp), np.clip(free, -limits, limits), rtol=1e-4, atol=1e-7
    )
