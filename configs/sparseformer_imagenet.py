"""SparseFormer v1 from scratch on ImageNet (arXiv 2304.03768), its public recipe.

A user must have ImageNet prepared by TFDS (docs/data.md) and timm, for RandAugment:
pip install 'navit_jax[augment]'.
Command: python -m navit_jax.train --workdir=RUN \\
    --config=configs/sparseformer_imagenet.py
    or ...py:small, or base; its twin for a laptop is configs/sparseformer_smoke.py.
Cost: the paper's base took about 12 days of an A100, by its authors. Not run by us at
full size. Expect, by the authors' repository: top-1 .810 (tiny), .820, .826.

From the public code: AdamW, 1e-3 for batches of 1024, 20 of 300 epochs of warmup,
cosine to 1 %, clip 5, decay .05 of all but biases, norms and boxes, EMA .9999 (which is
judged), drop path, crop to 224 (8 to 100 % of the area), flip, RandAugment, erasing
.25, mixup .8 or CutMix 1.0 of every image, smoothing .1, each image 3 times in a batch;
gradients of coordinates kept within 1 / side of the map for a mean over 128 images.
Ours: four images share a row and are mixed in it, each by its own draw (theirs: one
draw a batch); pictures are judged whole, made square (theirs: the middle of 256
pixels); the warmup starts at 0; noise that erases is of ImageNet's mean and deviation.
"""

import ml_collections

DROP_PATH = {"tiny": 0.2, "small": 0.3, "base": 0.4}
IMAGES, BATCH = 1_281_167, 1024


def get_config(variant: str = "tiny"):
    if variant not in DROP_PATH:
        raise ValueError(f"{variant!r}: name one of {', '.join(DROP_PATH)}")
    config = ml_collections.ConfigDict()
    config.seed = 0
    config.steps = 300 * IMAGES // BATCH

    imagenet = {"name": "tfds", "dataset": "imagenet2012"}
    config.data = {
        "sources": {"imagenet": {**imagenet, "split": "train"}},
        "rows": BATCH // 4,
        "tokens": 4 * 14**2,
        "slots": 4,
        "resolution": {"name": "fixed", "side": 224},
        "square": True,
        "crop": {"name": "inception", "area_low": 0.08},
        "flip": 0.5,
        "rand_augment": "rand-m9-mstd0.5-inc1",
        "repeats": 3,
        # One batch: that is where the repeats of an image are.
        "window": BATCH,
        "workers": 16,
    }
    config.model = {
        "name": "sparseformer",
        "size": f"v1_{variant}/16",
        "max_side": 14,
        "drop_path": DROP_PATH[variant],
        "gradient_clamp": 128 / BATCH,
        "dtype": "bfloat16",
    }
    config.task = {
        "name": "classification",
        "loss_name": "softmax",
        "label_smoothing": 0.1,
        "mixup": 0.8,
        "cutmix": 1.0,
        "erase": 0.25,
    }
    config.optim = {
        "name": "adamw",
        "lr": 1e-3,
        "schedule": {"name": "cosine", "warmup": 20 / 300, "floor": 0.01},
        "weight_decay": 0.05,
        "decay": ((r"(.*/)?kernel", 1.0), (r"encoder/(.*/)?embedding", 1.0)),
        "clip": 5.0,
    }
    config.mesh = {"replica": 1, "fsdp": -1, "tensor": 1}
    config.train = {
        "ema": 0.9999,
        "report_every": 100,
        "evaluate_every": 12_500,
        "save_every": 1000,
    }
    config.checkpoint = {"keep": 2, "best": "eval/validation_224/accuracy"}
    config.evals = {
        "validation": {
            "sources": {"imagenet": {**imagenet, "split": "validation"}},
            "sides": (224,),
        }
    }
    config.lock()
    return config
