"""The FLOPs that a config's training takes, by what its batches hold."""

from collections.abc import Callable, Mapping
from typing import Any

from navit_jax import config as config_lib
from navit_jax import experiment, models, optim
from navit_jax.models import flops

# Tokens, pairs and vectors pooled, as `train_state.batch_counts` names them.
IMAGES: tuple[str, ...] = ("tokens", "attention_pairs", "images")
TEXTS: tuple[str, ...] = ("text_tokens", "text_attention_pairs", "texts")


def flops_counter(
    config: Mapping[str, Any], params: Any
) -> Callable[[Mapping[str, float | int]], float]:
    """Training FLOPs of the towers, by the counts of `train_state.batch_counts`.

    A tower that is frozen as a whole goes forward only; one of which anything is
    trained counts as if all were. A teacher goes forward, and at a size of its own
    takes (side / patch)^2 tokens of each image.

    Args:
      params: The parameters, or their shapes.
    """
    patch = models.patch_size(config["model"]["size"])
    # Of a subtree of the parameters: the module, values of an input, what counts.
    towers = {"encoder": (experiment.build_encoder(config), 3 * patch**2, IMAGES)}
    # A teacher's texts are read when a student is judged, not in a step.
    if "teacher" not in config["task"] and (text := config["task"].get("text")):
        given = {"vocab_size": 0, "length": 0}  # it looks its inputs up
        tower = config_lib.call(models.TextTower, text, "task.text", **given)
        towers["text"] = tower, 0, TEXTS
    task = config["task"]
    side = patch
    if (teacher := task.get("teacher")) and not config["data"].get("teacher"):
        tower = config_lib.build(teacher, models.MODELS, "task.teacher")
        side = models.patch_size(teacher["size"])
        towers["teacher"] = tower, 3 * side**2, IMAGES
    frozen = optim.find_frozen(config["optim"].get("freeze", ()), params)
    trained = {
        name.split("/")[0] for name, still in frozen.items() if still is not True
    }
    trained.discard("teacher")

    def count(counts: Mapping[str, float | int]) -> float:
        total = 0.0
        for name, (tower, values, counted) in towers.items():
            tokens, pairs, vectors = (counts[each] for each in counted)
            if name == "teacher" and task.get("teacher_side"):
                each = (task["teacher_side"] // side) ** 2
                tokens, pairs = vectors * each, vectors * each**2
            if isinstance(tower, models.SparseFormer):
                forward = tower.forward_flops(tokens, vectors)
            else:
                forward = flops.forward_flops(
                    tokens, pairs, vectors, tower.spec, values, tower.pooling
                )
            total += forward * (flops.TRAINING if name in trained else 1)
        return total

    return count
