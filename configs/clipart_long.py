"""The embedded set, as far as half an hour on two CPU cores takes it.

Source: the method of NaViT (arXiv 2307.06304): sampled resolution, Beta token dropping.
Command: python -m navit_jax.train --config=configs/clipart_long.py --workdir=runs/long
Cost and outcome: docs/results.md.
"""

import ml_collections


def get_config():
    config = ml_collections.ConfigDict()
    config.seed = 0
    config.steps = 2200

    config.data = {
        "sources": {"clipart": {"name": "clipart", "split": "train"}},
        "rows": 16,
        "tokens": 256,
        "slots": 16,
        "num_labels": 3,
        "resolution": {"name": "uniform", "low": 32, "high": 80, "of": "side"},
        "token_drop": {"name": "beta", "mean": 0.3, "maximum": 0.7},
        "crop": {"name": "inception", "area_low": 0.3},
        "flip": 0.5,
        "jitter": 0.4,
    }
    config.model = {
        "name": "navit",
        "size": "Ti/8",
        "depth": 6,
        "positions": {"name": "factorized", "length": 64},
        "pooling": "map",
        "drop_path": 0.1,
    }
    config.task = {"name": "classification", "loss_name": "sigmoid"}
    config.optim = {
        "name": "adamw",
        "lr": 1e-3,
        "schedule": {"name": "cosine", "warmup": 0.1},
        "weight_decay": 0.05,
        "clip": 1.0,
    }
    config.train = {"report_every": 50, "evaluate_every": 550, "ema": 0.99}
    config.checkpoint = {"keep": 2}
    config.evals = {
        "validation": {
            "sources": {"clipart": {"name": "clipart", "split": "validation"}},
            "sides": (48, 64, 80),
        }
    }
    config.lock()
    return config
