import functools
import html.parser
import json
import os
import pathlib
import shlex
import shutil
import subprocess

import commands
import numpy as np
import pytest
import tiny
from etils import epath
from PIL import Image

import navit_jax
from navit_jax import (
    data,
    experiment,
    page,
    pictures,
    plan,
    report,
    reporting,
    samples,
    train,
)
from navit_jax.data.bad_image import BadImage
from navit_jax.errors import ConfigError

HOSTILE = "<script>document.title = 'taken over'</script>"
# Without a slash, so that a folder may be called so.
TAG = "<script x='1'><b>&amp;"
VALIDATION = {"name": "clipart", "split": "validation"}


def make_run(workdir, name="run", **changes):
    """A run's folder whose texts are hostile, with an evaluation and no checkpoint."""
    workdir.mkdir()
    config = tiny.config(**changes)
    source = config["data"]["sources"].pop("clipart")
    config["data"]["sources"][HOSTILE] = source
    (workdir / "config.json").write_text(json.dumps(config))
    (workdir / "environment.json").write_text(
        json.dumps({"command": ["train.py", f"--config={HOSTILE}"]})
    )
    writer = reporting.MetricWriter(workdir)
    for step in (1, 2, 3):
        values = {"train/loss": 3.0 / step, "pack/padding": 0.02, "data/skipped": 0}
        writer.write(step, values)
    writer.close()
    values = {}
    for side, accuracy in ((32, 0.5), (64, 0.25)):
        stem = f"eval/{HOSTILE} $x_$ _{side}"
        values[f"{stem}/accuracy"] = accuracy
        values[f"{stem}/accuracy_low"] = accuracy - 0.1
        values[f"{stem}/accuracy_high"] = accuracy + 0.1
        values[f"{stem}/tokens_per_image"] = side**2 / 256
        values[f"{stem}/upscaled"] = 0.75
    values["baseline/majority/accuracy"] = 0.125
    (workdir / "evaluation.json").write_text(json.dumps({"values": values}))
    return workdir


@pytest.fixture
def folder(tmp_path):
    return make_run(epath.Path(tmp_path) / "run")


class Tags(html.parser.HTMLParser):
    def __init__(self, text, collected=()):
        super().__init__()
        self.found, self.text = [], []
        self.inside, self.tag = {tag: [] for tag in collected}, ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.found.append(tag)
        self.tag = tag
        if tag in self.inside:
            self.inside[tag].append("")

    def handle_endtag(self, tag):
        self.tag = ""

    def handle_data(self, data):
        self.text.append(data)
        if self.tag in self.inside:
            self.inside[self.tag][-1] += data


def page_of(*folders):
    path = folders[0].parent / "page.html"
    report.write_report(folders, path)
    text = path.read_text()
    assert "<script" not in text
    return text


def test_a_report_is_one_page_with_curves_pictures_and_escaped_text(folder):
    text = page_of(folder)
    page = Tags(text)
    assert page.found.count("svg") == 2  # learning, and accuracy over resolution
    assert page.found.count("img") == 1  # the packed rows
    assert "script" not in page.found
    said = "".join(page.text)
    assert HOSTILE in said
    assert "0.125" in said
    assert "75% up" in said
    assert f"{HOSTILE} $x_$ " in said  # neither HTML nor a formula
    assert "None: config.evals is empty" in said  # why there are no predictions
    assert "padding of the last interval2.00%" in said
    command = shlex.quote(f"--config={HOSTILE}")
    assert f"python -m navit_jax.train {command}\n" in said
    assert "python -m navit_jax.predict" in said
    # Self-contained: nothing is fetched.
    assert 'src="http' not in text
    assert "href=" not in text.replace('href="#', "")


