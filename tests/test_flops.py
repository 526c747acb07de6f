import jax
import jax.numpy as jnp
import numpy as np
import pytest

from navit_jax.models import flops
from navit_jax.models.navit import NaViT
from navit_jax.models.sizes import Spec

SPEC = Spec(width=64, depth=3, num_heads=2, mlp=160)
L, P = 48, 300


def dots(jaxpr, times=1):
    """FLOPs of every matrix product in a jaxpr, loops included."""
    total = 0
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            (contracted, _), _ = eqn.params["dimension_numbers"]
            shape = eqn.invars[0].aval.shape
            width = np.prod([shape[axis] for axis in contracted])
            total += 2 * times * width * np.prod(eqn.outvars[0].aval.shape)
        inner = times * eqn.params.get("length", 1)
        for name in ("jaxpr", "call_jaxpr"):
            if name in eqn.params:
                closed = eqn.params[name]
                total += dots(getattr(closed, "jaxpr", closed), inner)
    return total


@pytest.mark.parametrize("pooling", ["map", "mean", "none"])
def test_flops_are_those_of_the_matrix_products_of_the_model(pooling):
    model = NaViT(
        "Ti/10",
        **SPEC._asdict(),
        positions={"name": "rope"},
        pooling=pooling,
        attention="dense",
    )
    inputs = jnp.zeros((1, L, P)), jnp.zeros((1, L, 2), int)
    inputs = *inputs, jnp.ones((1, L), int), jnp.ones((1, 1, 2), int)
    params = jax.eval_shape(model.init, jax.random.key(0), *inputs)
    counted = dots(jax.make_jaxpr(model.apply)(params, *inputs).jaxpr)
    expected = flops.forward_flops(L, L * L, 1, SPEC, P, pooling)
    # Left out: the probe's own query and the sums of weights.
    np.testing.assert_allclose(counted, expected, rtol=0.005)


def test_images_packed_together_cost_what_they_cost_alone():
    lengths = np.array([16, 8, 24])
    packed = flops.forward_flops(48.0, float((lengths**2).sum()), 3, SPEC, P)
    alone = sum(flops.forward_flops(n, n * n, 1, SPEC, P) for n in (16, 8, 24))
    np.testing.assert_allclose(packed, alone)
