import html.parser
import json

import numpy as np
import pytest
import tiny
from etils import epath

from navit_jax import experiment, pictures, plan, report, reporting
from navit_jax.errors import ConfigError

HOSTILE = "<script>alert('x')</script>"


@pytest.fixture
def folder(tmp_path):
    workdir = epath.Path(tmp_path) / "run"
    workdir.mkdir()
    config = tiny.config()
    config["data"]["sources"]["clipart"]["name"] = HOSTILE
    (workdir / "config.json").write_text(json.dumps(config))
    writer = reporting.MetricWriter(workdir)
    for step in (1, 2, 3):
        values = {"train/loss": 3.0 / step, "pack/padding": 0.02, "data/skipped": 0}
        writer.write(step, values)
    values = {"eval/test_64/accuracy": 0.25, "eval/test_32/accuracy": 0.5}
    writer.write(3, {**values, "eval/test_64/accuracy_low": 0.2})
    writer.close()
    judged = {"values": {**values, "baseline/majority/accuracy": 0.125}}
    (workdir / "evaluation.json").write_text(json.dumps(judged))
    stream = experiment.build_stream(tiny.config())
    plan.draw_images(stream, workdir / "rows.png")
    return workdir


class Tags(html.parser.HTMLParser):
    def __init__(self):
        super().__init__()
        self.found, self.text = [], []

    def handle_starttag(self, tag, attributes):
        self.found.append(tag)

    def handle_data(self, data):
        self.text.append(data)


def test_a_report_is_one_page_with_curves_pictures_and_escaped_text(folder):
    page = Tags()
    text = report.write_report(folder).read_text()
    page.feed(text)
    assert page.found.count("svg") == 2  # learning, and accuracy over resolution
    assert page.found.count("img") == 1
    assert "script" not in page.found
    assert HOSTILE in "".join(page.text)
    assert "0.25" in page.text
    assert "0.125" in page.text
    # Self-contained: nothing is fetched.
    assert 'src="http' not in text
    assert "href=" not in text.replace('href="#', "")


def test_a_folder_without_a_run_is_named(tmp_path):
    with pytest.raises(ConfigError, match="holds no run"):
        report.write_report(epath.Path(tmp_path))


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
