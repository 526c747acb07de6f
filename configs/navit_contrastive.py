"""NaViT contrastive image-text training as in the paper (arXiv 2307.06304, 3.1).

Sampled side U(64, R_max), texts cut to 24 tokens and packed beside their images, the
chunked softmax loss over all devices. The paper trains on WebLI, which is not public;
this trains on COCO captions prepared by TFDS (docs/data.md), or on another set named in
a copy of this file.

Command: python -m navit_jax.train --workdir=RUN \\
    --config=configs/navit_contrastive.py:variant=B/16,res=64:256
Cost: not given by the paper, and not run by us at full size.
Expect: the paper's ImageNet zero-shot accuracies are of models trained on WebLI; there
is no number for COCO.

From the paper: side, texts of 24 tokens of a SentencePiece vocabulary (T5's, by its
path in data.text.vocabulary), no text dropping, softmax loss, reciprocal square root
schedule, learning rate 3e-3, decay 1e-6 of all kernels. Ours, where it is silent: the
text tower (of the image tower's size, 12 blocks), the shared width, the temperature's
start (CLIP's), rows, slots, the room for texts, the drop rate (its classification's),
and from the recipe that it follows Adafactor, warmup, time scale, clip.
"""

import re

import ml_collections

ARGUMENT = re.compile(r"variant=\w+/\d+|text=\w+|res=\d+:\d+")


def get_config(arg: str = ""):
    parts = [part for part in arg.split(",") if part]
    for part in parts:
        if not ARGUMENT.fullmatch(part):
            raise ValueError(
                f"argument {part!r} is none of variant=B/16, text=B, res=64:256"
            )
    given = dict(part.split("=") for part in parts)
    variant = given.get("variant", "B/16")
    text = given.get("text", variant.split("/")[0])
    low, high = map(int, given.get("res", "64:256").split(":"))
    patch = int(variant.split("/")[1])
    coco = {
        "name": "tfds",
        "dataset": "coco_captions",
        "label": None,
        "caption": "captions/text",
    }

    config = ml_collections.ConfigDict()
    config.seed = 0
    config.steps = 100_000

    config.data = {
        "sources": {"coco": {**coco, "split": "train"}},
        "rows": 4096,
        "tokens": (high // patch) ** 2,
        "slots": 10,
        "text": {"tokens": 96, "length": 24},
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
    config.task = {
        "name": "contrastive",
        "loss_name": "softmax",
        "width": 768,
        "text": {"size": text, "depth": 12},
        "dtype": "bfloat16",
    }
    config.optim = {
        "name": "adafactor",
        "lr": 3e-3,
        "schedule": {
            "name": "reciprocal_sqrt",
            "timescale": 10_000,
            "warmup": 10_000,
            "cooldown": 10_000,
        },
        "weight_decay": 1e-6,
        "decay": ((r".*kernel", 1.0),),
        "clip": 1.0,
    }
    config.mesh = {"replica": 1, "fsdp": -1, "tensor": 1}
    config.train = {"report_every": 100, "evaluate_every": 10_000, "save_every": 1000}
    config.checkpoint = {"keep": 3, "keep_period": 50_000}
    # COCO's protocol: 5,000 pictures, all captions of each, five or a few more.
    config.evals = {
        "coco": {
            "name": "retrieval",
            "sources": {"coco": {**coco, "split": "val"}},
            "sides": (high // 2, high),
        }
    }
    config.lock()
    return config