def test_an_evaluation_of_before_the_last_one_of_the_run_is_not_shown(folder):
    path = folder / "evaluation.json"
    judged = json.loads(path.read_text())
    for step, shown in ((9, True), (2, False)):
        path.write_text(json.dumps({**judged, "step": step}))
        with (folder / "metrics.jsonl").open("a") as file:
            file.write('{"step": 3, "eval/own_32/accuracy": 0.875}\n')
        said = "".join(Tags(page_of(folder)).text)
        assert ("0.125" in said) == shown
        assert f"judged{max(step, 3)}" in said


def test_a_page_says_of_which_pictures_its_numbers_are(folder):
    config = json.loads((folder / "config.json").read_text())
    other = {"name": "folder", "path": HOSTILE}
    config["evals"]["held out"] = {
        "name": "agreement",
        "sources": {"a": VALIDATION, "b": other},
        "sides": [64, "native"],
        "budgets": [9],
    }
    (folder / "config.json").write_text(json.dumps(config))
    cells = [text for text in Tags(page_of(folder)).text if text.strip()]
    start = cells.index("Pictures of these numbers")
    assert cells[start + 1 : cells.index("Packed rows")] == [
        *("pictures", "judged by", "sides or budgets"),
        *("training", "clipart (split=train)"),
        "eval/held out",
        f"clipart (split=validation) and folder (path={HOSTILE})",
        *("agreement", "64, native, 9"),
        "Judged by: the run itself; step 0",
    ]
    path = folder / "evaluation.json"
    judged = {**json.loads(path.read_text()), "step": 9}
    judged["command"] = ["evaluate.py", "--workdir=x y", "--split=test"]
    path.write_text(json.dumps(judged))
    said = "".join(Tags(page_of(folder)).text)
    by = "python -m navit_jax.evaluate '--workdir=x y' --split=test; step 9"
    assert f"Judged by: {by}" in said


def test_two_runs_are_on_one_page_with_what_differs(folder, tmp_path):
    other = make_run(epath.Path(tmp_path) / "other", seed=7, optim__lr=0.5)
    page = Tags(page_of(folder, other))
    cells = [text for text in page.text if text.strip()]
    start = cells.index("What differs")
    table = cells[start : cells.index("Learning")]
    assert table[1:] == ["config", "run", "other", "optim.lr", "0.001", "0.5", "seed",
                         "0", "7"]  # fmt: skip
    assert page.found.count("svg") == 2
    assert page.found.count("img") == 2
    curves = cells[cells.index("Learning") : cells.index("Accuracy over resolution")]
    assert {"run: train/loss", "other: train/loss"} <= set(curves)


@pytest.mark.parametrize(
    "names", [("a", "b"), ("a/fold", "b/fold"), (f"{TAG}1", f"{TAG}2")]
)
def test_every_run_of_a_page_is_told_from_the_others(tmp_path, names):
    folders = [epath.Path(tmp_path) / name for name in names]
    for folder in folders:
        folder.parent.mkdir(exist_ok=True)
        make_run(folder)
    text = page_of(*folders)
    labels = [str(f) for f in folders] if "/" in names[0] else list(names)
    page = Tags(text, ("title", "h1", "h2", "th"))
    assert page.inside["title"] == page.inside["h1"] == [", ".join(labels)]
    sections = [f"Commands of {label}" for label in labels]
    assert [h2 for h2 in page.inside["h2"] if "Commands" in h2] == sections
    assert page.inside["th"][:3] == ["", *labels]


def test_a_number_that_is_none_is_a_dash(folder):
    judged = {"eval/v_32/accuracy": 0.5, "eval/v_32/upscaled": None,
              "baseline/v/majority/accuracy": 0.375}  # fmt: skip
    (folder / "evaluation.json").write_text(json.dumps({"values": judged}))
    text = page_of(folder)
    assert "<td>eval/v_32/upscaled</td><td>-</td>" in text
    assert "v/majority" in [said.strip() for said in Tags(text).text]  # the chart


