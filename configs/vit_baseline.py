"""The plain ViT that NaViT is compared with: one square image a row, the same code.

Source: arXiv 2307.06304, section 3: 224 x 224, inception crop, random flip.
Command: python -m navit_jax.train --config=configs/vit_baseline.py --workdir=RUN
    trains on the embedded set at 64 x 64 in minutes; --config=...:full is the paper's.
Cost: as configs/navit_classification.py at full size (Table 2, ViT columns).
"""

import ml_collections


def get_config(arg: str = ""):
    if arg not in ("", "full"):
        raise ValueError(f"unknown argument {arg!r}; known: full")
    full = arg == "full"
    side, patch = (224, 16) if full else (64, 16)

    config = ml_collections.ConfigDict()
    config.seed = 0
    config.steps = 100_000 if full else 1000

    source = {"name": "tfds", "dataset": "imagenet2012", "split": "train"}
    embedded = {"name": "clipart", "split": "train"}
    config.data = {
        "sources": {"images": source if full else embedded},
        "rows": 4096 if full else 128,
        "tokens": (side // patch) ** 2,
        "slots": 1,
        "num_labels": 1 if full else 3,
        "resolution": {"name": "fixed", "side": side},
        "square": True,
        "crop": {"name": "inception"},
        "flip": 0.5,
    }
    config.model = {
        "name": "navit",
        "size": "B/16" if full else "Ti/16",
        "positions": {"name": "learned_2d", "length": side // patch},
        "pooling": "map",
        "dtype": "bfloat16" if full else "float32",
    }
    config.task = {"name": "classification", "loss_name": "sigmoid"}
    config.optim = {
        "name": "adafactor" if full else "adamw",
        "lr": 8e-4,
        "schedule": {"name": "reciprocal_sqrt", "warmup": 0.1, "cooldown": 0.1},
        "weight_decay": 0.03,
    }
    config.train = {"report_every": 50, "evaluate_every": 0}
    config.checkpoint = {"keep": 2}
    validation = {"name": "clipart", "split": "validation"}
    config.evals = (
        {}
        if full
        else {"validation": {"sources": {"images": validation}, "sides": (64,)}}
    )
    config.lock()
    return config
