"""The smallest real run: a NaViT on the embedded clip art, on a laptop's CPU.

Source: the method of NaViT (arXiv 2307.06304) at the size of a demonstration.
Command: python -m navit_jax.train --config=configs/smoke.py --workdir=runs/demo
Cost: 3 minutes on two cores. Expect: accuracy .45 to .55 on validation, .50 +- .015
over five folds (docs/results.md).
"""

import ml_collections


def get_config():
    config = ml_collections.ConfigDict()
    config.seed = 0
    config.steps = 1200

    config.data = {
        "sources": {"clipart": {"name": "clipart", "split": "train"}},
        "rows": 16,
        "tokens": 128,
        "slots": 10,
        "num_labels": 3,
        "resolution": {"name": "uniform", "low": 48, "high": 96, "of": "side"},
        "token_drop": {"name": "none"},
        "crop": {"name": "inception", "area_low": 0.5},
        "flip": 0.5,
        "jitter": 0.4,
    }
    config.model = {
        "name": "navit",
        "size": "Ti/16",
        "width": 128,
        "depth": 4,
        "num_heads": 4,
        "mlp": 512,
        "positions": {"name": "factorized", "length": 32},
        "pooling": "map",
    }
    config.task = {"name": "classification", "loss_name": "sigmoid"}
    config.optim = {
        "name": "adamw",
        "lr": 1e-3,
        "schedule": {"name": "cosine", "warmup": 0.1},
        "weight_decay": 0.05,
        "clip": 1.0,
    }
    config.train = {"report_every": 50, "evaluate_every": 400}
    config.checkpoint = {"keep": 2}
    config.evals = {
        "validation": {
            "sources": {"clipart": {"name": "clipart", "split": "validation"}},
            "sides": (64, 80, 96),
        }
    }
    config.lock()
    return config
