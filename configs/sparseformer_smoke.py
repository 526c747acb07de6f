"""The recipe of configs/sparseformer_imagenet.py on the embedded classes, on a CPU.

Source: SparseFormer v1 (arXiv 2304.03768) at the size of a demonstration, `v1_micro`;
without RandAugment, which needs timm (--config.data.rand_augment=rand-m9-mstd0.5-inc1).
Command: python -m navit_jax.train --config=configs/sparseformer_smoke.py --workdir=RUN
Cost: 4 min 33 s on two cores beside other work. 192 validation pictures: .41, test .375
(.288 .. .474); always the commonest class .260, the aspect alone .365.
"""

import ml_collections


def get_config():
    config = ml_collections.ConfigDict()
    config.seed = 0
    config.steps = 600

    config.data = {
        "sources": {"clipart": {"name": "clipart", "split": "train"}},
        "rows": 16,
        "tokens": 4 * 5**2,
        "slots": 4,
        "num_labels": 3,
        "resolution": {"name": "fixed", "side": 80},
        "square": True,
        "crop": {"name": "inception", "area_low": 0.3},
        "flip": 0.5,
        "repeats": 3,
        "window": 64,
    }
    config.model = {
        "name": "sparseformer",
        "size": "v1_micro/16",
        "max_side": 5,
        "drop_path": 0.1,
        "gradient_clamp": 2.0,
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
        "schedule": {"name": "cosine", "warmup": 0.1, "floor": 0.01},
        "weight_decay": 0.05,
        "decay": ((r"(.*/)?kernel", 1.0), (r"encoder/(.*/)?embedding", 1.0)),
        "clip": 5.0,
    }
    config.train = {"ema": 0.99, "report_every": 20, "evaluate_every": 200}
    config.checkpoint = {"keep": 2}
    config.evals = {
        "validation": {
            "sources": {"clipart": {"name": "clipart", "split": "validation"}},
            "sides": (80,),
        }
    }
    config.lock()
    return config
