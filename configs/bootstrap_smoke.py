"""Bootstraps a small SparseFormer from a real ViT-S/14, on a laptop's CPU.

Source: arXiv 2312.01987 at the size of a demonstration; the teacher is ViT-S/14 (DINOv2
architecture, saliency-tuned): python -m navit_jax.weights.fetch vit_s14
Command: python -m navit_jax.train --config=configs/bootstrap_smoke.py --workdir=RUN
    trains on the embedded clip art; --config=configs/bootstrap_smoke.py:composites adds
    scenes with small objects (python -m navit_jax.data.builders.composites), and
    --config=configs/bootstrap_smoke.py:plain has another student: the plain ViT-S/14
    from scratch on 49 patches, which the teacher sees enlarged from 98 to 112 px.
    A longer one, on scenes alone at 224 px with 36 latent tokens, fewer FLOPs than the
    teacher's at 98 px, reads what the teacher said once:
    python -m navit_jax.teach --config=configs/bootstrap_smoke.py:long --side=224 \\
        --out=DIR
    python -m navit_jax.train --config=configs/bootstrap_smoke.py:long --workdir=RUN \\
        --config.data.teacher=DIR
    --config=configs/bootstrap_smoke.py:glimpse, with the same teacher's vectors, starts
    as the teacher itself on 36 patches (shape.glimpse, which is ours) and learns from
    there: above the teacher at 98 px after some minutes. Its control is
    --config=configs/bootstrap_smoke.py:resized, the plain ViT-S/14 with the teacher's
    weights on all 36 patches of 84 px; :scratch is the same without those weights.
Judge: python benchmarks/bootstrapping.py --workdir=RUN --plain=RUN2
Cost: 7 minutes on two cores, 30 the longer one. It shows that it learns; quality takes
more pictures and time: docs/bootstrapping.md, configs/sparseformer_bootstrap.py.
"""

import ml_collections


def get_config(arg: str = ""):
    known = "composites", "plain", "long", "glimpse", "resized", "scratch"
    if arg not in ("", *known):
        raise ValueError(f"unknown argument {arg!r}; known: {', '.join(known)}")
    config = ml_collections.ConfigDict()
    config.seed = 0
    config.steps = 300

    scenes = {"name": "composites", "split": "train", "count": 20_000, "labels": "none"}
    config.data = {
        "sources": {"clipart": {"name": "clipart", "split": "train", "labels": "none"}},
        "rows": 4,
        "tokens": 4 * 8**2,
        "slots": 4,
        "num_labels": 0,
        "resolution": {"name": "fixed", "side": 112},
        "square": True,
        "crop": {"name": "inception", "area_low": 0.35},
        "flip": 0.5,
    }
    if arg == "composites":
        config.data["sources"]["composites"] = scenes
    config.model = {
        "name": "sparseformer",
        "size": "v2_vit_s14/14",
        "shape": {"latents": 16},
        "max_side": 8,
        "gradient_clamp": 8.0,
        "init": {
            "weights": "vit_s14",
            "rules": [(r"teacher/(.*)", r"encoder/\1")],
        },
    }
    config.task = {
        "name": "bootstrapping",
        # As `python -m navit_jax.weights inspect vit_s14` prints it.
        "teacher": {
            "name": "navit",
            "size": "S/14",
            "positions": {
                "name": "learned_1d",
                "side": 37,
                "length": 64,
                "filter": "bicubic",
            },
            "pooling": "class",
            "class_token": True,
            "bias_qkv": True,
            "bias_ln": True,
            "qk_norm": False,
            "activation": "gelu",
            "layer_scale": 1.0,
            "pixel_mean": (0.485, 0.456, 0.406),
            "pixel_std": (0.229, 0.224, 0.225),
        },
        # Nothing that was measured is worse of both: docs/bootstrapping.md.
        "representation": "both",
        "inherit": [
            (r"encoder/blocks/(.*)", r"teacher/blocks/\1[4:]"),
            (r"encoder/norm/(.*)", r"teacher/norm/\1"),
            (r"encoder/class_token", r"teacher/class_token"),
        ],
    }
    config.optim = {
        "name": "adamw",
        "lr": 1e-3,
        "schedule": {"name": "cosine", "warmup": 0.1},
        "weight_decay": 0.05,
        "lr_multipliers": ((r"encoder/blocks/.*", 0.1),),
        "freeze": ((r"encoder/blocks/.*", "4:"), (r"encoder/norm/.*", True)),
        "clip": 1.0,
    }
    config.train = {"report_every": 10, "evaluate_every": 100}
    config.checkpoint = {"keep": 1}
    validation = {"name": "clipart", "split": "validation", "labels": "none"}
    config.evals = {
        "validation": {
            "name": "agreement",
            "sources": {"clipart": validation},
            "sides": (112,),
            "slots": 4,
        }
    }
    if arg == "plain":
        config.data.update(tokens=4 * 7**2, resolution={"name": "fixed", "side": 98})
        positions = {"name": "learned_1d", "side": 7, "length": 7}
        init = config.model["init"]
        config.model = {**config.task["teacher"], "positions": positions, "init": init}
        config.task.update(teacher_side=112, inherit=())
        del config.optim["freeze"], config.optim["lr_multipliers"]
        config.evals["validation"]["sides"] = (98,)
    if arg in ("long", "glimpse", "resized", "scratch"):
        scenes.update(count=6000, side=(240, 480))
        config.steps = 1200
        config.data.sources = {"composites": scenes}
        # What the teacher said is of whole pictures.
        config.data.crop = {"name": "none"}
        config.data.update(
            rows=16,
            tokens=16**2,
            slots=1,
            resolution={"name": "fixed", "side": 224},
            flip=0.0,
            teacher="",
        )
        # One square a row: a canvas has no empty place.
        config.model.update(maps="canvas", max_side=16, remat="none")
        config.model["shape"]["latents"] = 36
        config.optim["lr"] = 3e-4
        config.optim["schedule"]["warmup"] = 0.05
        config.train.update(report_every=20, evaluate_every=200)
        judged = {**scenes, "split": "validation", "count": 300}
        config.evals["validation"]["sources"] = {"composites": judged}
        config.evals["validation"].update(sides=(224,), slots=1)
    if arg == "glimpse":
        # All blocks of the teacher, and a front that leaves them FLOPs for 36 tokens.
        config.model["shape"].update(
            depth=12, repeats=2, channels=48, glimpse=14, glimpse_pool=2
        )
        config.task.inherit = [
            (r"encoder/(blocks|norm|class_token)(.*)", r"teacher/\1\2"),
            (r"encoder/glimpses/(\w+_embedding)/(.*)", r"teacher/\1/\2"),
        ]
        config.optim.update(lr=5e-4, weight_decay=0.01, freeze=())
        config.optim.lr_multipliers = (
            (r"encoder/(?:blocks|norm|class_token).*", 0.04),
            (r"encoder/glimpses/\w+_embedding/.*", 0.04),
        )
    if arg in ("resized", "scratch"):
        config.data.update(tokens=6**2, resolution={"name": "fixed", "side": 84})
        config.model = {**config.task["teacher"], "init": config.model["init"]}
        config.task.inherit = [(r"encoder/(.*)", r"teacher/\1")]
        config.optim.update(lr=2e-5, weight_decay=0.01, freeze=(), lr_multipliers=())
        if arg == "scratch":
            config.task.inherit = ()
            config.optim.lr = 5e-4
        # Here its teacher would see 84 px as well, in training without vectors and in
        # evals: the benchmark asks it at 224.
        config.data.teacher = "runs/teacher"
        config.evals = {}
    config.lock()
    return config
