"""What a compiled program's text tells: how often things run, what devices send."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from navit_jax import hlo, sharding


def compiled(f, *shapes):
    return jax.jit(f).lower(*shapes).compile().as_text()


def test_operations_of_nested_loops_are_counted_as_often_as_they_run():
    def body(x, _):
        return jax.lax.scan(lambda y, _: (jnp.sin(y @ y), None), x, length=5)[0], None

    def run(x):
        x, _ = jax.lax.scan(body, x, length=3)
        return x @ x

    text = compiled(run, jnp.zeros((64, 64)))
    products = [step for step in hlo.walk(text) if "dot_general" in step.line]
    products = [step for step in products if step.kind in ("dot", "custom-call")]
    assert sum(step.times for step in products) == 3 * 5 + 1


# What a TPU's compiler writes: no count at the loop, cycles at its operations.
TPU = """
%fused (p: f32[8,128]) -> f32[8,128] {
  %p = f32[8,128]{1,0:T(8,128)} parameter(0)
  ROOT %n = f32[8,128]{1,0:T(8,128)} negate(%p), backend_config={"estimated_cycles":"7"}
}

%condition (c: (s32[], f32[8,128])) -> pred[] {
  %limit = s32[]{:T(128)} constant(12)
  %c = (s32[]{:T(128)}, f32[8,128]{1,0:T(8,128)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%c), index=0
  ROOT %lt = pred[]{:T(512)} compare(%i, %limit), direction=LT
}

%body (b: (s32[], f32[8,128])) -> (s32[], f32[8,128]) {
  %b = (s32[]{:T(128)}, f32[8,128]{1,0:T(8,128)}) parameter(0)
  %x = f32[8,128]{1,0:T(8,128)} get-tuple-element(%b), index=1
  %f = f32[8,128]{1,0:T(8,128)S(1)} fusion(%x), kind=kLoop, calls=%fused, metadata={op_name="on the chip"}, backend_config={"estimated_cycles":"100"}
  %r = f32[8,128]{1,0:T(8,128)} all-reduce(%f), replica_groups=[2,4]<=[4,2]T(1,0), to_apply=%fused
  ROOT %t = (s32[]{:T(128)}, f32[8,128]{1,0:T(8,128)}) tuple(%i, %r)
}

ENTRY %main (a: f32[8,128]) -> f32[8,128] {
  %a = f32[8,128]{1,0:T(8,128)} parameter(0)
  %z = f32[4,128]{1,0:T(8,128)} slice(%a), metadata={op_name="step/slice"}, backend_config={"estimated_cycles":"50"}
  %w = (s32[]{:T(128)}, f32[8,128]{1,0:T(8,128)}) while(%a), condition=%condition, body=%body
  ROOT %o = f32[8,128]{1,0:T(8,128)} get-tuple-element(%w), index=1
}
"""  # noqa: E501


def test_rounds_of_a_loop_are_read_from_its_condition_and_cycles_counted_by_them():
    assert hlo.count_cycles(TPU) == 50 + 12 * 100
    (sent,) = hlo.read(TPU)
    assert sent == ("all-reduce", 8 * 128 * 4, 12, (0, 2, 4, 6))


def test_what_the_text_does_not_tell_has_as_many_rounds_as_are_said():
    other = TPU.replace("direction=LT", "direction=GE")
    assert hlo.count_cycles(other) == 50 + 100
    assert [each.times for each in hlo.read(other, trips=3)] == [3]


def test_all_branches_are_walked():
    text = """
%one (p: f32[8]) -> f32[8] {
  ROOT %a = f32[8]{0} all-reduce(%p), to_apply=%add
}

%two (p: f32[8]) -> f32[8] {
  ROOT %b = f32[8]{0} all-gather(%p), dimensions={0}
}

ENTRY %main (a: f32[8]) -> f32[8] {
  ROOT %c = f32[8]{0} conditional(%i, %a, %a), branch_computations={%one, %two}
}
"""
    assert [each.kind for each in hlo.read(text)] == ["all-reduce", "all-gather"]


@pytest.mark.parametrize(
    "line, size",
    [
        ("(f32[256], f32[256], f32[256]) all-reduce-start(%a, %b, %c)", 3 * 1024),
        ("((f32[8], f32[16]), (f32[32], f32[64])) all-gather-start(%a, %b)", 384),
        ("(f32[8], f32[8], u32[], u32[]) collective-permute-start(%a)", 32),
        ("(f32[32], f32[8]) reduce-scatter-start(%a)", 32),
        ("f8e4m3fn[64] all-gather(%a)", 64),
        ("s4[64] all-gather(%a)", 32),
    ],
)
def test_the_result_of_what_starts_is_counted(line, size):
    text = f"ENTRY %main () -> f32[] {{\n  %r = {line}\n}}\n"
    assert [each.size for each in hlo.read(text)] == [size]


def test_the_largest_buffers_are_named_and_what_stays_on_the_chip_is_none():
    assert hlo.largest(TPU) == [(4 * 128 * 4, "f32[4,128]", "step/slice")]


@pytest.mark.parametrize(
    "text, group",
    [
        ("replica_groups={{0,2,4},{1,3,5}}, x", (0, 2, 4)),
        ("replica_groups=[4,2]<=[8], x", (0, 1)),
        ("replica_groups=[2,4]<=[4,2]T(1,0), x", (0, 2, 4, 6)),
        ("replica_groups=mesh['a'=4,'b'=2] {'a'}, x", (0, 2, 4, 6)),
        ("replica_groups=mesh['a'=2,'b'=2,'c'=2] {'c','a'}, x", (0, 1, 4, 5)),
        ("replica_groups=mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'a'}", (0, 1)),
        ("replica_groups=mesh['a'=2,'b'=4], device_ids=([8]) {'a'}", (0, 4)),
        ("source_target_pairs={{0,2},{2,0}}", (0, 2)),
        ("channel_id=1", ()),
    ],
)
def test_groups_of_devices_are_read_in_every_form(text, group):
    assert hlo.find_group(text) == group


@pytest.mark.parametrize("axes", ["replica", "fsdp", "tensor", "replica+fsdp", "all"])
def test_what_is_sent_is_named_by_the_axes_it_goes_along(axes):
    mesh = sharding.make_mesh(2, 2, 2)
    names = tuple(mesh.axis_names) if axes == "all" else tuple(axes.split("+"))
    x = jax.ShapeDtypeStruct(
        (8, 128), jnp.float32, sharding=NamedSharding(mesh, P(names))
    )
    with jax.set_mesh(mesh):
        whole = jax.jit(lambda x: x * 2, out_shardings=NamedSharding(mesh, P()))
        text = whole.lower(x).compile().as_text()
    found = hlo.read(text)
    assert {each.kind for each in found} == {"all-gather"}
    expected = "replica+fsdp+tensor" if axes == "all" else axes
    # Along several axes it may go one after the other.
    told = {hlo.name_axes(each.group, dict(mesh.shape)) for each in found}
    assert set("+".join(told).split("+")) == set(expected.split("+"))
    assert max(each.size for each in found) == 8 * 128 * 4


def test_a_result_in_parts_is_as_large_as_all_of_them():
    line = "  %r = (f32[2,3]{1,0}, bf16[4]{0}, pred[5]{0}) all-reduce(%a, %b, %c)"
    text = f"ENTRY %main () -> f32[] {{\n{line}\n}}\n"
    assert [each.size for each in hlo.read(text)] == [24 + 8 + 5]
    assert np.isclose(hlo.size("32", ""), 4)
