"""What a step takes on devices: as counted by hand, here and on a pod of TPUs."""

import importlib.util
import json
import logging
import math
import os
import re
import subprocess
import sys

import commands
import jax
import pytest
import tiny

from navit_jax import experiment, pod_search, pods, train_flops
from navit_jax.errors import ConfigError
from navit_jax.topology import CHIPS, Chip, Topology, open_topology

HERE = Chip(2**34, 1e12, 1e9, 1e9)


def here(num=8):
    return Topology("some", HERE, tuple(jax.devices()[:num]), 1)


@pytest.fixture(scope="module")
def found():
    config = tiny.config(mesh={"replica": 2, "fsdp": 2, "tensor": 2}, train__ema=0.9)
    stream = experiment.build_stream(config)
    return config, stream, pods.account(config, stream, here(), stream.num_classes)


def test_memory_is_that_of_what_each_device_holds(found):
    config, stream, told = found
    memory = told["memory"]
    step = pods.Step(config, stream, here(), stream.num_classes)
    leaves = jax.tree.leaves(step.params)
    split = sum(
        math.prod(leaf.shape) * 4 / split_in(leaf.sharding, told["mesh"])
        for leaf in leaves
    )
    assert memory["parameters"] == split
    # AdamW has two moments and a count, and the running mean is one of all.
    assert memory["running mean"] == split
    assert 2 * split <= memory["optimizer"] <= 2 * split + 64
    batch = stream.example()
    # Rows are over replica and fsdp, and the same on both of tensor.
    assert memory["batch"] == sum(x.nbytes for x in jax.tree.leaves(batch)) / 4
    # The next state is where the last one was; a count or a number is beside them.
    own = sum(size for name, size in memory.items() if name not in ("total", "device"))
    assert own <= memory["total"] < own + split / 2
    assert memory["device"] == HERE.memory


def split_in(sharding, mesh):
    axes = [axis for axes in sharding.spec if axes for axis in [axes]]
    return math.prod(mesh[axis] for axis in axes)


def test_estimates_are_of_what_is_counted(found):
    config, stream, told = found
    report = stream.plan.report()
    plan = stream.plan
    counts = {
        "images": report["images_per_row"] * plan.rows,
        "tokens": (1 - report["padding"]) * plan.rows * plan.tokens,
        "attention_pairs": report["attention_work"] * plan.rows * plan.tokens**2,
    }
    step = pods.Step(config, stream, here(), stream.num_classes)
    assert told["flops"] == train_flops.flops_counter(config, step.params)(counts)
    seconds = told["seconds"]
    assert seconds["products at the peak"] == told["flops"] / 8 / HERE.flops
    assert seconds["compiler"] == 0  # a CPU's compiler says nothing
    assert seconds["network"] > 0
    whole = seconds["products at the peak"] + seconds["network"]
    assert seconds["without overlap"] == whole
    assert told["images_per_second"] == counts["images"] / whole
    assert told["mfu"] == pytest.approx(told["flops"] / 8e12 / whole)
    assert told["days"] == config["steps"] * whole / 86400
    # Gradients of all devices, and parameters of those that share them.
    assert {name.split(", ")[1] for name in told["sent"]} >= {"fsdp", "tensor"}
    json.dumps(told)
    text = pods.format_account(told)
    assert re.search(r"memory of a device +[\d.]+ of 16 GiB", text)


def test_the_network_takes_what_each_kind_sends_along_its_axis():
    step = object.__new__(pods.Step)
    step.mesh = {"replica": 2, "fsdp": 4}
    result = "f32[256]{0}"  # a KiB
    lines = {
        "all-gather(%a), replica_groups=[2,4]<=[8]": 3 / 4,
        "all-reduce(%a), replica_groups=[4,2]<=[2,4]T(1,0)": 2 / 2,
        "reduce-scatter(%a), replica_groups=[2,4]<=[8]": 3,
        "collective-permute(%a), source_target_pairs={{0,1}}": 2,
        "all-reduce(%a), to_apply=%add": 2 * 7 / 8,
    }
    for line, share in lines.items():
        step.text = f"ENTRY %m () -> f32[] {{\n  %r = {result} {line}\n}}\n"
        seconds = step.network_seconds(Chip(1, 1.0, 1.0, 1e6, 1e3))
        assert seconds == pytest.approx(1024 * share / 1e6), line
    # Between slices is the slow network.
    step.text = (
        "ENTRY %m () -> f32[] {\n  %r = (f32[256]{0}, u32[], token[]) recv(%a), "
        'frontend_attributes={_xla_host_transfer_handler_name="xla_megascale_runtime"}'
        "\n}\n"
    )
    assert step.network_seconds(Chip(1, 1.0, 1.0, 1e6, 1e3)) == pytest.approx(1.024)
    assert step.sent() == {"between slices, replica": {"bytes": 1024, "number": 1}}


def test_the_fastest_of_several_choices_comes_first_and_what_can_not_be_is_told(
    found, caplog
):
    caplog.set_level(logging.INFO, logger="absl")
    config, stream, _ = found
    on, classes = here(), stream.num_classes
    meshes = [{"replica": 8, "fsdp": 1}, {"replica": 1, "fsdp": 8}]
    told = pod_search.search(config, stream, on, classes, meshes, (1, 3), ("full",))
    assert len(told) == 2
    assert len([m for m in caplog.messages if "no multiple of 24" in m]) == 2
    times = [each["seconds"]["without overlap"] for each in told]
    assert times == sorted(times)
    table = pod_search.format_table(told)
    assert {row.split(" | ")[0] for row in table.splitlines()[2:]} == {"| 8", "| 1"}


