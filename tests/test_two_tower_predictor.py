"""A two-tower run judges and compares pictures and texts, wherever its folder is."""

import dataclasses
import functools
import json
import re
import shutil

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
import tiny
from etils import epath

import navit_jax
from navit_jax import (
    evaluate,
    experiment,
    judges,
    predictor,
    run_folder,
    sharding,
    train,
)
from navit_jax.data.sources import clipart
from navit_jax.data.tokenizer import DEFAULT, open_tokenizer
from navit_jax.errors import ConfigError
from navit_jax.text_embedder import TextEmbedder

TEXTS = [
    "a dog",
    "card, simple",
    "the moon and the stars in the night sky above",
    "cat",
]
PICTURES = {"name": "clipart", "split": "validation"}
EVALS = {
    "pairs": {
        "name": "retrieval",
        "sources": {"clipart": {**PICTURES, "labels": "none"}},
        "sides": (32, 48),
    },
    "kinds": {
        "name": "zero_shot",
        "sources": {"clipart": {**PICTURES, "labels": "classes34"}},
        "sides": (32,),
        "templates": ["{}", "a drawing of {}"],
    },
    "groups": {
        "name": "zero_shot",
        "sources": {"clipart": {**PICTURES, "labels": "classes8"}},
        "sides": (32,),
    },
    "own": {"sources": {"clipart": {**PICTURES, "labels": "none"}}, "sides": (32,)},
}


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """A run that was moved since, and whose vocabulary is no longer where it was."""
    folder = tmp_path_factory.mktemp("run")
    vocabulary = folder / "mine.model"
    shutil.copy(DEFAULT, vocabulary)
    text = {"tokens": 48, "length": 16, "vocabulary": str(vocabulary)}
    config = tiny.contrastive(steps=1, data__text=text, evals=EVALS)
    assert train.train(config, folder / "before") == 0
    vocabulary.unlink()
    (folder / "before").rename(folder / "after")
    return folder / "after"


@pytest.fixture(scope="module")
def model(workdir):
    return navit_jax.load(workdir)


EMBEDDED, READ = [], []


@pytest.fixture(scope="module")
def values(workdir):
    """What an evaluation finds.

    The number of texts in each call is EMBEDDED, READ the sources searched for names.
    """
    embed, read_captions = TextEmbedder.embed, judges.read_captions
    # Made again, where a worker takes tests of this file a second time.
    EMBEDDED.clear()
    READ.clear()

    def note(self, params, texts):
        EMBEDDED.append(len(texts))
        return embed(self, params, texts)

    def search(sources):
        READ.extend(map(len, sources))
        return read_captions(sources)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TextEmbedder, "embed", note)
        patch.setattr(judges, "read_captions", search)
        return evaluate.evaluate(workdir, baselines=True)


