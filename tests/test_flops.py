import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from captioned import caption, with_texts
from packed import image, pack

from navit_jax import compile, experiment, sharding, train_flops, train_state
from navit_jax.models import flops
from navit_jax.models.navit import NaViT
from navit_jax.models.sizes import Spec
from navit_jax.models.text import TextTower

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


@pytest.mark.parametrize("pooling", ["map", "mean"])
def test_flops_of_texts_are_those_of_the_matrix_products_of_their_tower(pooling):
    shape = SPEC._asdict() | {"pooling": pooling, "attention": "dense"}
    model = TextTower(vocab_size=9, length=1, size="Ti", **shape)
    inputs = jnp.zeros((1, L), int), jnp.zeros((1, L, 1), int), jnp.ones((1, L), int)
    params = jax.eval_shape(lambda key: model.init(key, *inputs, 1), jax.random.key(0))
    counted = dots(jax.make_jaxpr(lambda p: model.apply(p, *inputs, 1))(params).jaxpr)
    expected = flops.forward_flops(L, L * L, 1, SPEC, 0, pooling)
    np.testing.assert_allclose(counted, expected, rtol=0.005)


def two_towers(**changes):
    """Config, task and shapes of the parameters of two towers, the text's smaller."""
    tower = {"attention": "dense", "remat": "none"}
    # Few places: products with their tables do not count.
    config = tiny.contrastive(**changes)
    config["model"]["positions"]["length"] = config["data"]["text"]["length"] = 2
    config["model"] |= tower | SPEC._asdict() | {"size": "Ti/2"}
    config["task"]["text"] |= tower | {"width": 48, "mlp": 96, "num_heads": 2}
    task = experiment.build_task(config, num_classes=0)
    # Rows that are full: dense attention does no more than it must.
    images = [[image(1, (4, 8))], [image(2, (8, 4))]]
    batch = with_texts(pack(images), [[caption(1, 24)], [caption(2, 24)]], width=24)
    params = jax.eval_shape(task.init, jax.random.key(0), batch)
    return config, task, batch, params


# What remains of three passes where a tower goes forward alone.
LOCKED = {
    "nothing": ([], (3, 3)),
    "images": ([[r"encoder/.*", True]], (1, 3)),
    "texts": ([[r"text/.*", True]], (3, 1)),
    "but a norm": ([[r"encoder/norm/.*", False], [r"encoder/.*", True]], (3, 3)),
}


@pytest.mark.parametrize("locked", LOCKED)
def test_training_flops_of_two_towers_are_what_a_hand_computes(locked):
    freeze, (of_image, of_text) = LOCKED[locked]
    config, _, _, params = two_towers(optim__freeze=freeze)
    count = train_flops.flops_counter(config, params)
    counts = {"images": 5, "tokens": 70, "attention_pairs": 1100}
    counts |= {"texts": 3, "text_tokens": 20, "text_attention_pairs": 150}
    # Twice the multiply-adds: patches, then blocks (4 D^2 + 2 D mlp a token, 2 D a
    # pair), then keys and values of the pooling and what follows it.
    image = 70 * 12 * 64 + 3 * (70 * (4 * 64**2 + 2 * 64 * 160) + 1100 * 2 * 64)
    image += 70 * (2 * 64**2 + 2 * 64) + 5 * (64**2 + 2 * 64 * 160)
    text = 20 * (4 * 48**2 + 2 * 48 * 96) + 150 * 2 * 48
    text += 20 * (2 * 48**2 + 2 * 48) + 3 * (48**2 + 2 * 48 * 96)
    assert count(counts) == 2 * (of_image * image + of_text * text)


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("locked", ["nothing", "images", "texts"])
def test_no_product_is_computed_for_the_gradient_of_a_frozen_tower(locked, accumulate):
    config, task, batch, params = two_towers(
        optim__freeze=LOCKED[locked][0], train__accumulate=accumulate
    )
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    with jax.set_mesh(mesh):
        program = compile.Program(config, task, batch, mesh)
        signals = jax.ShapeDtypeStruct((2, 8), np.int32)
        step = jax.make_jaxpr(program.step())(program.abstract, batch, signals)
    counts = train_state.batch_counts(jax.tree.map(jnp.asarray, batch))
    counts = {name: float(n) for name, n in counts.items()}
    expected = train_flops.flops_counter(config, params)(counts)
    if accumulate > 1:  # a pass before, of the embeddings alone
        config["optim"]["freeze"] = [[".*", True]]
        expected += train_flops.flops_counter(config, params)(counts)
    # Left out: heads, loss and empty slots; and no gradient leads to pixels.
    np.testing.assert_allclose(dots(step.jaxpr), expected, rtol=0.05)
