"""The script that waits for a GPU, as far as any backend can show it."""

import functools
import importlib
import os
import re
import subprocess
import sys

import jax
import numpy as np
import pytest
import tiny

from navit_jax.models import attention


@pytest.fixture
def gpu(monkeypatch):
    """`benchmarks/gpu.py`; what it gives the model is taken away again."""
    monkeypatch.syspath_prepend(tiny.ROOT / "benchmarks")
    for name in ("IMPLEMENTATIONS", "KERNELS"):
        monkeypatch.setattr(attention, name, dict(getattr(attention, name)))
    return importlib.import_module("gpu")


def tables(out):
    """The Markdown tables of an output: {title: lines of cells}."""
    found = {}
    for part in out.split("### ")[1:]:
        title, *lines = part.splitlines()
        rows = [line.strip("|").split("|") for line in lines if line[:1] == "|"]
        found[title] = [[cell.strip() for cell in row] for row in rows[2:]]
    return found


def test_the_gpu_script_compares_and_times_everything_on_any_backend(gpu):
    flags = os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=1")
    quick = {"PYTHON": sys.executable, "XLA_FLAGS": flags}
    out = subprocess.run(
        ["bash", "benchmarks/gpu.sh", "--tiny"],
        cwd=tiny.ROOT,
        env=os.environ | quick,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    ).stdout
    errors, steps_, times = tables(out).values()
    skipped = ["skipped: cuDNN is not for cpu"]
    names = ["dense", "blocks", "mha", "cudnn packed"]
    assert [line[:2] for line in errors] == [
        [name, dtype] for dtype in ("float32", "bfloat16") for name in names
    ]
    assert [line[1] for line in steps_] == ["values", *names, "auto"]
    assert [line[0] for line in times] == names
    for lines, text in ((errors, 2), (steps_, 2), (times, 1)):
        absent = [line for line in lines if "cudnn packed" in line]
        assert all(line[text:] == skipped for line in absent)
        lines[:] = [line for line in lines if "cudnn packed" not in line]
    for line in errors:
        worst = 1e-5 if line[1] == "float32" else 2e-2
        assert len(line) == 6
        assert all(float(cell) <= worst for cell in line[2:]), line

    (peak,) = re.findall(r"peak (\S+) TFLOP/s", out)
    peak = float(peak) * 1e12
    values, *others = steps_
    assert values[5] == values[7] == "-"  # a CPU tells no peak
    lengths = gpu.fixed_list.packed(2, 272, 64).grids.prod(-1).astype(float)
    D, depth, hidden = 64, 1, 64
    # As `train_flops` of the shared definition of useful work.
    linear = 2 * lengths.sum() * (4 * D * D + 2 * D * hidden) * depth
    linear += 2 * lengths.sum() * 768 * D
    useful = 3 * (linear + 4 * (lengths**2).sum() * D * depth)
    number = lambda cell: float(cell.replace(",", "").rstrip("%"))  # noqa: E731
    for line in others:
        ms, images, tokens, mfu, held, share = map(number, (*line[2:7], line[8]))
        # Rates are printed as whole numbers, which are small on a busy machine.
        near = functools.partial(pytest.approx, rel=0.02, abs=0.51 * ms)
        assert images * ms == near(1e3 * (lengths > 0).sum())
        assert tokens * ms == near(1e3 * lengths.sum())
        expected = useful * tokens / lengths.sum() / peak
        assert mfu / 100 == pytest.approx(expected, rel=0.02, abs=1e-4)
        assert 0 < held < 1
        assert share / 100 == pytest.approx(1 - number(values[2]) / ms, abs=0.01)

    ids = gpu.segments(2, 128, 8, 40)
    pairs = sum(
        (ids[b] == i).sum() ** 2 for b in (0, 1) for i in range(1, ids.max() + 1)
    )
    for line in times:
        rate = number(line[1]) / 1e3 * number(line[2]) * 1e12
        assert rate == pytest.approx(12 * pairs * 64 * 2, rel=0.02)
        faster = float(line[3].split()[0])
        ratio = number(times[0][1]) / number(line[1])
        # Printed with two digits behind the point.
        assert faster == pytest.approx(ratio, rel=0.02, abs=0.006)