def test_the_summary_has_the_recall_and_the_padding_of_texts_where_there_are(folder):
    assert "padding of its texts" not in page_of(folder)
    record = {"step": 3, "pack/text_padding": 0.25}
    record |= {f"eval/v_64/text_to_image_r{k}": k / 16 for k in (1, 5, 10)}
    record |= {"eval/v_64/text_to_image_r5_low": 0.03125, "eval/v_64/loss": 0.375}
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(record) + "\n")
    cells = [text.strip() for text in Tags(page_of(folder)).text if text.strip()]
    summary = cells[: cells.index("Learning")]
    assert summary[summary.index("padding of its texts") + 1] == "25.00%"
    start = summary.index("eval/v_64/text_to_image_r1")
    assert summary[start:] == [
        *("eval/v_64/text_to_image_r1", "0.0625"),
        *("eval/v_64/text_to_image_r5", "0.3125"),
    ]


def test_what_can_not_be_reported_is_named_before_any_work(folder, tmp_path):
    other = epath.Path(tmp_path) / "other.html"
    with pytest.raises(ConfigError, match="run is named twice"):
        report.write_report([folder, folder.parent / "x" / ".." / "run"], other)
    with pytest.raises(ConfigError, match="--samples=-1: give 0 or more"):
        report.write_report([folder], other, -1)
    for output in (folder, folder.parent / "missing" / "page.html"):
        with pytest.raises(ConfigError, match=f"--output={output} can not be written"):
            report.write_report([folder], output)
    for name in ("evaluation.json", "environment.json", "config.json"):
        whole = (folder / name).read_text()
        (folder / name).write_text(whole[:-1])
        with pytest.raises(ConfigError, match=f"{name} is damaged.*delete it"):
            report.write_report([folder], other)
        (folder / name).write_text(whole)
    assert not other.exists()
    assert not (folder / "rows.png").exists()


def files_of(folder):
    """Each file below a folder, and what it holds."""
    found = (path for path in pathlib.Path(folder).rglob("*") if path.is_file())
    return {str(path): path.read_bytes() for path in found}


run_command = functools.partial(commands.run, "navit_jax.report")


def test_the_command_writes_the_page_its_flags_ask_for_and_nothing_else(folder):
    before, output = files_of(folder), folder.parent / "elsewhere.html"
    done = run_command(folder, f"--output={output}", "--samples=0")
    assert (done.returncode, done.stdout) == (0, f"report: {output}\n"), done.stderr
    assert "Predictions" not in Tags(output.read_text(), ["h2"]).inside["h2"]
    assert files_of(folder) == before
    done = run_command(folder)  # with pictures, which this run has none of
    assert done.returncode == 0, done.stderr
    own = folder / "report.html"
    assert "Predictions" in Tags(own.read_text(), ["h2"]).inside["h2"]
    assert files_of(folder) == {**before, str(own): own.read_bytes()}


