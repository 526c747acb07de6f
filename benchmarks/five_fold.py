"""Five-fold accuracy of a config on the embedded set, folds by near-duplicate group.

`python benchmarks/five_fold.py --config=configs/smoke.py --workdir=runs/folds` trains
five times, judges each on its own fifth, and prints a Markdown table. It resumes.
"""

import copy
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
from absl import flags
from etils import epath

from navit_jax import command_line, reporting, run_folder, train
from navit_jax import config as config_lib

FOLDS = 5


def fold_config(config: dict[str, Any], fold: int) -> dict[str, Any]:
    """The config with training and every evaluation on the two parts of a fold.

    The eval set `validation` is then called `fold`.
    """
    config = copy.deepcopy(config)
    config["data"]["sources"]["clipart"]["split"] = f"fold{fold}:train"
    evals = {}
    for name, section in config["evals"].items():
        section["sources"]["clipart"]["split"] = f"fold{fold}:test"
        evals["fold" if name == "validation" else name] = section
    return {**config, "evals": evals}


def final(workdir: epath.Path) -> dict[str, float]:
    """The last evaluation of a run, and what it had seen by then."""
    values: dict[str, float] = {}
    for record in reporting.read_metrics(workdir):
        values |= {k: v for k, v in record.items() if k.startswith(("eval/", "data/"))}
    return values


def train_fold(config: dict[str, Any], fold: int, folder: epath.Path) -> dict[str, Any]:
    """Trains on all but a fold, unless that is done, and gives its last evaluation.

    Ends the program with the code of a run that was told to stop.
    """
    config = fold_config(config, fold)
    stored = folder / "config.json"
    same = stored.exists() and run_folder.read_config(folder) == config
    done = same and reporting.was_evaluated(folder, config["steps"])
    if not done and (code := train.train(config, folder)):
        sys.exit(code)
    return final(folder)


def mean_and_error(values: Sequence[float] | np.ndarray, form: str = ".3f") -> str:
    """The mean over folds, and the standard error of it if there are several."""
    mean = format(float(np.mean(values)), form)
    if len(values) < 2:
        return mean
    return f"{mean} +- {np.std(values, ddof=1) / np.sqrt(len(values)):.3f}"


def define_main():
    """Defines the flags, and returns what reads them and trains."""
    config = command_line.define_config()
    workdir = flags.DEFINE_string("workdir", None, "Folder of the runs", required=True)

    def main() -> int:
        resolved = config_lib.resolve(config.value)
        results = [
            train_fold(resolved, fold, epath.Path(workdir.value) / f"fold{fold}")
            for fold in range(FOLDS)
        ]
        names = [n for n in results[0] if n.endswith("/accuracy")]
        print("| fold | images | " + " | ".join(n.split("/")[1] for n in names) + " |")
        print("|---|---|" + "---|" * len(names))
        for fold, result in enumerate(results):
            images = result[names[0].replace("accuracy", "images")]
            cells = " | ".join(f"{result[n]:.3f}" for n in names)
            print(f"| {fold} | {images:.0f} | {cells} |")
        cells = [mean_and_error([result[name] for result in results]) for name in names]
        print(f"| mean, standard error | | {' | '.join(cells)} |")
        return 0

    return main


if __name__ == "__main__":
    command_line.run(define_main())