def test_the_gpu_script_ends_with_1_if_attention_fails_or_is_not_equal(
    gpu, monkeypatch, capfd
):
    def broken(*_, **__):
        raise RuntimeError("never")

    near = lambda *arrays: 1.001 * attention.blocks(*arrays)  # noqa: E731
    monkeypatch.setitem(attention.IMPLEMENTATIONS, "blocks", near)
    monkeypatch.setattr(gpu.attention_kernels, "mha", broken)
    monkeypatch.setattr(gpu.steps, "compiled", broken)
    assert gpu.measure(tiny=True) == 1
    out = capfd.readouterr().out
    failures = [line for line in out.splitlines() if line.startswith("FAILED: ")]
    steps_ = [
        f"FAILED: Ti/16 of {name}: RuntimeError: never"
        for name in ("values", "dense", "blocks", "mha", "auto")
    ]
    assert failures == [
        "FAILED: blocks in float32 is off by 1.0e-03",
        "FAILED: float32 of mha: RuntimeError: never",
        "FAILED: bfloat16 of mha: RuntimeError: never",
        *steps_,
        "FAILED: the time of mha: RuntimeError: never",
    ]
    for part in ("compare", "time_steps", "time_attention"):
        monkeypatch.setattr(gpu, part, lambda *_: None)
    assert gpu.measure(tiny=True) == 0


def test_the_layout_that_cudnn_is_given_holds_each_image(gpu, monkeypatch):
    cudnn = importlib.import_module(gpu.MODULES["cudnn packed"])

    def attend(q, k, v, q_seqlen, kv_seqlen, q_offsets, kv_offsets, scale, mask_type):
        assert q_offsets.shape == kv_offsets.shape == (len(q), q_seqlen.shape[1] + 1)
        assert mask_type == cudnn.MaskType.PADDING
        unused = np.pad(q_seqlen < 0, ((0, 0), (0, 1)), constant_values=True)
        assert np.array_equal(q_offsets < 0, unused)
        out = np.full(q.shape, np.nan, np.float32)
        for b, m in np.ndindex(q_seqlen.shape):
            if q_seqlen[b, m] < 0:
                continue
            own = slice(q_offsets[b, m], q_offsets[b, m] + q_seqlen[b, m])
            others = slice(kv_offsets[b, m], kv_offsets[b, m] + kv_seqlen[b, m])
            scores = np.einsum("ihk,jhk->hij", q[b, own], k[b, others]) * scale
            weights = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
            out[b, own] = np.einsum("hij,jhk->ihk", weights, v[b, others])
        return out

    ids = gpu.segments(3, 128, 8, 40)
    q, k, v, ids, _ = gpu.inputs(ids, 2, np.float32)
    expected = attention.packed_attention(q, k, v, ids, "dense")
    monkeypatch.setattr(cudnn, "dot_product_attention", attend)
    found = gpu.cudnn_packed(q, k, v, ids, slots=int(ids.max()))
    real = np.asarray(ids) > 0
    np.testing.assert_allclose(found[real], expected[real], rtol=1e-5, atol=1e-5)


def test_cudnn_takes_the_packed_layout_forward_and_backward(gpu, monkeypatch):
    # As far as can be seen without a GPU: it is lowered for one.
    cudnn = importlib.import_module(gpu.MODULES["cudnn packed"])
    monkeypatch.setattr(cudnn, "check_cudnn_version", lambda: 91100)
    monkeypatch.setattr(cudnn, "check_compute_capability", lambda _: True)
    gpu.register(8, tiny=True)
    arrays = gpu.inputs(gpu.segments(2, 128, 8, 40), 2, jax.numpy.bfloat16)
    traced = gpu.gradient("cudnn packed").trace(*arrays)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert "__cudnn$fmhaSoftmax(" in text
    assert "__cudnn$fmhaSoftmaxBackward(" in text


def test_a_peak_below_an_earlier_one_is_only_bounded(gpu):
    GiB = 2**30
    assert gpu.tell_peak(GiB, 3 * GiB) == "3.00"
    assert gpu.tell_peak(3 * GiB, 3 * GiB) == "<= 3.00"
    assert gpu.tell_peak(0, 0) == "-"


def test_useful_work_is_that_of_the_shared_definition(gpu):
    batch = gpu.fixed_list.alone(gpu.fixed_list.grids(), 272)
    assert gpu.steps.count(batch) == (256, 29_608)
    assert gpu.steps.count_pairs(batch.segment_ids) == 4_747_848
    for size, teraflop in {"Ti/16": 1.100, "S/16": 4.087, "B/16": 15.718}.items():
        settings = gpu.steps.config(size, batch, 8)
        found = gpu.steps.useful_flops(settings, batch) / 1e12
        assert found == pytest.approx(teraflop, abs=0.0005)
    settings = gpu.steps.config("B/16", batch, 8, depth=6)
    assert gpu.steps.useful_flops(settings, batch) / 1e12 < 8
