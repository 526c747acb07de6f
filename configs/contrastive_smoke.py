"""The smallest contrastive run: two packed towers on the embedded clip art, on a CPU.

Source: the method of NaViT (arXiv 2307.06304) at the size of a demonstration.
Command: python -m navit_jax.train --config=configs/contrastive_smoke.py --workdir=RUN
Cost: 4 minutes on two cores. Expect: R@5 .25 on the test split, both ways, where chance
is .02; intervals in docs/results.md.
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
        "slots": 10,
        "text": {"tokens": 104, "length": 24},
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
    config.task = {
        "name": "contrastive",
        "loss_name": "softmax",
        "width": 128,
        "text": {"size": "Ti", "width": 128, "depth": 2, "num_heads": 4, "mlp": 512},
    }
    config.optim = {
        "name": "adamw",
        "lr": 1e-3,
        "schedule": {"name": "cosine", "warmup": 0.1},
        "weight_decay": 0.05,
        "clip": 1.0,
    }
    config.train = {"report_every": 50, "evaluate_every": 500}
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
