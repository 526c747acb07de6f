"""SparseFormer v2 bootstrapped from a pretrained ViT (arXiv 2312.01987), full scale.

A user must have ImageNet prepared by TFDS (docs/data.md; pictures alone are used) and
the teacher's weights (docs/weights.md), as the argument `weights`:
  augreg_b  AugReg ViT-B/16 at 224, npz or safetensors
  augreg_l  AugReg ViT-L/16 at 384
  clip_b    OpenAI CLIP ViT-B/16, safetensors, both towers
  clip_l    OpenAI CLIP ViT-L/14
            With tokenizer=FILE, CLIP's tokenizer.json, and names=FILE, what the 1000
            classes are called, one a line in their order, the student is judged by
            what the teacher's own text tower says of these names (zero-shot top-1).
  vit_s14   fetched: python -m navit_jax.weights.fetch vit_s14
Command: python -m navit_jax.train --workdir=RUN \\
    --config=configs/sparseformer_bootstrap.py:teacher=augreg_l,weights=FILE
Cost: "a few hours", as the paper has it, on hardware that it does not name in what we
know of it. Not run by us at full size. Expect for augreg_l: .849 top-1 on ImageNet, of
which we do not know whether labels were used in the end.

From the paper: the student keeps the teacher's last blocks (8 of 12, 16 of 24), its
last norm and its head or projection; a focusing transformer in front learns to align
the final representation, by images of ImageNet alone. Not known, and ours: the cosine,
4 tuned blocks at a tenth of the rate, 20 epochs of batches of 1024, 5e-4, crops of 35
to 100 % of the area, the same for both, the student's resolution (the teacher's), the
class token's start (the teacher's); CLIP is aligned after the projection, the others
before the head.
"""

import pathlib

import ml_collections

IMAGES, BATCH = 1_281_167, 1024
HALF = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CLIP = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
AUGREG = {"pixels": HALF, "activation": "gelu_tanh", "eps": 1e-6, "head": 1000}
OPENAI = {"pixels": CLIP, "activation": "quick_gelu", "eps": 1e-5, "clip": True}
# Size, side of a picture, first block that is kept, and what makes its ViT.
TEACHERS = {
    "augreg_b": ("B/16", 224, 4, AUGREG),
    "augreg_l": ("L/16", 384, 8, AUGREG),
    "clip_b": ("B/16", 224, 4, {**OPENAI, "head": 512, "text": "M"}),
    "clip_l": ("L/14", 224, 8, {**OPENAI, "head": 768, "text": "B"}),
    "vit_s14": ("S/14", 224, 4, {"pixels": IMAGENET, "activation": "gelu", "side": 37}),
}


