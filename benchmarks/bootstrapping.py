"""A bootstrapped student beside its teacher and cheaper baselines.

`python benchmarks/bootstrapping.py --workdir=RUN --side=112 --teacher_side=224` prints
a Markdown table for each source: how near each comes to the teacher at its own side
(centred cosine and R@1 as in `navit_jax/agreement.py`), a linear probe, FLOPs of one
picture (two a multiply-add) and the speed of the forward pass on one device. Intervals
hold 95 %, by near-duplicate group, of scenes by scene.

`--representations` prints what the teacher itself offers to learn instead: its pooled
vector, the mean of its patches, and both. `--tiny` is for a test.
"""

import os
import sys
from collections.abc import Mapping
from typing import Any

import bootstrapping_cases as cases
import jax
import labelled
import numpy as np
import timing
from absl import flags
from bootstrapping_cases import Case, Vectors
from labelled import Judged, Probe

from navit_jax import agreement, command_line, models, predictor, sharding
from navit_jax.errors import ConfigError
from navit_jax.metrics import interval_by_group
from navit_jax.predictor import Predictor

WORKDIR = flags.DEFINE_string("workdir", None, "Folder of a run", required=True)
PLAIN = flags.DEFINE_list("plain", [], "Folders of runs whose students are plain ViTs")
SOURCES = flags.DEFINE_list("source", ["clipart"], "clipart, composites or both")
SPLIT = flags.DEFINE_string("split", "test", "Of the sources")
FULL = flags.DEFINE_bool("full", False, "The full-size build of the clip art")
SCENES = flags.DEFINE_integer("scenes", 500, "Number of composites")
COMPOSITES = flags.DEFINE_string(
    "composites", "", "Where they were built, if elsewhere"
)
SIDE = flags.DEFINE_integer("side", 112, "Of the student's pictures, in pixels")
TEACHER_SIDE = flags.DEFINE_integer("teacher_side", 0, "Of the target; 0 is --side")
COUNTS = flags.DEFINE_list("latents", ["9", "16", "25", "36", "49"], "Latent tokens")
GRIDS = flags.DEFINE_list("grid", ["7"], "Patches a side of the cheap baselines")
PROBE = flags.DEFINE_bool("probe", True, "Add linear probes, where there are classes")
IMAGES = flags.DEFINE_integer("images", 16, "Pictures of a batch")
REPEATS = flags.DEFINE_integer("repeats", 5, "Timed rounds")
REPRESENTATIONS = flags.DEFINE_bool("representations", False, "Judge the teacher's own")
TINY = flags.DEFINE_bool("tiny", False, "One repeat; probes learn from validation")
SHOWN = ("centred_cosine", "r1")
FRONT = "student, random front"
HEADER = (
    "", "centred cosine", "own teacher R@1", "cosine", "linear probe", "gap closed",
    "GFLOPs", "images/s",
)  # fmt: skip


