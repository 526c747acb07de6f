"""The report of a two-tower run: what captions find, and what pictures find."""

import json

import numpy as np
import pytest
import tiny
from etils import epath
from PIL import Image
from test_report import TAG, Tags, files_of, page_of

import navit_jax
from navit_jax import gallery, train

# Equal but for case and blanks are those of 0 and 3; 5 is a cut file, 6 says nothing.
CAPTIONS = [
    [f"{TAG} red card"],
    ["a dog", "the moon"],
    ["cat"],
    [f"{TAG}  Red Card "],
    ["a cat and a dog"],
    ["cut"],
    [" "],
    ["the sun"],
    ["stars"],
    ["a house"],
]
CUT, BLANK = 5, 6
WHOLE = [i for i in range(len(CAPTIONS)) if i not in (CUT, BLANK)]
ASKED = 200  # so that every question is


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    folder = epath.Path(tmp_path_factory.mktemp("pairs"))
    rng = np.random.default_rng(0)
    for i in range(len(CAPTIONS)):
        (folder / f"class{i % 2}").mkdir(exist_ok=True)
        pixels = rng.integers(0, 256, (40, 30 + 9 * i, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"class{i % 2}" / f"{i}.png")
    cut = folder / f"class{CUT % 2}" / f"{CUT}.png"
    cut.write_bytes(cut.read_bytes()[:999])
    captions = epath.Path(tmp_path_factory.mktemp("captions")) / "captions.jsonl"
    captions.write_text(
        "\n".join(
            json.dumps({"file": f"class{i % 2}/{i}.png", "captions": own})
            for i, own in enumerate(CAPTIONS)
        )
    )
    source = {"name": "folder", "path": str(folder)}
    pairs = {**source, "captions": str(captions), "labels": False}
    evals = {
        TAG: {"name": "retrieval", "sources": {TAG: pairs}, "sides": (64,)},
        "kinds": {
            "name": "zero_shot",
            "sources": {TAG: source},
            "sides": (64,),
            "templates": ["{}", "a drawing of {}"],
            "names": ["moon", f"{TAG}sun"],
        },
        "own": {"sources": {TAG: pairs}, "sides": (64,)},
    }
    # What is compiled is that of `test_two_tower_predictor.py`, and compiled once.
    text = {"tokens": 48, "length": 16}
    config = tiny.contrastive(steps=1, data__sources={TAG: pairs}, data__text=text)
    config["train"]["bad_images"] = 0.9
    run = epath.Path(tmp_path_factory.mktemp("run")) / "run"
    assert train.train(config, run) == 0
    # Given afterwards, so that training does not stop to judge.
    (run / "config.json").write_text(json.dumps({**config, "evals": evals}))
    return run


@pytest.fixture(scope="module")
def model(workdir):
    return navit_jax.load(workdir)


def read(model, name):
    """The pictures of an eval set by the number of their file."""
    (source,), _ = navit_jax.data.open_sources(model.config["evals"][name]["sources"])
    records = [source[i] for i in range(len(source))]
    return {int(r.key.split("/")[-1].split(".")[0]): r.image for r in records}


def equal(one, other):
    return one.casefold().split() == other.casefold().split()


def test_each_caption_and_picture_shows_the_best_that_is_found(model, monkeypatch):
    monkeypatch.setattr(gallery.page, "thumbnail", lambda picture: f"[{len(picture)}]")
    by_caption, by_picture = gallery.show_gallery(
        model, model.config["evals"], ASKED
    ).values()
    # The second way: cosines of all, captions compared one by one.
    images = read(model, TAG)
    assert len({len(image) for image in images.values()}) == len(images)
    texts = []
    for i in WHOLE:
        texts += [t for t in CAPTIONS[i] if not any(equal(t, old) for old in texts)]
    cosines = model.similarity([images[i] for i in WHOLE], texts)
    right = np.array(
        [[any(equal(t, own) for own in CAPTIONS[i]) for t in texts] for i in WHOLE]
    )
    assert f"{len(WHOLE)} pictures and {len(texts)} captions" in by_caption
    questions = by_caption.split("<div class='asked'>")[1:]
    assert len(questions) == len(texts)
    for question in questions:
        told = "".join(Tags(question).text)
        (u,) = [u for u, text in enumerate(texts) if told.startswith(text)]
        best = np.argsort(-cosines[:, u])
        place = 1 + right[best, u].argmax()
        shown = [f"[{len(images[WHOLE[i]])}]{cosines[i, u]:.2f}" for i in best[:5]]
        assert told == f"{texts[u]}the right one: {place} of {len(WHOLE)}" + "".join(
            shown
        )
        marks = [part.split("'")[0] for part in question.split("<figure class='")[1:]]
        assert marks == ["right" if right[i, u] else "wrong" for i in best[:5]]
    questions = by_picture.split("<div class='asked'>")[1:]
    assert len(questions) == len(WHOLE)
    for question in questions:
        told = "".join(Tags(question).text)
        (m,) = [m for m, i in enumerate(WHOLE) if f"[{len(images[i])}]" in told]
        best = np.argsort(-cosines[m])
        shown = "".join(f"{texts[u]} {cosines[m, u]:.2f}" for u in best[:5])
        place = 1 + right[m, best].argmax()
        assert told.endswith(f"the right one: {place} of {len(texts)}{shown}")
        marks = [part.split("'")[0] for part in question.split("<li class='")[1:]]
        assert marks == ["right" if right[m, u] else "wrong" for u in best[:5]]


def test_questions_are_spread_evenly_and_shared_by_the_sets(model, monkeypatch):
    evals = model.config["evals"]
    twice = {**evals, "again": evals[TAG]}
    for num, each in ((8, 2), (1, 1)):
        for content in gallery.show_gallery(model, twice, num).values():
            assert content.count("class='asked'") == 2 * each
    monkeypatch.setattr(gallery, "MOST", 3)  # 0, 4 (of 4.5), 9: all can be used
    for content in gallery.show_gallery(model, evals, ASKED).values():
        assert "3 pictures and 3 captions" in content
        assert content.count("class='asked'") == 3
    assert not any(gallery.show_gallery(model, {"own": evals["own"]}, 8).values())


def test_the_page_of_a_two_tower_run_has_a_gallery_and_predictions_by_name(
    workdir, model
):
    before = files_of(workdir)
    text = page_of(workdir)
    assert files_of(workdir) == before  # a folder that can not be written to will do
    page = Tags(text, ("h2", "p"))
    kinds = ["Captions and the pictures found", "Pictures and the captions found"]
    places = [page.inside["h2"].index(title) for title in [*kinds, "Predictions"]]
    assert places == sorted(places)
    # Neither a set that is judged by the loss nor one that was cut fails the page.
    (told,) = [p for p in page.inside["p"] if p.startswith(("kinds", "own"))]
    assert told.startswith("kinds, by what its classes are called: folder (path=")
    said = text[text.index("<h2>Predictions") :].split("<h2>Commands")[0]
    images = read(model, "kinds")
    whole = [i for i in images if i != CUT]
    names = ["moon", f"{TAG}sun"]
    found = model.zero_shot(
        [images[i] for i in whole], names, ["{}", "a drawing of {}"]
    )
    told = "".join(Tags(said).text)
    hits = 0
    for i, values in zip(whole, found, strict=True):
        best = int(values.argmax())
        hits += best == i % 2
        assert f"{names[best]} {values.max():.2f}{names[i % 2]}" in told
    assert said.count("<figure class='right'>") == hits
    assert said.count("<figure class='wrong'>") == len(whole) - hits
    assert "can not be used: truncated" in told
    whole_page = "".join(page.text)
    assert "padding of its texts" in whole_page
    assert "navit_jax.evaluate" in whole_page
    assert "navit_jax.predict" not in whole_page  # it would refuse this run
