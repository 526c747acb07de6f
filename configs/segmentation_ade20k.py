"""ADE20K with a bootstrapped SparseFormer of 256 tokens at 512 x 512.

Source: arXiv 2312.01987, which reports "51+" mIoU with 256 tokens at 512 x 512; that is
all of it that we know. The 256 tokens, the side and the pretrained encoder are the
paper's. The protocol is the customary one of this data set with ViTs, from memory and
not from the paper: 160,000 steps of 16 crops, AdamW at 6e-5, decay .01, 1,500 steps of
warmup, then linear to 0. Ours: the readout (no UperNet), its hidden layer, patches cut
into 4 x 4 parts, the crop (25 to 100 % of the area, made square), the head's rate.

A user must have the 150 classes of MIT's scene parsing, as TFDS prepares them (22,210
pictures, of which 2,000 are for validation; docs/data.md), and weights:
  tfds build scene_parse150 --file_format=array_record
  an official SparseFormer, converted (docs/weights.md), or a run of
  configs/sparseformer_bootstrap.py
Command: python -m navit_jax.train --workdir=RUN \\
    --config=configs/segmentation_ade20k.py:weights=FILE
    or ...py:run=FOLDER; and model=v2_augreg_b for another than v2_augreg_l, or
    model=navit for a NaViT, whose head is linear.
Not run by us, at any size: no such data here. Pictures are judged whole, in their own
aspect, as many pixels as 512 x 512, against masks of that size: the usual figure is of
masks of the files' own sizes.
"""

import ml_collections

MODELS = ("v2_augreg_b", "v2_augreg_l", "v2_clip_b", "navit")
SIDE, TOKENS, STEPS, WARMUP = 512, 256, 160_000, 1_500


def get_config(arg: str = ""):
    asked = dict(part.split("=", 1) for part in arg.split(",") if part)
    name = asked.pop("model", "v2_augreg_l")
    init = {"weights": asked.pop("weights", ""), "workdir": asked.pop("run", "")}
    if asked or name not in MODELS:
        raise ValueError(
            f"unknown {sorted(asked) or name!r}; known: weights=FILE, run=FOLDER, "
            f"model= one of {', '.join(MODELS)}"
        )
    config = ml_collections.ConfigDict()
    config.seed = 0
    config.steps = STEPS

    scenes = {
        "name": "tfds",
        "dataset": "scene_parse150",
        "label": None,
        "mask": "annotation",
        "num_classes": 150,
    }
    config.data = {
        "sources": {"ade20k": {**scenes, "split": "train"}},
        "rows": 16,
        "tokens": (SIDE // 16) ** 2,
        "slots": 1,
        "resolution": {"name": "fixed", "side": SIDE},
        "square": True,
        "crop": {"name": "inception", "area_low": 0.25},
        "flip": 0.5,
        "num_labels": 0,
        "pixel_classes": True,
        "workers": 16,
    }
    config.model = {
        "name": "sparseformer",
        "size": f"{name}/16",
        "counts": (TOKENS,),
        "max_side": 2 * SIDE // 16,
        "gradient_clamp": 128 / 16,
        "drop_path": 0.1,
        "dtype": "bfloat16",
    }
    config.task = {
        "name": "segmentation",
        # Pixels of none of the 150 classes are neither learned nor judged.
        "background": False,
        "cells": 4,
        "hidden": 512,
    }
    if name == "navit":
        config.model = {
            "name": "navit",
            "size": "B/16",
            "positions": {"name": "factorized", "length": 2 * SIDE // 16},
            "pooling": "none",
            "drop_path": 0.1,
            "dtype": "bfloat16",
        }
        config.task["hidden"] = 0
    if any(init.values()):
        config.model["init"] = {
            **{key: value for key, value in init.items() if value},
            "rules": [(r"encoder/(.*)", r"encoder/\1")],
            "allow_unused": (r"(head|image_head|teacher)/.*", r"encoder/pool/.*"),
        }
    config.optim = {
        "name": "adamw",
        "lr": 6e-5,
        "schedule": {
            "name": "constant",
            "warmup": WARMUP,
            "cooldown": STEPS - WARMUP,
        },
        "weight_decay": 0.01,
        "lr_multipliers": ((r"(?!encoder/).*", 10.0),),
        "clip": 1.0,
    }
    config.mesh = {"replica": 1, "fsdp": -1, "tensor": 1}
    config.train = {"report_every": 100, "evaluate_every": 16_000, "save_every": 2000}
    config.checkpoint = {"keep": 2}
    config.evals = {
        "validation": {
            "name": "segmentation",
            "sources": {"ade20k": {**scenes, "split": "validation"}},
            "sides": (SIDE,),
            "square": False,
            "by_class": False,
        }
    }
    config.lock()
    return config