def test_the_page_of_several_runs_is_written_here(tmp_path):
    folders = [make_run(epath.Path(tmp_path) / name) for name in ("a", "b")]
    before = [files_of(folder) for folder in folders]
    here = epath.Path(tmp_path) / "here"
    here.mkdir()
    done = run_command(*folders, "--samples=0", cwd=here)
    assert (done.returncode, done.stdout) == (0, "report: report.html\n"), done.stderr
    assert [path.name for path in here.iterdir()] == ["report.html"]
    assert [files_of(folder) for folder in folders] == before


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "name one run or more"),
        (["--bogus", "x"], "Unknown command line flag 'bogus'"),
        (["x", "--samples=abc"], "flag --samples=abc"),
    ],
    ids=["nothing", "flag", "value"],
)
def test_a_wrong_command_is_one_line_and_exit_code_2(arguments, message, tmp_path):
    done = run_command(*arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("old", [None, "the page of before"])
def test_a_page_that_fails_halfway_leaves_what_was_there(folder, monkeypatch, old):
    output = folder.parent / "page.html"
    if old:
        output.write_text(old)
    before = files_of(folder.parent)

    def write_half(path, text):
        with path.open("w") as file:
            file.write(text[: len(text) // 2])
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(type(output), "write_text", write_half)
        with pytest.raises(ConfigError, match=f"--output={output} can not be written"):
            report.write_report([folder], output)
    assert files_of(folder.parent) == before
    monkeypatch.setattr(report, "_summary", lambda runs: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        report.write_report([folder], output)
    assert files_of(folder.parent) == before


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="has no /dev/full")
def test_a_full_disk_is_named_and_a_link_stays_one(folder):
    link = folder.parent / "page.html"
    os.symlink("/dev/full", link)
    with pytest.raises(ConfigError, match=f"--output={link} can not be written"):
        report.write_report([folder], link, 0)
    assert os.readlink(link) == "/dev/full"


def test_a_page_behind_a_link_is_written_there(tmp_path):
    there, link = epath.Path(tmp_path) / "there.html", epath.Path(tmp_path) / "link"
    there.write_text("before")
    os.symlink(there, link)
    page.write(link, lambda: "after")
    assert os.readlink(link) == str(there)
    assert there.read_text() == "after"


def test_a_pipe_gets_the_page_and_stays_one(tmp_path):
    path = epath.Path(tmp_path) / "pipe"
    os.mkfifo(path)
    reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    page.write(path, lambda: "all of it")
    assert os.read(reader, 99) == b"all of it"
    os.close(reader)
    assert [found.name for found in path.parent.iterdir()] == ["pipe"]
    assert not os.path.isfile(path)


@pytest.fixture
def pictures_of(tmp_path):
    """A source of two classes with hostile names, a picture of it cut short."""
    rng = np.random.default_rng(0)
    for label in (f"{TAG}bee", f"{TAG}cow"):
        folder = epath.Path(tmp_path) / "pictures" / label
        folder.mkdir(parents=True)
        for i in range(6):
            pixels = rng.integers(0, 256, (40, 30 + 9 * i, 3), np.uint8)
            Image.fromarray(pixels).save(folder / f"{i}.png")
    (folder / "6.png").write_bytes((folder / "5.png").read_bytes()[:999])
    return {"name": "folder", "path": str(tmp_path / "pictures")}


def test_predictions_on_real_pictures_show_what_the_model_says(tmp_path, pictures_of):
    workdir = epath.Path(tmp_path) / f"{TAG}run"
    evals = {
        "own": {"sources": {TAG: pictures_of}, "sides": [64]},
        f"{TAG}also": {"sources": {TAG: pictures_of}, "sides": [64]},
    }
    config = tiny.config(steps=1, data__sources={TAG: pictures_of}, evals=evals)
    config = tiny.change(config, train__bad_images=0.5, **tiny.PLAIN)
    assert train.train(config, workdir) == 0
    text = page_of(workdir)
    page = Tags(text, ("p",))
    (source,), _ = data.open_sources({"own": pictures_of})
    assert len(source) == 13
    shown = np.unique(np.linspace(0, 12, 24 // 2).round().astype(int))
    assert page.found.count("figure") == 2 * len(shown)
    assert page.found.count("img") == 2 * (len(shown) - 1) + 1
    said = "".join(page.text)
    model = navit_jax.load(workdir)
    own = [source[int(i)] for i in shown[:-1]]  # the last is the cut one
    hits = 0
    for values, record in zip(model.predict([r.image for r in own]), own, strict=True):
        (label,), best = record.labels, int(values.argmax())
        hits += label == best
        names = source.class_names[best], source.class_names[label]
        assert said.count(f"{names[0]} {values.max():.2f}{names[1]}") >= 2
    assert text.count("<figure class='right'>") == 2 * hits
    assert text.count("<figure class='wrong'>") == 2 * (len(own) - hits)
    told = f"folder (path={pictures_of['path']})"
    notes = ["Judged by: the run itself; step 1", f"own: {told}", f"{TAG}also: {told}"]
    assert page.inside["p"] == notes


def test_a_picture_that_can_not_be_used_says_why():
    figure = samples._figure(b"", [TAG], BadImage("truncated", TAG), [TAG])
    assert "<script" not in figure
    assert f"can not be used: truncated: {TAG}{TAG}" in "".join(Tags(figure).text)


@pytest.mark.skipif(not shutil.which("chromium"), reason="chromium is not installed")
def test_a_browser_shows_the_page_and_runs_nothing_in_it(folder):
    path = folder.parent / "page.html"
    report.write_report([folder], path)
    shot = folder.parent / "page.png"
    command = [
        *("chromium", "--headless", "--no-sandbox", "--hide-scrollbars", "--dump-dom"),
        *("--window-size=1000,1600", f"--user-data-dir={folder.parent}/profile"),
        *("--enable-logging=stderr", f"--screenshot={shot}", f"file://{path}"),
    ]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=120, check=True
    )
    assert "CONSOLE" not in done.stderr
    assert "<title>run</title>" in done.stdout  # the hostile text would change it
    pixels = np.asarray(Image.open(shot).convert("L"))
    assert pixels.shape == (1600, 1000)
    # Ink from top to bottom, and nothing beyond the right edge of the text.
    assert all((band < 128).any() for band in np.array_split(pixels, 8))
    assert (pixels[:, -4:] > 250).all()


def test_a_folder_without_a_run_is_named(tmp_path):
    with pytest.raises(ConfigError, match="holds no run"):
        report.write_report([epath.Path(tmp_path)], epath.Path(tmp_path) / "page.html")


def test_a_resumed_run_drops_what_it_makes_again_and_survives_a_cut_line(tmp_path):
    workdir = epath.Path(tmp_path)
    first = reporting.MetricWriter(workdir)
    for step in (1, 2, 3):
        first.write(step, {"train/loss": float(step)})
    first.close()
    with (workdir / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "train/lo')
    again = reporting.MetricWriter(workdir, first_step=2)
    again.write(3, {"train/loss": float("nan")})
    again.close()
    steps = [(r["step"], r["train/loss"]) for r in reporting.read_metrics(workdir)]
    assert steps == [(1, 1.0), (2, 2.0), (3, None)]


@pytest.mark.parametrize(
    "seconds, text", [(9.4, "9s"), (185, "3m05s"), (3720, "1h02m"), (float("nan"), "?")]
)
def test_durations_are_read_at_a_glance(seconds, text):
    assert reporting.duration(seconds) == text


def test_the_time_left_leaves_out_what_was_not_steps(monkeypatch):
    times = iter([100.0, 110.0, 150.0])
    monkeypatch.setattr(reporting.time, "monotonic", lambda: next(times))
    clock = reporting.Clock(100)
    assert np.isnan(clock.tick(1)[0])
    assert clock.tick(11) == (10.0, 89.0)  # a second a step
    # 30 of the 40 seconds went into an evaluation.
    assert clock.tick(21, seconds_aside=30.0) == (10.0, 79.0)


def test_the_packing_report_counts_what_a_loop_over_the_rows_counts():
    config = tiny.config()
    stream = experiment.build_stream(config)
    window = stream.plan.plan_window(0, 0)
    kept = [int(n) for r in range(len(window)) for n in window.row(r).kept]
    text = plan.packing_report(stream, config["steps"])
    padding = 1 - sum(kept) / (len(window) * 32)
    assert f"{padding:.2%} of the tokens" in text
    assert f"{len(kept) / len(window):.2f}" in text
    work = sum(n * n for n in kept) / (len(window) * 32**2)
    assert f"{work:.3f} of dense rows" in text


def test_the_picture_of_rows_has_a_bar_for_every_image_and_the_padding():
    figure = pictures.draw_plan([[10, 20], [32]], 32)
    widths = sorted(bar.get_width() for bar in figure.axes[0].patches)
    assert widths == [2, 10, 20, 32]
