import numpy as np
import pytest
import tiny

import navit_jax
from navit_jax import calibration, evaluate, few_shot, linear_probe, train
from navit_jax.data.records import Selection
from navit_jax.data.resolution import Fixed
from navit_jax.data.sizes import size_table
from navit_jax.data.sources import clipart
from navit_jax.errors import ConfigError

SET = {"sources": {"clipart": {"name": "clipart", "split": "validation"}}}


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    config = tiny.config(steps=1, evals={"validation": {**SET, "sides": (32,)}})
    assert train.train(config, folder) == 0
    return folder


@pytest.fixture(scope="module")
def values(workdir):
    return evaluate.evaluate(
        workdir, ["native", 32, 96], [9], upscale=[True, False], shots=[1]
    )


def plain_grid(size, scale):
    return [max(1, int(pixels * scale / 16 + 1e-9)) for pixels in size]


@pytest.mark.parametrize("upscale", [True, False])
@pytest.mark.parametrize("side", [32, 96, "native"])
def test_tokens_and_the_share_of_enlarged_images_are_those_of_a_loop(
    values, side, upscale
):
    tokens, enlarged = [], []
    for height, width in size_table(clipart("validation")).astype(int).tolist():
        scale = 1.0 if side == "native" else side / np.sqrt(height * width)
        enlarged.append(upscale and scale > 1 + 1e-9)
        tokens.append(
            np.prod(plain_grid((height, width), min(scale, 1e9 if upscale else 1)))
        )
    stem = f"eval/validation{'' if upscale else '_no_upscale'}_{side}"
    assert values[f"{stem}/images"] == len(tokens)
    if side != "native":  # there, rows of 32 tokens shrink the larger ones
        assert values[f"{stem}/tokens_per_image"] == pytest.approx(np.mean(tokens))
        assert values[f"{stem}/shrunk"] == 0
    else:
        assert values[f"{stem}/shrunk"] == sum(n > 32 for n in tokens)
    assert values[f"{stem}/upscaled"] == pytest.approx(np.mean(enlarged))
    assert values[f"{stem}/seconds_per_image"] > 0


def test_no_image_takes_more_than_its_budget(values):
    assert 4 < values["eval/validation_9tokens/tokens_per_image"] <= 9


def test_probabilities_are_judged_as_the_predictor_gives_them(values, workdir):
    source = clipart("validation")
    probabilities = navit_jax.load(workdir).predict(source, side=96)
    labels = [source[i].labels for i in range(len(source))]
    targets = np.zeros(probabilities.shape)
    for row, own in zip(targets, labels, strict=True):
        row[list(own)] = 1
    confidence = probabilities.max(1)
    right = targets[np.arange(len(targets)), probabilities.argmax(1)]
    nll = -np.log(np.where(targets, probabilities, 1 - probabilities)).sum(1)
    expected = {
        "accuracy": right.mean(),
        "confidence": confidence.mean(),
        "brier": ((probabilities - targets) ** 2).sum(1).mean(),
        "nll": nll.mean(),
        "loss": nll.mean(),
        "calibration_error": calibration.calibration_error(confidence, right),
        "calibrated_error": calibration.calibrated_error(confidence),
    }
    for name, value in expected.items():
        assert values[f"eval/validation_96/{name}"] == pytest.approx(value, abs=1e-5), (
            name
        )


def test_few_shot_is_least_squares_on_the_embeddings_of_a_few_images(values, workdir):
    model, train_, judged = (
        navit_jax.load(workdir),
        clipart("train"),
        clipart("validation"),
    )
    features = model.embed(judged, side=32)
    accuracies = []
    for seed in range(5):

        def label_of(index):
            own = train_[index].labels
            return own[0] if len(own) == 1 else -1

        shots = linear_probe.choose_shots(label_of, len(train_), 1, 8, seed)
        few = model.embed([train_[int(i)].image for i in shots], side=32)
        targets = np.full((8, 8), -1.0)
        for row, i in zip(targets, shots, strict=True):
            row[train_[int(i)].labels[0]] = 1
        guesses = linear_probe.predict(features, *linear_probe.fit(few, targets))
        right = [g in judged[i].labels for i, g in enumerate(guesses)]
        accuracies.append(np.mean(right))
    stem = "eval/validation_32/1_shot"
    assert values[f"{stem}_accuracy"] == pytest.approx(np.mean(accuracies), abs=1e-2)
    assert values[f"{stem}_std"] == pytest.approx(np.std(accuracies), abs=1e-2)


def test_few_shot_leaves_out_pictures_that_can_not_be_used(workdir):
    model, judged = navit_jax.load(workdir), clipart("validation")

    class Broken(Selection):
        def __getitem__(self, index):
            if index == 3:
                raise OSError
            return super().__getitem__(index)

    broken = Broken(judged, np.arange(8))
    used = few_shot._features(model, broken, Fixed(32), True)[1]
    assert used.tolist() == [0, 1, 2, 4, 5, 6, 7]


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"sides": [513.0 + 16]}, "patches a side, but positions.length=32"),
        ({"shots": [10_000]}, "--shots=10000: class . has"),
    ],
)
def test_what_can_not_be_judged_is_named(workdir, changes, message):
    with pytest.raises(ConfigError, match=message):
        evaluate.evaluate(workdir, **{"sides": [32], **changes})
