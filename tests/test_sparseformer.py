"""SparseFormer on packed rows, small, against itself alone and in other forms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from packed import N, pack
from small_sparseformer import (
    BATCH,
    IMAGES,
    ONCE,
    apply,
    build,
    differentiate,
    put,
    row,
    start,
    trace,
    untrained,
)

from navit_jax.isolation import check_isolation
from navit_jax.tasks.randomness import image_keys

# What gradients are taken of.
GRADED = {
    "v1": build("v1", ONCE, capture=True),
    "v2": build("v2", {"glimpse": 2}, capture=True),
}


def weigh(model, pooled=0.0, last=0.0):
    """Weights of pooled images, and of the x0 of the last box of the first token."""
    rois = jnp.zeros((2, model.full_shape.repeats + 1, N * 4, 4))
    return jnp.full((2, N, 16), pooled), rois.at[0, -1, 0, 0].set(last)


@pytest.mark.parametrize(
    "version, shape, attributes, alone",
    [
        ("v1", {}, {"allot": "drawn", "counts": (4, 1, 2, 6), "drop_path": 0.5}, 1e-5),
        ("v2", {"glimpse": 2}, {"maps": "canvas", "max_side": 6}, 1e-5),
        # The number of its tokens is all that may follow from others.
        ("v2", {}, {"allot": "budget", "counts": (1, 2, 4, 9), "latents": 16}, np.inf),
    ],
)
def test_sparseformer_is_isolated(version, shape, attributes, alone):
    model = build(version, ONCE | shape, gradient_clamp=100.0, **attributes)
    params = start(model)

    def pooled(batch):
        keys = image_keys(jax.random.key(3), batch.image_ids)
        return model.apply(params, *row(batch), keys)["pooled"]

    report = check_isolation(pooled, BATCH, tolerance=alone)
    assert (report.images, report.gradients) == (4, 4)


@pytest.mark.parametrize(
    "attributes",
    [{"lookup": "neighbours"}, {"lookup": "matmul", "maps": "canvas", "max_side": 6}],
)
def test_maps_and_lookups_agree(attributes):
    params = start(build("v1"))
    expected = apply(build("v1", capture=True))
    found = apply(build("v1", **attributes), params=params)
    np.testing.assert_allclose(found["pooled"], expected["pooled"], atol=1e-5)
    np.testing.assert_allclose(found["tokens"], expected["tokens"], atol=1e-4)


def test_repeats_share_their_parameters():
    shapes = [trace(build(shape={"repeats": n, "stages": False})) for n in (1, 4)]
    assert shapes[0] == shapes[1]


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_parameters_start_as_published(version):
    params = untrained(build(version))["params"]
    unit = params["focusing"]
    for name in ("adjustment_norm", "sampling_norm", "mixing_norm"):
        np.testing.assert_allclose(unit[name]["scale"], 16**-0.5, rtol=1e-6)
    for name in ("adjustment", "sampling", "generator"):
        assert not unit[name]["kernel"].any()
    for name in ("down", "mixed"):
        assert 0.015 < unit[name]["kernel"].std() < 0.025
    # Xavier-uniform: of channels 8 x 8, of points 4 x 3.
    bias = unit["generator"]["bias"]
    for part, sides in ((bias[:64], 8 + 8), (bias[64:], 4 + 3)):
        reach = (6 / sides) ** 0.5
        assert 0.7 * reach < np.abs(part).max() <= reach
    assert 0.5 < params["tables"]["embedding"].std() < 1.5
    if version == "v2":
        assert 0.5 < params["stages"].std() < 1.5


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_boxes_do_not_move_before_training(version):
    model = build(version, capture=True)
    out = apply(model, params=untrained(model))
    assert out["rois"].shape == (2, 3, 16, 4)
    for stage in range(1, 3):
        np.testing.assert_array_equal(out["rois"][:, 0], out["rois"][:, stage])
    assert out["points"].shape == (2, 3, 16, 4, 2)


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_gradients_reach_boxes_and_stages_through_all_of_them(version):
    # Nothing but the last of the stages reads what its box has become.
    model = GRADED[version]
    params, slope = start(model), differentiate(model)
    weights = weigh(model, last=1.0)
    slopes = slope(params, *weights)[1]["params"]
    table = params["params"]["tables"]["rois"]
    assert slopes["tables"]["rois"][0].any()
    assert slopes["stem"]["conv"]["kernel"].any()
    if version == "v2":
        # Its tokens are told where boxes are, at no gradient: no differences.
        assert slopes["stages"].any(-1).all()
        return
    step = 1e-2
    ends = [
        slope(put(params, "tables", rois=table.at[0, 0].add(e * step)), *weights)[0][0]
        for e in (-1, 1)
    ]
    expected = (ends[1] - ends[0]) / (2 * step)
    np.testing.assert_allclose(slopes["tables"]["rois"][0, 0], expected, rtol=0.1)


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_lost_boxes_leave_outputs_and_gradients_finite(version):
    model, lost = GRADED[version], [np.nan, np.inf, 0.3, -1e30]
    rois = jnp.broadcast_to(jnp.array(lost)[:, None], (4, 4)).astype(jnp.float32)
    params = put(start(model), "tables", rois=rois)
    (_, out), slopes = differentiate(model)(params, *weigh(model, pooled=1.0))
    assert jnp.isfinite(out["pooled"]).all()
    assert all(jnp.isfinite(x).all() for x in jax.tree.leaves(slopes))


def test_what_is_computed_again_changes_nothing():
    again = GRADED["v1"]
    kept, weights = again.clone(remat="none"), weigh(again, 1.0, 1.0)
    params = start(again)
    for one, other in zip(
        jax.tree.leaves(differentiate(kept)(params, *weights)),
        jax.tree.leaves(differentiate(again)(params, *weights)),
        strict=True,
    ):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4)


def test_drop_path_is_drawn_by_the_image_wherever_it_is():
    model = build("v1", ONCE, drop_path=0.9)
    keys = jax.random.split(jax.random.key(5), (2, N))
    found = apply(model, keys=keys)["pooled"]
    moved = jax.tree.map(jnp.asarray, pack([[IMAGES[2], IMAGES[0]], []]))
    again = apply(model, moved, keys=keys[:, jnp.array([2, 0, 1, 3])])["pooled"]
    np.testing.assert_allclose(again[0, 0], found[0, 2], atol=1e-5)
    np.testing.assert_allclose(again[0, 1], found[0, 0], atol=1e-5)
    other = jax.random.split(jax.random.key(6), (2, N))
    assert not np.allclose(found, apply(model, keys=other)["pooled"], atol=1e-2)


def test_boxes_and_points_are_float32_under_bfloat16():
    coarse, exact = build(dtype="bfloat16", capture=True), build(capture=True)
    found, expected = apply(coarse), apply(exact)
    assert found["pooled"].dtype == jnp.bfloat16
    for name in ("rois", "points"):
        assert found[name].dtype == jnp.float32
        np.testing.assert_allclose(found[name], expected[name], atol=0.05)
    # Those of the first stage do not depend on rounded tokens.
    np.testing.assert_array_equal(found["rois"][:, 0], expected["rois"][:, 0])
    assert {x.dtype for x in jax.tree.leaves(trace(coarse))} == {jnp.dtype("float32")}


def test_boxes_can_be_kept_in_the_image_or_where_they_start():
    clamped = build("v1", roi_clamp=True, capture=True)
    params = start(clamped)
    wild = jax.tree.map(lambda x: 20 * x, params["params"]["focusing"]["adjustment"])
    params = put(params, "focusing", adjustment=wild)
    free = apply(build("v1", capture=True), params=params)["rois"]
    kept = apply(clamped, params=params)["rois"]
    assert (free < 0).any()
    assert ((kept >= 0) & (kept <= 1)).all()
    # Where nothing moves them they stay: there is nothing to move them by.
    frozen = trace(build("v1", freeze_roi=True))["params"]
    units = frozen["focusing"], frozen["refocusing"]
    assert not any("adjustment" in unit for unit in units)


def test_operations_may_come_in_any_number_and_order():
    shape = {"focus": ("sample", "mlp"), "refocus": ("sample",), "points": 3, **ONCE}
    unit = trace(build(shape=shape))["params"]["focusing"]
    assert {"sampling", "mlp"} < set(unit)
    assert not {"attention", "adjustment", "position"} & set(unit)
