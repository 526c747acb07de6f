"""NaViT classification as in the paper (arXiv 2307.06304, section 3.1, Table 2).

Sampled side U(64, 256), half of the patches dropped, rows of 256 tokens at patch 16.
The paper trains on JFT-4B, which is not public; this trains on ImageNet prepared by
TFDS (docs/data.md), or on another set named in a copy of this file.

Command: python -m navit_jax.train --workdir=RUN \\
    --config=configs/navit_classification.py:variant=B/16,res=64:256
Cost: the paper's B/16 at 9.3e4 steps took 260 TPU hours for 1.8e9 images. Rows of a
batch, about 4,000, are derived from its Table 2. Not run by us at full size.
Expect: the paper has no number for training on ImageNet. Its B/16 of these steps on
JFT-4B has a label-map accuracy on ImageNet of .665, a ViT of equal time .604 (its Table
5, without crop, rows in the order of arXiv v1).

From the paper: side, sigmoid loss, reciprocal square root schedule, learning rate 8e-4,
decay 0.03 and 3.0 for the head; from its Table 2, derived: about half of the patches
are dropped. From the public Scaling-ViT recipe that it follows: Adafactor,
warmup, time scale, clip, head bias -10. Ours: slots, position table, Beta's maximum.
"""

import re

import ml_collections

ARGUMENT = re.compile(r"variant=\w+/\d+|res=\d+:\d+")


def get_config(arg: str = ""):
    parts = [part for part in arg.split(",") if part]
    for part in parts:
        if not ARGUMENT.fullmatch(part):
            raise ValueError(f"argument {part!r} is none of variant=B/16, res=64:256")
    given = dict(part.split("=") for part in parts)
    variant = given.get("variant", "B/16")
    low, high = map(int, given.get("res", "64:256").split(":"))
    patch = int(variant.split("/")[1])

    config = ml_collections.ConfigDict()
    config.seed = 0
    config.steps = 93_000

    config.data = {
        "sources": {
            "imagenet": {"name": "tfds", "dataset": "imagenet2012", "split": "train"}
        },
        "rows": 4096,
        "tokens": (high // patch) ** 2,
        "slots": 10,
        "resolution": {"name": "uniform", "low": low, "high": high, "of": "side"},
        "token_drop": {"name": "beta", "mean": 0.5, "maximum": 0.9},
        "workers": 16,
    }
    config.model = {
        "name": "navit",
        "size": variant,
        "positions": {"name": "factorized", "length": 2 * high // patch},
        "pooling": "map",
        "dtype": "bfloat16",
    }
    config.task = {"name": "classification", "loss_name": "sigmoid", "head_bias": -10.0}
    config.optim = {
        "name": "adafactor",
        "lr": 8e-4,
        "schedule": {
            "name": "reciprocal_sqrt",
            "timescale": 10_000,
            "warmup": 10_000,
            "cooldown": 10_000,
        },
        "weight_decay": 0.03,
        "decay": ((r"head/.*kernel", 100.0), (r".*kernel", 1.0)),
        "clip": 1.0,
    }
    config.mesh = {"replica": 1, "fsdp": -1, "tensor": 1}
    config.train = {"report_every": 100, "evaluate_every": 10_000, "save_every": 1000}
    config.checkpoint = {"keep": 3, "keep_period": 50_000}
    config.evals = {}
    config.lock()
    return config