def list_cases(
    run: Predictor, plain: Mapping[str, Predictor], judged: Judged
) -> dict[str, Case]:
    """All that have parameters, by name, in the order of the table."""
    side, teacher_side = SIDE.value, TEACHER_SIDE.value or SIDE.value
    own = cases.open_student(run, side)
    with jax.set_mesh(run.mesh):
        stream = cases.open_stream(own, judged.section, IMAGES.value)
    found = {FRONT: cases.open_student(run, side, params=cases.start(run, stream))}
    patch = models.patch_size(run.config["task"]["teacher"]["size"])
    grids, num = command_line.parse_counts("grid", GRIDS.value), (side // patch) ** 2
    for name, each in plain.items():
        cases.check_teachers(run, each)
        own_side = each.config["data"]["resolution"].get("side", grids[0] * patch)
        found[f"plain ViT, {name}"] = cases.open_student(each, own_side)
    for few in (grid**2 for grid in grids if grid**2 < num):
        name = f"teacher, {few} of its {num} patches"
        found[name] = cases.open_teacher(run, side, few)
    for each in sorted({*(grid * patch for grid in grids), side, teacher_side}):
        found[f"teacher, {each} px"] = cases.open_teacher(run, each)
    counts = cases.list_tokens(COUNTS.value, own)
    for count in counts:
        found[f"student, {count} tokens"] = cases.open_student(run, side, count)
    return found if counts else {**found, "student": own}


def show_interval(terms: np.ndarray, groups: np.ndarray) -> str:
    """A mean and its interval."""
    low, high = interval_by_group(terms, np.ones(len(terms)), groups)
    return f"{terms.mean():.3f} ({low:.3f} .. {high:.3f})"


def print_table(
    title: str, found: dict[str, Case], target: str, judged: Judged, mesh: Any
) -> None:
    """How near each comes to the one that is the target."""

    def compute(case: Case, section: dict[str, Any]) -> Vectors:
        return cases.compute_vectors(case, section, IMAGES.value, mesh)

    vectors = {}
    for name, case in found.items():
        vectors[name] = compute(case, judged.section)
        show(f"{title}: {name}")
    there, agreed = cases.agree(vectors, target)
    right, probe = {}, Probe(labelled.leave_out(judged, there))
    if judged.train and PROBE.value:
        for name, case in found.items():
            right[name] = probe.fit(compute(case, judged.train), vectors[name])
            show(f"{title}: probe of {name}")
    calls = {
        name: cases.prepare_call(case, judged.section, IMAGES.value, mesh)
        for name, case in found.items()
    }
    seconds = timing.interleave(calls, 1 if TINY.value else REPEATS.value)

    print(f"\n{title}, {show_count(there)}, next to {target}\n")
    print(f"| {' | '.join(HEADER)} |\n{'|---' * len(HEADER)}|")
    for name, terms in agreed.items():
        cells = [show_interval(terms[k], judged.groups[there]) for k in SHOWN]
        cells.append(f"{terms['cosine'].mean():.3f}")
        cells += show_probe(right, name, target, probe.groups)
        if name in found:
            rate = IMAGES.value / np.median(seconds[name])
            cells += [f"{cases.count_flops(found[name]) / 1e9:.2f}", f"{rate:.1f}"]
        else:
            cells += ["", ""]
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


def show_count(there: np.ndarray) -> str:
    """How many pictures were judged, and how many could not be."""
    lost = len(there) - there.sum()
    lacking = f" ({lost} could not be used)" if lost else ""
    return f"{there.sum()} pictures{lacking}"


def show_probe(
    right: dict[str, np.ndarray], name: str, target: str, groups: np.ndarray
) -> list[str]:
    """Accuracy, and the share of the way from the random front to the teacher."""
    if name not in right:
        return ["", ""]
    low, high, own = (right[each].mean() for each in (FRONT, target, name))
    # Not -0 where the teacher is below the front.
    share = (own - low) / (high - low) + 0.0 if high != low else np.nan
    return [show_interval(right[name], groups), f"{share:.0%}"]


def print_representations(run: Predictor, judged: Judged) -> None:
    """Which vector of the teacher says most of what a picture shows.

    Raises:
      ConfigError: the source has no classes.
    """
    if not judged.train:
        raise ConfigError("--representations needs classes: give --source=clipart")
    sides = sorted({SIDE.value, TEACHER_SIDE.value or SIDE.value})
    found = {}
    for side in sides:
        case = cases.open_teacher(run, side, name="both")
        pair = [
            cases.compute_vectors(case, section, IMAGES.value, run.mesh)
            for section in (judged.train, judged.section)
        ]
        half = pair[0].shape[1] // 2
        parts = {"pooled": np.s_[:, :half], "mean": np.s_[:, half:], "both": np.s_[:]}
        found[side] = {n: [v[part] for v in pair] for n, part in parts.items()}
        show(f"{side} px")
    there = found[sides[-1]]["both"][1].any(1)
    probe = Probe(labelled.leave_out(judged, there))
    print(f"\n{show_count(there)}\n")
    columns = (
        "representation", "side", "linear probe", f"{labelled.NEIGHBOURS} nearest",
        "constant's cosine", f"centred cosine with {sides[-1]} px", "R@1",
    )  # fmt: skip
    print(f"| {' | '.join(columns)} |\n{'|---' * len(columns)}|")
    for side, by_name in found.items():
        for name, (train, own) in by_name.items():
            seen, target = own[there], found[sides[-1]][name][1][there]
            terms = agreement.compare(seen, target)
            cells = [
                show_interval(probe.fit(train, own), probe.groups),
                show_interval(probe.find_neighbours(train, own), probe.groups),
                f"{agreement.compare(seen, seen)['constant_cosine'].mean():.3f}",
                *(f"{terms[k].mean():.3f}" for k in SHOWN),
            ]
            print(f"| {name} | {side} | {' | '.join(cells)} |", flush=True)


def show(text: str) -> None:
    """What is done, for whoever waits."""
    print(f"  {text}", file=sys.stderr, flush=True)


def open_judged(name: str) -> Judged:
    """A source by name, as the flags have it."""
    if name == "clipart":
        return labelled.open_clipart(SPLIT.value, FULL.value, TINY.value)
    if name == "composites":
        return labelled.open_composites(SPLIT.value, SCENES.value, COMPOSITES.value)
    raise ConfigError(f"--source={name}: give clipart, composites or both")


def main() -> int:
    """Prints the tables."""
    mesh = sharding.make_mesh(devices=jax.local_devices()[:1])
    run = predictor.restore(WORKDIR.value, None, mesh)
    if not hasattr(run.task, "vectors_of_teacher"):
        raise ConfigError(f"--workdir={WORKDIR.value}: its task has no teacher")
    plain = {
        os.path.basename(os.path.normpath(folder)): predictor.restore(
            folder, None, mesh
        )
        for folder in PLAIN.value
    }
    for name in SOURCES.value:
        judged = open_judged(name)
        if REPRESENTATIONS.value:
            print_representations(run, judged)
            continue
        found = list_cases(run, plain, judged)
        target = f"teacher, {TEACHER_SIDE.value or SIDE.value} px"
        print_table(name, found, target, judged, mesh)
    return 0


if __name__ == "__main__":
    command_line.run(main)
