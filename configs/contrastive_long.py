"""The embedded captions, as far as half an hour on two CPU cores takes them.

Source: the method of NaViT (arXiv 2307.06304): sampled resolution, Beta token dropping.
Command: python -m navit_jax.train --config=configs/contrastive_long.py --workdir=RUN
Cost: half an hour, by its step time. Expect: R@5 .31 to .35 on the test split, where
knowing the category gives .25 to .28; intervals in docs/results.md.
"""

import ml_collections


def get_config():
    config = ml_collections.ConfigDict()
    config.seed = 0
    config.steps = 3000

    config.data = {
        "sources": {"clipart": {"name": "clipart", "split": "train", "labels": "none"}},
        "rows": 32,
        "tokens": 128,
        "slots": 16,
        "text": {"tokens": 136, "length": 24},
        "resolution": {"name": "uniform", "low": 48, "high": 96, "of": "side"},
        "token_drop": {"name": "beta", "mean": 0.3, "maximum": 0.7},
        "crop": {"name": "inception", "area_low": 0.4},
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
        "drop_path": 0.1,
    }
    config.task = {
        "name": "contrastive",
        "loss_name": "softmax",
        "width": 128,
        "text": {
            "size": "Ti",
            "width": 128,
            "depth": 2,
            "num_heads": 4,
            "mlp": 512,
            "dropout": 0.1,
        },
    }
    config.optim = {
        "name": "adamw",
        "lr": 1e-3,
        "schedule": {"name": "cosine", "warmup": 0.1},
        "weight_decay": 0.1,
        "clip": 1.0,
    }
    config.train = {"report_every": 50, "evaluate_every": 1000, "ema": 0.998}
    config.checkpoint = {"keep": 2}
    config.evals = {
        "captions": {
            "name": "retrieval",
            "sources": {
                "clipart": {"name": "clipart", "split": "validation", "labels": "none"}
            },
            "sides": (64, 96),
        },
        "classes8": {
            "name": "zero_shot",
            "sources": {"clipart": {"name": "clipart", "split": "validation"}},
            "sides": (64,),
        },
        "classes34": {
            "name": "zero_shot",
            "sources": {
                "clipart": {
                    "name": "clipart",
                    "split": "validation",
                    "labels": "classes34",
                }
            },
            "sides": (64,),
        },
    }
    config.lock()
    return config
