"""How near a student is to its teacher, against constants and plain loops."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from small_sparseformer import SMALL
from test_bootstrapping import TEACHER as VIT
from test_bootstrapping import config

from navit_jax import (
    agreement,
    compile,
    dial,
    evaluator,
    experiment,
    predictor,
    sharding,
)
from navit_jax.data import sources
from navit_jax.errors import ConfigError
from navit_jax.metrics import interval_by_group

RNG = np.random.default_rng(0)
# As of a teacher: a large common part.
TEACHER = RNG.standard_normal((40, 6)) + 4
STUDENT = 3 * TEACHER + RNG.standard_normal((40, 6))


def test_figures_are_those_of_a_plain_loop():
    found = agreement.compare(STUDENT, TEACHER)
    s = [v / np.linalg.norm(v) for v in STUDENT]
    t = [v / np.linalg.norm(v) for v in TEACHER]
    mean = sum(t) / len(t)
    for i in range(40):
        a, b = s[i] - mean, t[i] - mean
        centred = a @ b / np.linalg.norm(a) / np.linalg.norm(b)
        np.testing.assert_allclose(found["centred_cosine"][i], centred)
        np.testing.assert_allclose(found["cosine"][i], s[i] @ t[i])
        assert found["r1"][i] == (max(range(40), key=lambda j: s[i] @ t[j]) == i)
        np.testing.assert_allclose(
            found["constant_cosine"][i], t[i] @ mean / np.linalg.norm(mean)
        )


def test_a_constant_has_a_high_cosine_and_nothing_else():
    unit = TEACHER / np.linalg.norm(TEACHER, axis=1, keepdims=True)
    constant = np.tile(unit.mean(0), (40, 1))
    found = {k: v.mean() for k, v in agreement.compare(constant, TEACHER).items()}
    assert found["cosine"] > 0.9
    np.testing.assert_allclose(found["cosine"], found["constant_cosine"])
    # Its length is not 1, so that what is left of it has one direction.
    assert abs(found["centred_cosine"]) < 0.25
    assert found["r1"] <= 1 / 40 + 1e-9


def test_the_teacher_itself_has_one_everywhere_and_length_counts_for_nothing():
    found = agreement.compare(7.0 * TEACHER, TEACHER)
    for name in ("cosine", "centred_cosine", "r1"):
        np.testing.assert_allclose(found[name], 1, err_msg=name)


def test_a_run_is_judged_by_agreement_with_intervals_by_group():
    section = {"clipart": {"name": "clipart", "split": "validation"}}
    changed = config(
        evals={"validation": {"name": "agreement", "sources": section, "sides": (48,)}}
    )
    stream = experiment.build_stream(changed)
    task = experiment.build_task(changed, stream.num_classes)
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    with jax.set_mesh(mesh):
        judge = evaluator.Evaluator(changed, task, mesh, stream.class_names)
        batch = jax.tree.map(jnp.asarray, stream.example())
        values = judge.run(task.init(jax.random.key(0), batch))
    found = {k.rsplit("/", 1)[1]: v for k, v in values.items()}
    assert found["images"] == len(sources.clipart("validation"))
    for name in ("cosine", "centred_cosine", "r1"):
        assert found[f"{name}_low"] <= found[name] <= found[f"{name}_high"]


class Pictures:
    """A source of which nothing but its near-duplicates is asked."""

    name = "pictures"
    class_names = ()

    def __len__(self):
        return 50

    def __getitem__(self, index):
        raise OSError


def test_intervals_draw_near_duplicates_together_and_else_picture_by_picture():
    """Slots are in no order, and two hold none that can be used."""
    rng = np.random.default_rng(1)
    index = rng.permutation(50)[:42]
    index[[3, 20]] = -1
    places = np.flatnonzero(index >= 0)
    found = {"student": rng.random((42, 6)), "teacher": rng.random((42, 6))}
    found["student"][places], found["teacher"][places] = STUDENT, TEACHER
    own = Pictures()

    def conclude():
        return agreement.Agreement().conclude(asked, None, found, index, own)

    asked = agreement.Agreement().read(own, lambda: None)
    alone, terms = conclude(), agreement.compare(STUDENT, TEACHER)
    own.groups = np.arange(50) // 5
    grouped = conclude()
    own.groups = np.zeros(50, int)
    together = conclude()
    for name, term in terms.items():
        assert alone[name] == pytest.approx(term.mean())
        half = 1.96 * term.std() / 40**0.5
        ends = [alone[f"{name}_low"], alone[f"{name}_high"]]
        # The normal approximation of 40 independent pictures; r1 is a step function.
        expected = term.mean() - half, term.mean() + half
        np.testing.assert_allclose(ends, expected, atol=0.3 * half, err_msg=name)
        members = index[places] // 5
        ends = interval_by_group(term, np.ones(40), members)
        assert (grouped[f"{name}_low"], grouped[f"{name}_high"]) == ends
        ends = [together[f"{name}_low"], together[f"{name}_high"]]
        np.testing.assert_allclose(ends, term.mean())


def test_a_task_without_teacher_is_refused():
    stream = experiment.build_stream(tiny.config())
    task = experiment.build_task(tiny.config(), 8)
    with pytest.raises(ConfigError, match="bootstrapping"):
        agreement.compute_vectors(task, {}, stream.example())


CLIPART = {"name": "clipart", "split": "validation", "labels": "none"}


def bootstrapped(**changes):
    """A small SparseFormer that begins with the last block of a small ViT."""
    teacher = {
        **VIT, "width": 16, "depth": 2, "mlp": 32, "class_token": True,
        "pooling": "class", "bias_qkv": True, "bias_ln": True, "qk_norm": False,
    }  # fmt: skip
    model = {"name": "sparseformer", "size": "v2_micro/16", "max_side": 4}
    return config(
        model={**model, "shape": SMALL, **changes},
        task__teacher=teacher,
        task__representation="both",
        task__inherit=[
            ("encoder/blocks/(.*)", r"teacher/blocks/\1[1:]"),
            ("encoder/norm/(.*)", r"teacher/norm/\1"),
            ("encoder/class_token", "teacher/class_token"),
        ],
        evals={
            "validation": {
                "name": "agreement", "sources": {"art": CLIPART}, "sides": (48,)
            }
        },
    )  # fmt: skip


@pytest.fixture(scope="module")
def begun():
    """What a run begins with: the mesh and its parameters."""
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    with jax.set_mesh(mesh):
        stream = experiment.build_stream(bootstrapped())
        task = experiment.build_task(bootstrapped(), 8)
        program = compile.Program(bootstrapped(), task, stream.example(), mesh)
        return mesh, program.first_state().params


def judge(changed, mesh, params):
    """What agreement says of a set, by metric."""
    task = experiment.build_task(changed, 8)
    with jax.set_mesh(mesh):
        found = evaluator.Evaluator(changed, task, mesh, ()).run(params)
    return {name.rsplit("/", 1)[1]: value for name, value in found.items()}


def test_a_random_front_before_the_blocks_of_the_teacher_is_at_chance(begun):
    found = judge(bootstrapped(), *begun)
    assert found["r1_low"] <= 1 / found["images"] <= found["r1_high"]
    # As near to a constant as above: what is left of it has one direction.
    assert abs(found["centred_cosine"]) < 0.25


def test_the_number_of_tokens_changes_at_inference_with_the_same_weights(begun):
    """Its own number asked for is the model itself; others are other functions."""
    mesh, params = begun
    stream = experiment.build_stream(bootstrapped())
    batch = jax.tree.map(jnp.asarray, next(stream.batches(np.arange(8)))[0])
    task = experiment.build_task(bootstrapped(), 8)
    model = predictor.Predictor(bootstrapped(), (), task, params, 0, mesh)
    asked = {0: model, 4: dial.set_latents(model, 4), 9: dial.set_latents(model, 9)}
    found, there = {}, np.asarray(batch.image_mask)
    for count, own in asked.items():
        out = jax.jit(own.task.outputs)(own.params, batch)
        assert (out["num_latents"][there] == (count or 4)).all()
        assert experiment.build_encoder(own.config) == own.task.encoder
        found[count] = np.asarray(out["student"])[there]
    np.testing.assert_array_equal(found[0], found[4])
    assert np.isfinite(found[9]).all()
    assert not np.allclose(found[9], found[4], atol=1e-3)


def test_more_tokens_than_a_row_had_room_for_in_training_get_room():
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    config = bootstrapped(latents=24, allot="budget", counts=[4, 2])
    task = experiment.build_task(config, 8)
    model = predictor.Predictor(config, (), task, {}, 0, mesh)
    own = dial.set_latents(model, 64)
    assert experiment.build_encoder(own.config) == own.task.encoder
    encoder = own.task.encoder
    assert (encoder.latents, encoder.counts, encoder.allot) == (None, (64,), "fixed")
    json.dumps(own.config["model"])


def test_a_number_of_tokens_that_there_can_not_be_is_refused(begun):
    mesh, params = begun
    task = experiment.build_task(bootstrapped(), 8)
    model = predictor.Predictor(bootstrapped(), (), task, params, 0, mesh)
    for count in (0, True, 2.5):
        with pytest.raises(ConfigError, match="give a number of latent tokens"):
            dial.set_latents(model, count)
    plain = experiment.build_task(tiny.config(), 8)
    other = predictor.Predictor(tiny.config(), (), plain, {}, 0, mesh)
    with pytest.raises(ConfigError, match="no latent tokens"):
        dial.set_latents(other, 9)
