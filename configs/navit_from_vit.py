"""A pretrained ViT of one square size becomes a NaViT: packed pictures of any shape.

Source: ViT-S/14 (DINOv2 architecture, saliency-tuned), `python -m
navit_jax.weights.fetch vit_s14`; docs/weights.md. Its positions are resampled to the
grid of each picture, so no picture is cropped to a square.
Command: python -m navit_jax.train --config=configs/navit_from_vit.py --workdir=runs/vit
    and, without pretraining, --config=configs/navit_from_vit.py:scratch
Cost: 22 million parameters on 49 patches a picture, 20 pictures a step: 4 to 7 minutes
on two cores. Expect: test accuracy .485 at 98 px, .285 from scratch (docs/weights.md).
"""

import ml_collections


def get_config(start: str = "pretrained"):
    if start not in ("pretrained", "scratch"):
        raise ValueError(f"{start!r}: name 'pretrained' or 'scratch'")
    config = ml_collections.ConfigDict()
    config.seed = 0
    config.steps = 200

    config.data = {
        "sources": {"clipart": {"name": "clipart", "split": "train"}},
        "rows": 4,
        "tokens": 256,
        "slots": 12,
        "num_labels": 3,
        "resolution": {"name": "uniform", "low": 70, "high": 126, "of": "side"},
        "token_drop": {"name": "none"},
        "crop": {"name": "inception", "area_low": 0.5},
        "flip": 0.5,
        "jitter": 0.4,
    }
    # As `python -m navit_jax.weights inspect vit_s14` prints it, but for the pool,
    # whose linear probe is no worse: docs/bootstrapping.md.
    config.model = {
        "name": "navit",
        "size": "S/14",
        "positions": {
            "name": "learned_1d",
            "side": 37,
            "length": 64,
            "filter": "bicubic",
        },
        "pooling": "mean",
        "bias_qkv": True,
        "bias_ln": True,
        "class_token": True,
        "qk_norm": False,
        "activation": "gelu",
        "layer_scale": 1.0,
        "pixel_mean": (0.485, 0.456, 0.406),
        "pixel_std": (0.229, 0.224, 0.225),
    }
    config.task = {"name": "classification", "loss_name": "sigmoid"}
    config.optim = {
        "name": "adamw",
        "lr": 1e-3,
        "schedule": {"name": "cosine", "warmup": 0.1},
        "weight_decay": 0.05,
        "clip": 1.0,
    }
    if start == "pretrained":
        config.model["init"] = {"weights": "vit_s14"}
        # What has been learned moves slowly; the head starts from nothing.
        config.optim["lr_multipliers"] = ((r"encoder/.*", 0.05),)
    config.train = {"report_every": 10, "evaluate_every": 100, "save_every": 1000}
    config.checkpoint = {"keep": 1}
    config.evals = {
        "validation": {
            "sources": {"clipart": {"name": "clipart", "split": "validation"}},
            "sides": (98,),
        }
    }
    config.lock()
    return config