@pytest.fixture
def as_users_call(monkeypatch):
    """Without the types that the tests check at every call."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


@pytest.fixture(scope="module")
def pictures():
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, (h, w, 3), np.uint8) for h, w in [(32, 48), (60, 33)]]


def test_a_text_is_what_the_tower_gives_it_alone(model):
    tokenizer = open_tokenizer(length=16)
    found = model.embed_text(TEXTS * 40)
    embed = jax.jit(functools.partial(model.task.embed_text, num_slots=1))
    for place, text in enumerate(TEXTS):
        ids = tokenizer.encode(text)
        padded = np.resize(ids, 16)[None]
        segments = (np.arange(16) < len(ids)).astype(np.int32)[None]
        coords = np.arange(16, dtype=np.int32)[None, :, None]
        alone = embed(model.params, padded, coords, segments)[0, 0]
        for copy in found[place :: len(TEXTS)]:
            np.testing.assert_allclose(copy, alone, atol=2e-6)
    assert np.ptp(found[: len(TEXTS)], axis=0).max() > 1e-3
    assert model.embed_text([]).shape == (0, 16)


def test_a_picture_is_its_pooled_vector_in_the_shared_space(model, pictures):
    law = model.law(48)
    pooled = {r.place: r.value for r in model.results("pooled", pictures, law)}
    heads = np.float64(model.params["image_head"]["kernel"])
    expected = np.stack([np.float64(pooled[i]) @ heads for i in range(len(pictures))])
    expected /= np.sqrt((expected**2).sum(1, keepdims=True))
    images = model.embed(pictures, side=48)
    np.testing.assert_allclose(images, expected, atol=1e-5)
    assert model.embed([]).shape == (0, 16)
    found = model.similarity(pictures, TEXTS, side=48)
    texts = model.embed_text(TEXTS)
    for i, text in np.ndindex(found.shape):
        cosine = sum(np.float64(images[i]) * texts[text])
        assert found[i, text] == pytest.approx(cosine, abs=1e-6)


@pytest.mark.parametrize("loss", ["softmax", "sigmoid"])
def test_zero_shot_is_what_the_loss_makes_of_scale_times_cosine(model, pictures, loss):
    names, templates = ["dog", "card"], ["a {}", "{}"]
    config = {**model.config, "task": {**model.config["task"], "loss_name": loss}}
    params = {**model.params, "log_scale": jnp.log(jnp.float32(3))}
    if loss == "sigmoid":
        params["bias"] = jnp.float32(-0.5)
    task = experiment.build_task(config, 0)
    model = dataclasses.replace(model, config=config, task=task, params=params)
    found = model.zero_shot(pictures, names, templates, side=48)
    prompts = model.embed_text(["a dog", "dog", "a card", "card"]).astype(np.float64)
    classes = prompts[::2] + prompts[1::2]
    classes /= np.linalg.norm(classes, axis=1, keepdims=True)
    logits = 3 * model.embed(pictures, side=48) @ classes.T
    if loss == "softmax":
        expected = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    else:
        expected = 1 / (1 + np.exp(0.5 - logits))
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize(
    "texts, message",
    [
        ("a dog", "texts='a dog': give a list"),
        (["a dog", 3], re.escape("texts[1]=3, int: give a list of texts")),
        ([None], re.escape("texts[0]=None, NoneType: give a list of texts")),
        (None, "texts=.None.: give a list of texts"),
        (["a dog", " \t"], re.escape(r"texts[1]=' \t' can not be used")),
    ],
)
def test_a_text_that_is_none_is_named(model, texts, message, as_users_call):
    with pytest.raises(ValueError, match=message):
        model.embed_text(texts)


def test_a_run_without_texts_says_so(pictures):
    config, mesh = tiny.config(), sharding.make_mesh()
    task = experiment.build_task(config, 8)
    plain = predictor.Predictor(config, [*"abcdefgh"], task, {}, 0, mesh)
    for ask in (
        lambda: plain.embed_text(TEXTS),
        lambda: plain.similarity(pictures, TEXTS),
        lambda: plain.zero_shot(pictures, TEXTS),
    ):
        with pytest.raises(ConfigError, match=r"'classification' .* has no text tower"):
            ask()


def rank(scores, right):
    """How many that are wrong come before the best that is right."""
    best = max(scores[i] for i in right)
    return sum(score > best for i, score in enumerate(scores) if i not in right)


@pytest.mark.parametrize("side", [32, 48])
def test_retrieval_is_judged_by_the_vectors_that_the_model_gives(values, model, side):
    source = clipart("validation", "none")
    captions = [source[i].captions[0] for i in range(len(source))]
    distinct = sorted(set(captions))
    images = model.embed(source, side=side)
    scores = images @ model.embed_text(distinct).T
    to_text = [
        rank(row, {distinct.index(c)}) for row, c in zip(scores, captions, strict=True)
    ]
    to_image = [
        rank(
            scores[:, distinct.index(c)], {i for i, d in enumerate(captions) if d == c}
        )
        for c in captions
    ]
    for k in (1, 5, 10):
        for name, ranks in (("image_to_text", to_text), ("text_to_image", to_image)):
            expected = np.mean(np.array(ranks) < k)
            # Packed otherwise: two scores may change places by rounding.
            key = f"eval/pairs_{side}/{name}_r{k}"
            assert values[key] == pytest.approx(expected, abs=2.01 / len(source))
            assert values[f"{key}_low"] <= values[key] <= values[f"{key}_high"]
    assert values[f"eval/pairs_{side}/captions"] == len(source)


def test_zero_shot_is_judged_by_the_probabilities_that_the_model_gives(values, model):
    source = clipart("validation", "classes34")
    names = [name.split("/")[-1].replace("_", " ") for name in source.class_names]
    found = model.zero_shot(source, names, EVALS["kinds"]["templates"], side=32)
    labels = [source[i].labels for i in range(len(source))]
    right = [row.argmax() in own for row, own in zip(found, labels, strict=True)]
    accuracy = values["eval/kinds_32/accuracy"]
    assert accuracy == pytest.approx(np.mean(right), abs=2.01 / len(source))
    trained = clipart("train", "none")
    captions = [trained[i].captions[0] for i in range(len(trained))]
    absent = {
        c
        for c, name in enumerate(names)
        if not any(re.search(rf"\b{name}\b", caption) for caption in captions)
    }
    assert 0 < len(absent) < len(names)
    number = sum(set(own) <= absent for own in labels)
    assert values["eval/kinds_32/absent"] == number
    # For both sets.
    assert [len(trained)] == READ


def test_a_run_is_judged_as_it_was_while_it_trained(values, workdir):
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    told = json.loads(lines[-1])
    for name in ("pairs_48/image_to_text_r5", "kinds_32/accuracy", "own_32/loss"):
        assert told[f"eval/{name}"] == pytest.approx(values[f"eval/{name}"], abs=0.01)


def test_the_baselines_are_those_of_all_pictures_with_a_caption(values):
    names = [name for name in values if name.startswith("baseline/")]
    assert {name.split("/")[1] for name in names} == {"pairs"}
    captions = {clipart("validation", "none")[i].captions for i in range(332)}
    chance = values["baseline/pairs/chance/image_to_text_r5"]
    assert chance == pytest.approx(5 / len(captions))
    assert values["baseline/pairs/top_category/image_to_text_r5"] > 10 * chance
    table = evaluate.format_table(values)
    assert "image to text R@1" in table
    assert re.search(r"pairs_32 .*\(0\.\d\d\d \.\. 0\.\d\d\d\)", table)


def test_texts_are_embedded_once_for_all_resolutions(values):
    assert {"eval/pairs_32/images", "eval/pairs_48/images"} <= values.keys()
    assert EMBEDDED == [298, 2 * 34, 8]


def test_shots_need_classes(workdir):
    with pytest.raises(ConfigError, match="--shots: the run has no classes"):
        evaluate.evaluate(workdir, shots=[1])


def test_the_vocabulary_of_a_run_is_kept_and_another_one_refused(workdir, tmp_path):
    assert (workdir / "vocabulary").read_bytes() == DEFAULT.read_bytes()
    folder = epath.Path(tmp_path)
    tokenizer = open_tokenizer()
    run_folder.store_vocabulary(folder, None)
    assert not (folder / "vocabulary").exists()
    run_folder.store_vocabulary(folder, tokenizer)
    (folder / "checkpoints" / "4").mkdir(parents=True)
    run_folder.store_vocabulary(folder, tokenizer)
    (folder / "vocabulary").write_bytes(b"another")
    with pytest.raises(ConfigError, match="with which the run has begun"):
        run_folder.store_vocabulary(folder, tokenizer)
