"""Predicts the pixels of masked patches on the embedded set: a loss for each token.

Source: a use of packed rows the paper names (section 2.2, per-token losses), in the
form of masked autoencoders (He et al. 2022), masked patches staying in the row.
Command: python -m navit_jax.train --config=configs/masked_patches.py --workdir=RUN
Cost: about as configs/smoke.py. Expect the loss, a mean squared error of pixels in
[-1, 1], to fall; it is an example of a task by token, not a result.
"""

import ml_collections


def get_config():
    config = ml_collections.ConfigDict()
    config.seed = 0
    config.steps = 1000

    config.data = {
        "sources": {"clipart": {"name": "clipart", "split": "train", "labels": "none"}},
        "rows": 16,
        "tokens": 128,
        "slots": 12,
        "resolution": {"name": "uniform", "low": 48, "high": 96, "of": "side"},
        "flip": 0.5,
    }
    config.model = {
        "name": "navit",
        "size": "Ti/16",
        "width": 128,
        "depth": 4,
        "num_heads": 4,
        "mlp": 512,
        "positions": {"name": "factorized", "length": 32},
        "pooling": "none",
    }
    config.task = {"name": "masked_patches", "share": 0.5}
    config.optim = {
        "name": "adamw",
        "lr": 1e-3,
        "schedule": {"name": "cosine", "warmup": 0.1},
        "weight_decay": 0.05,
    }
    config.train = {"report_every": 50, "evaluate_every": 0}
    config.checkpoint = {"keep": 2}
    source = {"name": "clipart", "split": "validation", "labels": "none"}
    config.evals = {"validation": {"sources": {"clipart": source}, "sides": (64,)}}
    config.lock()
    return config