def describe_teacher(name: str):
    """The section of a teacher."""
    size, side, _, given = TEACHERS[name]
    patch, clip = int(size.split("/")[1]), given.get("clip", False)
    return {
        "name": "navit",
        "size": size,
        "positions": {
            "name": "learned_1d",
            "side": given.get("side", side // patch),
            "length": 64,
            "filter": "bicubic",
        },
        "pooling": "class",
        "class_token": True,
        "bias_qkv": True,
        "bias_ln": True,
        "bias_patch": not clip,
        "pre_norm": clip,
        "qk_norm": False,
        "activation": given["activation"],
        "eps": given.get("eps", 1e-6),
        "layer_scale": 1.0 if name == "vit_s14" else 0.0,
        "pixel_mean": given["pixels"][0],
        "pixel_std": given["pixels"][1],
        "dtype": "bfloat16",
    }


def add_texts(config, size: str, tokenizer: str, names: str):
    """Judges by the texts of the teacher, which no step reads or changes."""
    config.data["text"] = {
        "vocabulary": tokenizer,
        "length": 77,
        "tokens": 4 * 77,
        "captions": False,
    }
    config.model["init"]["rules"] += [(r"((?:text|text_head)/.*|log_scale)", r"\1")]
    config.task["text"] = {
        "size": size,
        "pooling": "last",
        "causal": True,
        "bias_qkv": True,
        "bias_ln": True,
        "qk_norm": False,
        "activation": "quick_gelu",
        "eps": 1e-5,
    }
    labelled = {"name": "tfds", "dataset": "imagenet2012", "split": "validation"}
    config.evals["zero_shot"] = {
        "name": "zero_shot",
        "sources": {"imagenet": labelled},
        "sides": config.evals["validation"]["sides"],
        "templates": ("a photo of a {}.",),
    }
    if names:
        lines = pathlib.Path(names).read_text().splitlines()
        config.evals["zero_shot"]["names"] = tuple(lines)


def get_config(arg: str = ""):
    asked = dict(part.split("=", 1) for part in arg.split(",") if part)
    name = asked.pop("teacher", "vit_s14")
    weights = asked.pop("weights", "vit_s14" if name == "vit_s14" else "")
    tokenizer, names = asked.pop("tokenizer", ""), asked.pop("names", "")
    if asked or name not in TEACHERS:
        raise ValueError(
            f"unknown {sorted(asked) or name!r}; known: weights=FILE, tokenizer=FILE, "
            f"names=FILE, teacher= one of {', '.join(TEACHERS)}"
        )
    if (tokenizer or names) and not (tokenizer and name.startswith("clip")):
        raise ValueError(f"tokenizer=, and with it names=, is for clip_*, not {name}")
    size, side, first, given = TEACHERS[name]
    patch, head = int(size.split("/")[1]), given.get("head", 0)

    config = ml_collections.ConfigDict()
    config.seed = 0
    config.steps = 20 * IMAGES // BATCH

    imagenet = {"name": "tfds", "dataset": "imagenet2012"}
    has_classes = head and not given.get("clip")
    if not has_classes:
        imagenet["label"] = None
    config.data = {
        "sources": {"imagenet": {**imagenet, "split": "train"}},
        "rows": BATCH // 4,
        "tokens": 4 * (side // patch) ** 2,
        "slots": 4,
        "resolution": {"name": "fixed", "side": side},
        "square": True,
        "crop": {"name": "inception", "area_low": 0.35},
        "flip": 0.5,
        "workers": 16,
    }
    config.model = {
        "name": "sparseformer",
        "size": f"v2_{name}/{patch}",
        "max_side": side // patch,
        "gradient_clamp": 128 / BATCH,
        "dtype": "bfloat16",
        "init": {
            "weights": weights,
            "rules": [(r"teacher/(.*)", r"encoder/\1")],
        },
    }
    config.task = {
        "name": "bootstrapping",
        "teacher": describe_teacher(name),
        "loss_name": "cosine",
        "head_width": head,
        "inherit": [
            (r"encoder/blocks/(.*)", rf"teacher/blocks/\1[{first}:]"),
            (r"encoder/norm/(.*)", r"teacher/norm/\1"),
            (r"encoder/class_token", r"teacher/class_token"),
        ],
    }
    if given.get("clip"):
        # Both have the teacher's own projection, so the student needs none.
        config.model["shape"] = {"projection": 0}
        config.model["init"]["rules"] += [(r"head/dense/kernel", "image_head/kernel")]
        config.task["align"] = "head"
    elif head:
        config.model["init"]["rules"] += [(r"head/(.*)", r"head/\1")]
    if name == "vit_s14":
        # Nothing that was measured is worse of both: docs/bootstrapping.md.
        config.task["representation"] = "both"
    config.optim = {
        "name": "adamw",
        "lr": 5e-4,
        "schedule": {"name": "cosine", "warmup": 1 / 20, "floor": 0.01},
        "weight_decay": 0.05,
        "lr_multipliers": ((r"encoder/blocks/.*", 0.1),),
        "freeze": ((r"encoder/blocks/.*", "4:"), (r"encoder/norm/.*", True)),
        "clip": 1.0,
    }
    config.mesh = {"replica": 1, "fsdp": -1, "tensor": 1}
    config.train = {"report_every": 100, "evaluate_every": 5000, "save_every": 1000}
    config.checkpoint = {"keep": 2}
    validation = {"imagenet": {**imagenet, "split": "validation"}}
    config.evals = {
        "validation": {"name": "agreement", "sources": validation, "sides": (side,)}
    }
    if has_classes:
        # Top-1 under the teacher's own head, which no label has trained here.
        config.evals["head"] = {"sources": validation, "sides": (side,)}
    if tokenizer:
        add_texts(config, given["text"], tokenizer, names)
    config.lock()
    return config
