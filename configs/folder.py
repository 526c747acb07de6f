"""Your own pictures: a folder with a sub-folder for each class.

Source: the method of NaViT (arXiv 2307.06304), at a size for a CPU or one small GPU.
Command: python -m navit_jax.train --config=configs/folder.py:/path/to/pictures \\
    --workdir=runs/mine
Cost: 1.7 times the tokens of configs/smoke.py; `model`, `resolution` and `steps` are
what to raise. Expect: what the pictures allow, judged on those of the sub-folder
`validation` (or `val`) if there is one beside `train`, else on a tenth (docs/data.md).
"""

import ml_collections


def get_config(path: str = ""):
    if not path:
        raise ValueError(
            "name the folder: --config=configs/folder.py:/path/to/pictures"
        )
    pictures = {"name": "folder", "path": path}

    config = ml_collections.ConfigDict()
    config.seed = 0
    config.steps = 1000

    config.data = {
        "sources": {"pictures": {**pictures, "split": "train"}},
        "rows": 16,
        "tokens": 256,
        "slots": 16,
        "resolution": {"name": "uniform", "low": 64, "high": 160, "of": "side"},
        "token_drop": {"name": "beta", "mean": 0.3, "maximum": 0.7},
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
        "positions": {"name": "factorized", "length": 64},
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
    config.train = {"report_every": 50, "evaluate_every": 250, "save_every": 250}
    config.checkpoint = {"keep": 2}
    held_out = {"pictures": {**pictures, "split": "validation"}}
    config.evals = {"validation": {"sources": held_out, "sides": (96, 128)}}
    config.lock()
    return config
