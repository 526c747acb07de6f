"""How near a student is to its teacher, against constants and plain loops."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from test_bootstrapping import config

from navit_jax import agreement, evaluator, experiment, sharding
from navit_jax.data import sources
from navit_jax.errors import ConfigError

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


def test_a_task_without_teacher_is_refused():
    stream = experiment.build_stream(tiny.config())
    task = experiment.build_task(tiny.config(), 8)
    with pytest.raises(ConfigError, match="bootstrapping"):
        agreement.compute_vectors(task, {}, stream.example())
