import numpy as np
import tiny

from navit_jax import baselines, experiment

TRAIN = np.eye(3, dtype=bool)[[0, 0, 0, 1, 1, 2]]


def test_the_majority_is_that_of_the_training_set_and_any_label_counts():
    test = np.array([[1, 0, 0], [1, 1, 0], [0, 1, 0], [0, 0, 1]], bool)
    assert baselines.majority(TRAIN, test) == 0.5


def test_aspect_alone_tells_classes_apart_that_differ_in_aspect():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 2000)
    aspects = rng.normal(np.where(labels, 1.0, -1.0), 0.7)
    hot = np.eye(2, dtype=bool)[labels]
    found = baselines.aspect_only(
        hot[:1000], aspects[:1000], hot[1000:], aspects[1000:]
    )
    # The best rule is the sign of the aspect.
    best = ((aspects[1000:] > 0) == labels[1000:]).mean()
    assert abs(found - best) < 0.02


def test_the_embedded_classes_have_the_baselines_that_a_loop_gives():
    config = tiny.config()
    section = {
        "sources": {"clipart": {"name": "clipart", "split": "test"}},
        "sides": (48,),
    }
    train = experiment.build_stream(config)
    _, test = next(experiment.build_eval_streams(config, section, "test"))
    found = baselines.pixel_free(train, test)
    source = train.loader.sources[0]
    counts = np.zeros(8)
    for i in range(len(source)):
        for label in source[i].labels:
            counts[label] += 1
    guess, judged = counts.argmax(), test.loader.sources[0]
    right = sum(guess in judged[i].labels for i in range(len(judged)))
    assert found["majority"] == right / len(judged)
    assert found["majority"] < found["aspect_only"] < 0.5
