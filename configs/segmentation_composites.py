"""Learns the masks of clip art on photographs, on a laptop's CPU.

Source: the readout of latent tokens (navit_jax/models/readout.py), which is ours, on
composed scenes whose every pixel is known: 8 classes and the background, objects of 20
to 50 % of the side.
Data: python -m navit_jax.data.builders.composites
Command: python -m navit_jax.train --workdir=RUN \\
    --config=configs/segmentation_composites.py
    from scratch, a SparseFormer of 36 tokens for 8 x 8 patches; ...py:navit is a NaViT
    of the same width with a linear head.
Cost: 10 minutes on two cores, 4 for the NaViT, both beside other work. Mean IoU of 300
validation scenes .186, and .174 of the NaViT; who guesses background everywhere, 87 %
of the pixels, has .87 / 9 = .10. Buildings, plants, recreation, tools are not learned.
"""

import ml_collections


def get_config(arg: str = ""):
    if arg not in ("", "navit"):
        raise ValueError(f"unknown argument {arg!r}; known: navit")
    config = ml_collections.ConfigDict()
    config.seed = 0
    config.steps = 1500

    scenes = {"name": "composites", "labels": "classes8", "side": (96, 320)}
    config.data = {
        "sources": {"scenes": {**scenes, "split": "train", "count": 20_000}},
        "rows": 4,
        "tokens": 4 * 8**2,
        "slots": 4,
        "resolution": {"name": "fixed", "side": 128},
        "square": True,
        "flip": 0.5,
        "num_labels": 0,
        "pixel_classes": True,
    }
    if arg:
        config.model = {
            "name": "navit",
            "size": "Ti/16",
            "width": 128,
            "depth": 4,
            "num_heads": 4,
            "mlp": 512,
            "positions": {"name": "factorized", "length": 8},
            "pooling": "none",
        }
    else:
        config.model = {
            "name": "sparseformer",
            "size": "v1_micro/16",
            "shape": {"latents": 36},
            "max_side": 8,
            "gradient_clamp": 8.0,
        }
    config.task = {"name": "segmentation", "cells": 4, "hidden": 0 if arg else 256}
    config.optim = {
        "name": "adamw",
        "lr": 1e-3,
        "schedule": {"name": "cosine", "warmup": 0.05, "floor": 0.01},
        "weight_decay": 0.05,
        "clip": 1.0,
    }
    config.train = {"report_every": 50, "evaluate_every": 500}
    config.checkpoint = {"keep": 1}
    validation = {**scenes, "split": "validation", "count": 300}
    config.evals = {
        "validation": {
            "name": "segmentation",
            "sources": {"scenes": validation},
            "sides": (128,),
        }
    }
    config.lock()
    return config
