"""A SparseFormer through the entry points that NaViT goes through, on packed rows."""

import numpy as np
import pytest
import tiny
from etils import epath

import navit_jax
from navit_jax import experiment, reporting, train
from navit_jax.errors import ConfigError

MODEL = {
    "name": "sparseformer",
    "size": "v2_micro/16",
    "shape": {
        "latents": 4, "channels": 8, "points": 4, "focus_width": 16, "width": 32,
        "depth": 1, "repeats": 1, "mlp": 32,
    },
    "counts": (4, 2, 6),
    "allot": "drawn",
    "max_side": 8,
    "remat": "none",
}  # fmt: skip
EVALS = {
    "validation": {
        "sources": {"clipart": {"name": "clipart", "split": "validation"}},
        "sides": (48,),
    }
}


def config(**changes):
    found = tiny.config(steps=2, evals=EVALS, train__report_every=1)
    return tiny.change({**found, "model": {**MODEL, **changes}})


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    assert train.train(config(), folder) == 0
    return folder


def test_a_run_trains_and_is_judged(workdir):
    records = reporting.read_metrics(epath.Path(workdir))
    last = {k: v for r in records for k, v in r.items()}
    assert np.isfinite(last["train/loss"])
    assert last["step"] == 2
    assert last["eval/validation_48/images"] > 100
    assert last["throughput/mfu"] > 0


def test_pictures_of_any_shape_are_predicted_and_embedded(workdir):
    predictor = navit_jax.load(workdir)
    rng = np.random.default_rng(0)
    pictures = [
        rng.integers(0, 256, (*side, 3), np.uint8)
        for side in ((48, 48), (32, 96), (20, 30))
    ]
    together = predictor.predict(pictures, side=48)
    assert together.shape == (3, len(predictor.class_names))
    for picture, expected in zip(pictures, together, strict=True):
        alone = predictor.predict([picture], side=48)[0]
        np.testing.assert_allclose(alone, expected, atol=1e-5)
    assert predictor.embed(pictures, side=48).shape == (3, 32)
    with pytest.raises(ConfigError, match="no tokens of patches"):
        predictor.tokens(pictures, side=48)


def test_flops_are_counted_by_images_and_their_pixels():
    encoder = experiment.build_encoder(config())
    one = encoder.forward_flops(9, 1)
    np.testing.assert_allclose(encoder.forward_flops(18, 2), 2 * one)
    stem = encoder.forward_flops(10, 1) - one
    assert stem == 2 * 8 * 8 * 49 * 3 * 8


def test_dropped_patches_and_models_without_the_size_are_refused():
    given = config()
    given["data"]["token_drop"] = {"name": "constant", "rate": 0.5}
    with pytest.raises(ConfigError, match=r"reads whole pictures; use 'none'"):
        experiment.build_encoder(given)
    with pytest.raises(ConfigError, match=r"config\.model\.num_latent is unknown"):
        experiment.check_sections(config(num_latent=4))
    experiment.check_sections(config())