def test_what_the_compiler_needs_is_read_in_its_unit():
    assert pods.read_needed("(22.5G) exceeds available HBM (15.75G)") == 22.5 * 2**30
    assert pods.read_needed("(512.0M) exceeds available HBM (15.75G)") == 2**29
    assert pods.read_needed("Mosaic failed") == 0


@pytest.mark.parametrize("num, slices", [(8, 1), (256, 1), (256, 2), (48, 3)])
def test_meshes_that_are_tried_hold_all_devices_and_split_no_slice(num, slices):
    on = Topology("some", HERE, (None,) * num, slices)
    meshes = pod_search.list_meshes(on)
    assert len(meshes) >= 3
    for mesh in meshes:
        assert math.prod(mesh.values()) == num
        assert mesh["replica"] % slices == 0


@pytest.mark.parametrize(
    "text", ["v5e", "v9:2x2", "v5e:16", "0*v5e:2x2", "v5e:2x2x2x2", "two*v5e:2x2"]
)
def test_what_is_no_topology_is_refused(text):
    with pytest.raises(ConfigError, match=r"give a chip of v4, v5e, v5p, v6e and its"):
        open_topology(text)


def test_without_libtpu_the_remedy_is_said(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"needs libtpu: pip install 'navit_jax\[tpu"):
        open_topology("v5e:2x2")


def test_the_command_plans_for_the_devices_that_are_here(tmp_path):
    output = tmp_path / "plan.json"
    arguments = tiny.ROOT / "configs/smoke.py", "--config.data.rows=8"
    done = commands.run(
        "navit_jax.plan", f"--config={arguments[0]}", arguments[1],
        "--topology=here", f"--output={output}",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "here: 8 devices, mesh replica 1, fsdp 8, tensor 1" in done.stdout
    assert json.loads(output.read_text())["devices"] == 8


def for_tpu(*arguments):
    """The command in a process of its own: libtpu ends one with flags of a CPU."""
    if not importlib.util.find_spec("libtpu"):
        pytest.skip("compiling for a TPU needs libtpu")
    environment = {**os.environ, "XLA_FLAGS": "", "JAX_ENABLE_COMPILATION_CACHE": "0"}
    return subprocess.run(
        [sys.executable, "-m", "navit_jax.plan", "--config=configs/smoke.py",
         "--config.data.rows=8", *arguments],
        cwd=tiny.ROOT, env=environment, capture_output=True, text=True,
    )  # fmt: skip


@pytest.mark.parametrize(
    "text, slices",
    [("v5e:2x4", 1), pytest.param("2*v5e:2x2", 2, marks=pytest.mark.slow)],
)
def test_a_step_is_compiled_for_a_pod(text, slices, tmp_path):
    path = tmp_path / "plan.json"
    done = for_tpu(
        f"--topology={text}", f"--output={path}", f"--config.mesh.replica={slices}"
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(path.read_text())
    assert told["devices"] == 8
    assert told["memory"]["device"] == CHIPS["v5e"].memory
    assert told["seconds"]["compiler"] > told["seconds"]["products at the peak"] > 0
    assert "all-gather, fsdp" in told["sent"]
    assert ("between slices, replica" in told["sent"]) == (slices > 1)


SPLASH = """
import re, sys
import tiny
from navit_jax import experiment, hlo, pods
from navit_jax.topology import open_topology
config = tiny.config(data__tokens=384, data__rows=8, model__attention=sys.argv[1])
stream = experiment.build_stream(config)
step = pods.Step(config, stream, open_topology("v5e:2x4"), stream.num_classes)
kernels = squares = gathered = 0
for each in hlo.walk(step.text):
    kernels += each.times * ("tpu_custom_call" in each.line and not each.fused)
    squares += bool(re.search(r"\\[(\\d+,)*384,384\\]", each.line))
tokens = max(x.size for x in hlo.read(step.text) if x.kind == "all-gather")
print(kernels > 0, squares > 0, tokens < 384 * 8 * 32 * 2)
"""


@pytest.mark.slow
@pytest.mark.parametrize("attention, dense", [("auto", False), ("dense", True)])
def test_attention_on_a_tpu_is_a_kernel_without_a_matrix_of_all_pairs(attention, dense):
    if not importlib.util.find_spec("libtpu"):
        pytest.skip("compiling for a TPU needs libtpu")
    paths = [str(tiny.ROOT / "tests"), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "XLA_FLAGS": "", "JAX_ENABLE_COMPILATION_CACHE": "0"}
    done = subprocess.run(
        [sys.executable, "-c", SPLASH, attention], cwd=tiny.ROOT, text=True,
        env={**environment, "PYTHONPATH": os.pathsep.join(paths)}, capture_output=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    # Rows stay where they are, too: no device gathers the tokens of others.
    assert done.stdout.split() == [str(not dense), str(dense), "True"]


@pytest.mark.slow
def test_what_does_not_fit_says_what_would_help():
    done = for_tpu("--topology=v5e:1x1", "--config.data.rows=32768")
    assert done.returncode == 2, done.stderr
    assert re.search(r"a device would need [\d.]+ GiB, and has 16 at most", done.stderr)
    knobs = re.findall(r"config\.train\.accumulate=2.*: ([\d.]+) GiB", done.stderr)
    assert len(knobs) == 2
