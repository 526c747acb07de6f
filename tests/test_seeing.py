"""What a run's SparseFormer looks at is what the report draws and measures."""

import io
import json

import numpy as np
import pytest
import small_sparseformer as small
import tiny
from etils import epath
from test_composites import built  # noqa: F401, a fixture
from test_sparseformer_run import MODEL

import navit_jax
from navit_jax import foreground, look_pictures, predictor, report, seeing, train
from navit_jax.data import composites
from navit_jax.data.bad_image import BadImage
from navit_jax.data.records import Record

SET = {"sources": {"clipart": {"name": "clipart", "split": "test"}}, "sides": (48,)}
RNG = np.random.default_rng(0)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of which images have 4, 2 or 6 tokens by budget."""
    folder = epath.Path(tmp_path_factory.mktemp("runs")) / "run"
    model = {**MODEL, "counts": (4, 2, 6), "allot": "budget", "latents": 24}
    config = tiny.config(steps=1, model=model)
    assert train.train(config, folder) == 0
    # Given afterwards, so that training does not stop to judge.
    judged = {"step": 1, "eval/<b>held out_48/accuracy": 0.5}
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(judged) + "\n")
    evals = {"<b>held out": SET}
    (folder / "config.json").write_text(json.dumps({**config, "evals": evals}))
    return folder


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_each_image_looks_where_its_tokens_of_the_row_look(version):
    model = small.build(version, capture=True, counts=(4, 2, 6), allot="budget",
                        latents=14)  # fmt: skip
    out = small.apply(model)
    ids, counts = np.asarray(out["latent_ids"]), set()
    for row, slot in np.ndindex(out["num_latents"].shape):
        own = np.asarray(out["looks"][row, slot])
        mine = ids[row] == slot + 1
        count = int(mine.sum())
        counts.add(count)
        assert np.isnan(own[:, count:]).all()
        rois = np.asarray(out["rois"])[row][:, mine]
        points = np.asarray(out["points"])[row][:, mine]
        np.testing.assert_array_equal(own[:, :count, :4], rois)
        np.testing.assert_array_equal(own[:, :count, 4:].reshape(points.shape), points)
    assert len(counts - {0}) > 1


@pytest.mark.parametrize(
    "version, shape", [("v1", {}), ("v2", {}), ("v2", {"glimpse": 2})]
)
def test_before_training_every_stage_looks_where_a_start_looks(version, shape):
    model = small.build(version, shape, capture=True)
    out = small.apply(model, params=small.untrained(model))
    first = seeing.start(model, 4)
    real = np.asarray(out["latent_ids"])[0] == 2
    for rois, points in zip(out["rois"][0], out["points"][0], strict=True):
        np.testing.assert_allclose(rois[real], first.rois[0], atol=1e-6)
        np.testing.assert_allclose(points[real], first.points[0], atol=1e-6)


def test_a_page_shows_and_measures_what_a_run_looks_at(run, built, monkeypatch):  # noqa: F811
    asked = []

    def draw(images, looks, *others):
        asked.append((images, looks, *others))
        return look_pictures.pictures.figure(1, 1)

    monkeypatch.setattr(composites, "built_folder", lambda: built)
    monkeypatch.setattr(look_pictures, "draw_looks", draw)
    monkeypatch.setattr(look_pictures, "draw_density", draw)
    monkeypatch.setattr(seeing, "SCENES", 2)
    monkeypatch.setattr(seeing, "POOLED", 7)
    output = run.parent / "page.html"
    report.write_report([run], output)
    text = output.read_text()
    assert "<b>held" not in text
    assert "&lt;b&gt;held out: clipart (split=test)" in text
    assert "not decided by these numbers" in text
    (images, looks), (_, same, every) = asked
    assert [len(images), len(looks), len(same), len(every)] == [4, 4, 4, 7]
    # Numbers of the page, from the model alone.
    model = seeing.watch(navit_jax.load(run))
    scenes = composites.composites("validation", 2, labels="none")
    shares, even = [], []
    for scene in range(2):
        record = scenes[scene]
        (found,) = seeing.look(model, [record])
        mask = record.objects.instances > 0
        shares.append([foreground.share_inside(p, mask) for p in found.points])
        even.append(mask.mean())
    for stage, own in enumerate(np.transpose(shares), 1):
        line = text[text.index(f"<td>stage {stage}</td>") :].split("</td><td>")
        share, lift = (float(cell.split()[0]) for cell in line[1:3])
        # Three digits; 64 x 64 points know an area to some percent.
        np.testing.assert_allclose(share, own.mean(), rtol=5e-3)
        np.testing.assert_allclose(lift, own.sum() / sum(even), rtol=0.05)


def test_without_composites_the_page_says_what_builds_them(run, monkeypatch):
    monkeypatch.setattr(composites, "built_folder", lambda: run / "nowhere")
    model = seeing.watch(navit_jax.load(run))
    told = seeing._show_objects(model, small.build())
    assert "Not measured: no cut-outs in" in told
    assert "python -m navit_jax.data.builders.composites" in told


def test_what_can_not_be_read_is_not_looked_at(run):
    model = seeing.watch(navit_jax.load(run))
    file = io.BytesIO()
    np.save(file, RNG.integers(0, 256, (30, 60, 3), np.uint8))
    record = Record("good", file.getvalue())
    (good,) = seeing.look(model, [record])
    bad, same = seeing.look(model, [Record("bad", b"nothing"), record])
    assert isinstance(bad, BadImage)
    np.testing.assert_allclose(same.rois, good.rois, atol=1e-5)


def test_what_can_not_be_read_is_not_drawn_and_the_others_keep_their_looks(
    monkeypatch,
):
    records = [Record(str(i), bytes([i])) for i in range(6)]
    looks = [foreground.Look(np.full((1, 1, 4), i), np.zeros(0)) for i in range(6)]
    looks[0] = looks[3] = BadImage("empty")
    drawn = []
    monkeypatch.setattr(seeing.data, "open_sources", lambda _: ([records], [1]))
    monkeypatch.setattr(seeing, "look", lambda _, asked: looks)
    monkeypatch.setattr(seeing, "_read", lambda picture: picture[0])
    monkeypatch.setattr(seeing, "_embed", lambda *_: "")
    monkeypatch.setattr(look_pictures, "draw_looks", lambda *a: drawn.append(a))
    monkeypatch.setattr(look_pictures, "draw_density", lambda *a: drawn.append(a))
    model = object.__new__(predictor.Predictor)
    seeing._show_pictures(model, "set", {"sources": {"x": {"name": "x"}}})
    for images, shown, *every in drawn:
        assert images == [1, 2, 4, 5]
        assert [look.rois[0, 0, 0] for look in shown] == images
        assert all(len(found) == 4 for found in every)


def test_each_column_of_the_tables_is_what_it_is_called():
    names = ("even", "centre", "start", "start_area")
    found = {name: np.full(3, 2.0**i) for i, name in enumerate(names)}
    stages = ("inside", "area", "drift", "outside")
    found |= {
        n: np.tile(3.0**i * np.array([1, 5]), (3, 1)) for i, n in enumerate(stages, 1)
    }

    def first(lines):
        return [[cell.split(" (")[0] for cell in line] for line in lines]

    # Of 1, 2 and 4; inside is 3 and 15, start_area 8, then 9, 27 and 81.
    assert first(seeing.list_shares(found)) == [
        ["even grid", "1", "", "", ""],
        ["centre Gaussian", "2", "2", "", ""],
        ["initialisation", "4", "4", "2", ""],
        ["stage 1", "3", "3", "1.5", "0.75"],
        ["stage 2", "15", "15", "7.5", "3.75"],
    ]
    assert first(seeing.list_boxes(found)) == [
        ["initialisation", "8", "", "", ""],
        ["stage 1", "9", "1.12", "27", "81"],
        ["stage 2", "45", "5.62", "135", "405"],
    ]
