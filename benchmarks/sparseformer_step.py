"""SparseFormer against plain ViTs: `python benchmarks/sparseformer_step.py`.

Times forward passes and whole training steps (forward, backward, AdamW, the trainer's
own) on pictures of 224 x 224, one a row, alternatives in turn. In each table ratios are
of one run: images/s over those of ViT-S/16, and over those of the ViT whose blocks the
model has, each beside the ratio that the multiply-adds allow. A last table says where
the time of v1_tiny's training step goes, by leaving parts out. Lookups, maps and what
is computed again are as the flags say; a GPU wants `--images=512 --micro=512
--dtype=bfloat16`. `--tiny` is for a test.
"""

import dataclasses
from typing import Any

import fixed_list
import jax
import jax.numpy as jnp
import numpy as np
import steps
import timing
from absl import app, flags

from navit_jax import experiment, sharding
from navit_jax.batch import PackedBatch
from navit_jax.models import flops, sampling, sparseformer_sizes

TINY = flags.DEFINE_bool("tiny", False, "Small shapes, one repeat")
REPEATS = flags.DEFINE_integer("repeats", 7, "Timed rounds")
IMAGES = flags.DEFINE_integer("images", 16, "Of a step")
MICRO = flags.DEFINE_integer("micro", 8, "Images of a part of a step")
TABLES = flags.DEFINE_list(
    "tables", ["v1_tiny", "v2_augreg_b", "v2_vit_s14", "where"], ""
)
MAPS = flags.DEFINE_string("maps", "canvas", "Of a SparseFormer; tiles is the other")
LOOKUP = flags.DEFINE_string("lookup", "auto", "Of a SparseFormer")
DEVICES = flags.DEFINE_integer("devices", 1, "That share the cores of a CPU, and rows")
DTYPE = flags.DEFINE_string("dtype", "float32", "Of all models")
REMAT = flags.DEFINE_string("remat", "light", "What a SparseFormer's backward keeps")
ATTENTION = flags.DEFINE_string("attention", "auto", "Of a SparseFormer")

SMALL = {
    "latents": 4, "channels": 8, "points": 4, "out_points": 4, "focus_width": 64,
    "focus_heads": 2, "width": 64, "depth": 1, "num_heads": 2, "mlp": 64, "rank": 8,
}  # fmt: skip
PLAIN = "ViT-S/16"
# A model, and the ViT whose blocks it has.
TEACHERS = {"v1_tiny": None, "v2_augreg_b": "ViT-B/16", "v2_vit_s14": "ViT-S/14"}
KINDS = ("forward", "training")


def patch_of(name: str) -> int:
    """Of a model by the name that tables have."""
    return 14 if name.endswith("14") else 16


def side() -> int:
    """Pixels of a picture: 224, or what is the same number of both patches."""
    return 112 if TINY.value else 224


def squares(patch: int) -> PackedBatch:
    """Pictures of random pixels, one a row."""
    cells, images = side() // patch, 2 if TINY.value else IMAGES.value
    batch = fixed_list.alone(np.full((images, 2), cells), cells * cells)
    patches = batch.patches[..., : 3 * patch**2]
    return dataclasses.replace(batch, patches=patches)


def config(name: str, batch: PackedBatch, **model: Any) -> dict[str, Any]:
    """A run's config for a name, with other attributes of the model."""
    micro = len(batch.patches) if TINY.value else MICRO.value
    if name.startswith("ViT"):
        tiny = {"depth": 1, "width": 64, "num_heads": 2, "mlp": 64}
        plain = {
            "pooling": "mean", "qk_norm": False, "bias_qkv": True, "bias_ln": True,
            # A square a row has nothing to skip: dense is the plain model's best.
            "attention": "dense", "dtype": DTYPE.value,
        }  # fmt: skip
        size = name.removeprefix("ViT-")
        return steps.config(size, batch, micro, **plain | (tiny if TINY.value else {}))
    small = SMALL if TINY.value else {}
    found = steps.config(f"{name}/{patch_of(name)}", batch, micro)
    found["model"] = {
        "name": "sparseformer",
        "size": f"{name}/{patch_of(name)}",
        "max_side": side() // patch_of(name),
        "maps": MAPS.value,
        "lookup": LOOKUP.value,
        "remat": REMAT.value,
        "attention": ATTENTION.value,
        "dtype": DTYPE.value,
    } | {**model, "shape": {**small, **model.get("shape", {})}}
    return found


