"""The benchmarks run end to end in their tiny form; what they measure is not judged."""

import importlib
import io
import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
import tiny
from etils import epath
from PIL import Image

from navit_jax.data import sources

ROOT = pathlib.Path(__file__).parent.parent
QUICK = {
    **os.environ,
    "XLA_FLAGS": os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=1"),
}


def run(*command, **environment):
    done = subprocess.run(
        command, cwd=ROOT, env={**QUICK, **environment}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def cells(line):
    return [cell.strip() for cell in line.strip("|").split("|")]


@pytest.fixture
def benchmark_module(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module


def test_alternatives_are_timed_in_turn_after_an_untimed_call_of_each(benchmark_module):
    timing = benchmark_module("timing")
    now, called = [0.0], []

    def case(name, first, later):
        def call():
            now[0] += later if name in called else first
            called.append(name)

        return call

    cases = {"a": case("a", 100, 1), "b": case("b", 50, 2)}
    seconds = timing.interleave(cases, 3, clock=lambda: now[0])
    assert {name: list(x) for name, x in seconds.items()} == {
        "a": [1] * 3,
        "b": [2] * 3,
    }
    assert called == 4 * ["a", "b"]
    called.clear()
    cases = {"a": case("a", 100, 1), "b": case("b", 50, 2)}
    timing.interleave(cases, 2, settle=True, clock=lambda: now[0])
    assert called == ["a", "b"] + 2 * ["a", "a", "b", "b"]


def test_a_ratio_is_of_the_first_over_the_second_round_by_round(benchmark_module):
    timing = benchmark_module("timing")
    slow, fast = np.array([2.0, 4.0, 6.0]), np.array([1.0, 1.0, 2.0])
    assert timing.ratio(slow, fast) == "3.00 (2.50 .. 3.50)"


def test_the_fixed_list_is_the_same_everywhere(benchmark_module):
    grids = benchmark_module("fixed_list").grids()
    assert (16 * grids[:6]).tolist() == [
        [96, 224], [240, 128], [208, 96], [112, 208], [64, 96], [400, 144]
    ]  # fmt: skip
    lengths = grids.prod(1)
    assert (len(grids), lengths.sum(), (lengths**2).sum()) == (256, 29_608, 4_747_848)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, words",
    [
        ("attention", ["dense / blocks", "work / sum n^2"]),
        ("compiling", ["scanned / unrolled", "with a full cache"]),
        (
            "contrastive",
            ["core-s / dense", "MiB resident", "of gathering both", "d image"],
        ),
        ("sampling", ["gather ms", "canvas / tiles"]),
        ("text_padding", ["packed | 104", "padded to 64 | 640", "over packed"]),
    ],
)
def test_a_benchmark_prints_its_tables(name, words):
    out = run(sys.executable, f"benchmarks/{name}.py", "--tiny")
    for word in words:
        assert word in out


@pytest.mark.slow
def test_the_tables_of_the_step_divide_what_they_say():
    out = run(sys.executable, "benchmarks/train_step.py", "--tiny")
    found = {}
    for part in out.split("### ")[1:]:
        lines = [cells(line) for line in part.splitlines() if line[:1] == "|"]
        found[part.splitlines()[0]] = lines[2:]
    number = lambda cell: float(cell.split()[0].replace(",", "").rstrip("%"))  # noqa: E731
    rates = found["Packed against plain"]
    best = {line[0]: line for line in rates if line[1] == "packed, rows of 1024"}
    for size, name, images, tokens, by_images, by_tokens in rates:
        packed = best[size]
        expected = number(packed[2]) / number(images)
        assert number(by_images) == pytest.approx(expected, rel=0.02), name
        expected = number(packed[3]) / number(tokens)
        assert number(by_tokens) == pytest.approx(expected, rel=0.02), name
    for _, short, long, ratio in found["Long rows"]:
        assert number(ratio) == pytest.approx(number(long) / number(short), rel=0.02)
    first, second = found["Sizes"]
    ratio = number(second[1]) / number(first[1])
    assert number(second[3]) == pytest.approx(ratio, rel=0.02)
    for line in found["Where the time goes"]:
        assert abs(sum(map(number, line[2:5])) - 100) <= 2  # three roundings
    assert len(found["Choices"]) == 6
    assert all(number(line[4]) > 0 for line in found["Choices"])


@pytest.mark.slow
def test_a_sparseformer_is_divided_by_plain_vits_and_its_time_into_parts():
    command = "benchmarks/sparseformer_step.py", "--tiny", "--tables=v2_vit_s14,where"
    first, where = run(sys.executable, *command).split("### ")[1:]
    plain, teacher, own = (
        cells(x) for x in first.splitlines() if x[:3] in ("| V", "| v")
    )
    assert [line[0] for line in (plain, teacher, own)] == [
        "ViT-S/16", "ViT-S/14", "v2_vit_s14"
    ]  # fmt: skip
    for other, start in ((plain, 4), (teacher, 7)):
        for column, rate in ((start, 2), (start + 1, 3)):
            found = float(own[column].split()[0])
            assert found == pytest.approx(
                float(own[rate]) / float(other[rate]), abs=0.02
            )
        # Thousandths of 1e9 at a tiny size.
        assert float(own[start + 2]) > 0
    parts = [cells(line) for line in where.splitlines() if line[:1] == "|"][2:]
    whole, *shares = (float(line[2].rstrip("%")) for line in parts)
    assert whole == 100
    assert abs(sum(shares) - 100) <= 3  # of roundings


def test_sizes_are_compared_and_images_counted_that_are_upscaled(tmp_path):
    folder = f"--workdir={tmp_path}"
    command = "benchmarks/resolutions.py", "--tiny", "--folds=1", folder
    lines = run(sys.executable, *command).splitlines()
    table = {cells(line)[0]: cells(line) for line in lines if line[:1] == "|"}
    source, counts = sources.clipart("fold1:test"), {64: 0, 128: 0}
    for i in range(len(source)):
        width, height = Image.open(io.BytesIO(source[i].image)).size
        for side in counts:
            counts[side] += side * side > height * width
    expected = [f"{count / len(source):.0%}" for count in counts.values()]
    assert table["images upscaled"][3:5] == expected
    own, mixed = float(table["64"][3]), float(table["mixed"][3])
    assert abs(mixed - own - float(table["64"][5])) < 0.0016  # three roundings
    pairs = [cells(line) for line in lines if line.startswith(("| as", "| padded"))]
    assert [(p[0], p[1]) for p in pairs] == [
        (part, side) for part in ("as it is", "padded") for side in ("64", "128")
    ]
    for pair in pairs:
        tokens, native, square, less = map(float, (pair[3], *pair[4:7]))
        assert tokens == (int(pair[1]) / 16) ** 2
        assert abs(native - square - less) < 0.0016
        assert (float(pair[7]) > float(pair[8])) == (pair[0] == "as it is")
    with Image.open(tmp_path / "resolutions.png") as picture:
        assert np.array(picture.convert("L")).std() > 5


def test_a_fold_that_is_judged_is_not_trained_again(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import five_fold

    calls = []
    monkeypatch.setattr(five_fold.train, "train", lambda *a: calls.append(a) or 0)
    config = tiny.config(evals={"validation": tiny.config()["data"]})
    config["steps"] = 6
    folder = epath.Path(tmp_path)
    five_fold.train_fold(config, 2, folder)
    ((given, _),) = calls
    assert given["data"]["sources"]["clipart"]["split"] == "fold2:train"
    assert given["evals"]["fold"]["sources"]["clipart"]["split"] == "fold2:test"
    judged = {"step": 6, "eval/fold_64/accuracy": 0.5, "data/images_seen": 7}
    (folder / "config.json").write_text(json.dumps(given))
    (folder / "metrics.jsonl").write_text(json.dumps(judged | {"step": 4}) + "\n")
    five_fold.train_fold(config, 2, folder)
    assert len(calls) == 2  # it was not judged at its end
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(judged) + "\n")
    found = five_fold.train_fold(config, 2, folder)
    assert len(calls) == 2
    assert found == {k: v for k, v in judged.items() if k != "step"}
    five_fold.train_fold(config | {"seed": 1}, 2, folder)
    assert len(calls) == 3  # it is another run's folder: training refuses it


def test_the_tables_and_the_picture_of_sizes_show_what_the_folds_gave(
    monkeypatch, capsys
):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import five_fold
    import resolutions

    assert five_fold.mean_and_error([0.1, 0.2, 0.4]) == "0.233 +- 0.088"
    assert five_fold.mean_and_error([0.5]) == "0.500"
    sides, names = [64, 96], ("mixed", "square", "64", "96")

    def measured(number, fold):
        values = {"data/images_seen": 1000 * number, "data/tokens_seen": 7}
        for part, side in [(p, s) for p in ("fold", "padded") for s in sides]:
            name, padded = f"eval/{part}_{side}", part == "padded"
            accuracy = 0.1 * number + side / 1000 + fold / 100 + 0.05 * padded
            values |= {f"{name}/accuracy": accuracy, f"{name}/tokens_per_image": side}
            values |= {f"{name}/images": 100.0, f"{name}/upscaled": side / 100}
        return values

    runs = {n: [measured(i, f) for f in (0, 2)] for i, n in enumerate(names)}
    known = {"majority": 0.2, "aspect_only": 0.3}
    guesses = [{f"{p}/{n}": v for n, v in known.items() for p in ("fold", "padded")}]
    guesses *= 2
    resolutions.print_sizes(runs, guesses, sides)
    resolutions.print_squares(runs, guesses, sides)
    out = capsys.readouterr().out
    said = "commonest class: 0.200 +- 0.000; the aspect alone: 0.300 +- 0.000."
    assert said in out
    table = {
        cells(line)[0]: cells(line) for line in out.splitlines() if line[:1] == "|"
    }
    seen = ["2,000", "7"]
    accuracy = ["0.274 +- 0.010", "0.306 +- 0.010"]
    assert table["64"] == ["64", *seen, *accuracy, "-0.200 +- 0.000"]
    assert table["images upscaled"][3:5] == ["64%", "96%"]
    squares = [cells(line) for line in out.splitlines() if line.startswith("| padded")]
    assert squares[1][1:] == [
        "96", "96.0", "96.0", "0.156 +- 0.010", "0.256 +- 0.010", "-0.100 +- 0.000",
        "0.300 +- 0.000", "0.200 +- 0.000",
    ]  # fmt: skip
    (axes,) = resolutions.draw(runs, guesses, sides).axes
    lines = {
        tuple(np.round(np.array(line.get_ydata(), float), 3)) for line in axes.lines
    }
    for number in (0, 2, 3):
        mean = [0.1 * number + side / 1000 + 0.01 for side in sides]
        assert tuple(np.round(mean, 3)) in lines


@pytest.mark.parametrize("variant", ["48", "64", "96", "128", "mixed", "square"])
def test_a_variant_of_sizes_is_trained_at_its_own(variant):
    found = tiny.load("configs/ablations/resolution.py", variant).data
    law = {"name": "uniform", "low": 32, "high": 128, "of": "side"}
    if variant.isdecimal():
        law = {"name": "fixed", "side": int(variant)}
    assert found.resolution.to_dict() == law
    assert found.square == (variant == "square")