def count_macs(name: str, settings: dict[str, Any]) -> int:
    """Multiply-adds of a forward pass of one picture, the stem's too."""
    patch, pixels = patch_of(name), side()
    if name.startswith("ViT"):
        tokens = (pixels // patch) ** 2
        spec, values = steps.spec(settings), 3 * patch**2
        return round(
            flops.forward_flops(tokens, tokens**2, 1, spec, values, "mean") / 2
        )
    changes = {**settings["model"]["shape"], "num_classes": 0}
    shape, _ = sparseformer_sizes.named(settings["model"]["size"], changes)
    stem = sparseformer_sizes.stem_macs(shape, pixels, pixels)
    return stem + int(sparseformer_sizes.token_macs(shape, shape.latents))


def forward(settings: dict[str, Any], batch: PackedBatch) -> steps.Step:
    """The outputs of all pictures, in parts of as many as a training step's."""
    task = experiment.build_task(settings, 1000)
    params = jax.jit(task.init)(jax.random.key(0), batch)
    parts = settings["train"]["accumulate"]
    apply = jax.jit(lambda params, batch: task.outputs(params, batch)["logits"])
    split = lambda part: jax.tree.map(lambda x: np.split(x, parts)[part], batch)  # noqa: E731
    placed = [sharding.place(split(i), jax.sharding.get_mesh()) for i in range(parts)]
    return lambda: [jax.block_until_ready(apply(params, each)) for each in placed]


def compare(name: str, repeats: int) -> None:
    """A model, ViT-S/16 and the model's teacher."""
    teacher = TEACHERS[name]
    names = [each for each in (PLAIN, teacher, name) if each]
    calls: dict[Any, steps.Step] = {}
    macs = {}
    for each in names:
        batch = squares(patch_of(each))
        settings = config(each, batch)
        macs[each] = count_macs(each, settings)
        calls[each, "forward"] = forward(settings, batch)
        calls[each, "training"] = steps.step(settings, batch)
    seconds: dict[Any, np.ndarray] = timing.interleave(calls, repeats)
    images = len(squares(patch_of(name)).patches)
    rates = {case: images / taken for case, taken in seconds.items()}
    others = [PLAIN, teacher] if teacher else [PLAIN]
    lines, header = [], "model | G multiply-adds | forward images/s | training images/s"
    for other in others:
        header += f" | forward / {other} | training / {other} | by multiply-adds"
    for each in names:
        cells = [each, f"{macs[each] / 1e9:.3f}"]
        cells += [f"{np.median(rates[each, kind]):.2f}" for kind in KINDS]
        for other in others:
            cells += [timing.ratio(rates[each, k], rates[other, k]) for k in KINDS]
            cells += [f"{macs[other] / macs[each]:.2f}"]
        lines.append(cells)
    steps.table(f"{name} at {side()}", header, lines)


def read_mean(maps: Any, slots: Any, taps: Any) -> jax.Array:
    """Every point reads the mean of the row's maps, so that nothing is looked up."""
    mean = maps.cells.mean((1, 2, 3), dtype=jnp.float32)[:, None, None]
    return mean * (1 + taps.rest.sum(-1, keepdims=True))


def read_nothing(maps: Any, slots: Any, taps: Any) -> jax.Array:
    """Every point reads its own place, so that no map is needed."""
    channels = maps.cells.shape[-1]
    return jnp.repeat(taps.rest.sum(-1, keepdims=True), channels, axis=-1)


def break_down(repeats: int) -> None:
    """Shares of the training step of v1_tiny, by what is left out of it."""
    sampling.LOOKUPS |= {"mean": read_mean, "nothing": read_nothing}
    name, batch = "v1_tiny", squares(16)
    shape = sparseformer_sizes.SHAPES[name]
    without = {
        part: tuple(each for each in getattr(shape, part) if each != "sample")
        for part in ("focus", "refocus")
    }
    cases = {
        "whole": {},
        "maps read as one": {"lookup": "mean"},
        "no maps": {"lookup": "nothing"},
        "no mixing": {"lookup": "nothing", "shape": without},
        "blocks": {"lookup": "nothing", "shape": {**without, "repeats": 0}},
    }
    calls = {case: steps.step(config(name, batch, **changes), batch)
             for case, changes in cases.items()}  # fmt: skip
    taken = timing.interleave(calls, repeats)
    parts = {
        "lookups": ("whole", "maps read as one"),
        "stem": ("maps read as one", "no maps"),
        "mixing": ("no maps", "no mixing"),
        "attention and MLP of the focusing unit": ("no mixing", "blocks"),
    }
    lines = [["whole", f"{1e3 * np.median(taken['whole']):.0f}", "100%"]]
    for part, (more, less) in parts.items():
        own = taken[more] - taken[less]
        share = np.median(own / taken["whole"])
        lines.append([part, f"{1e3 * np.median(own):.0f}", f"{share:.0%}"])
    share = np.median(taken["blocks"] / taken["whole"])
    lines.append(
        ["the rest", f"{1e3 * np.median(taken['blocks']):.0f}", f"{share:.0%}"]
    )
    steps.table(f"Where a training step of {name} goes", "part | ms | share", lines)


def main(_: list[str]) -> None:
    """Prints the tables."""
    repeats = 1 if TINY.value else REPEATS.value
    if DEVICES.value > 1:
        jax.config.update("jax_num_cpu_devices", DEVICES.value)
    with jax.set_mesh(sharding.make_mesh(devices=jax.devices()[: DEVICES.value])):
        for name in TABLES.value:
            break_down(repeats) if name == "where" else compare(name, repeats)
            jax.clear_caches()


if __name__ == "__main__":
    app.run(main)
