"""Five-fold accuracy of a config on the embedded set, folds by near-duplicate group.

`python benchmarks/five_fold.py --config=configs/smoke.py --workdir=runs/folds` trains
five times, judges each on its own fifth, and prints a Markdown table. It resumes.
"""

import copy

import numpy as np
from absl import flags
from etils import epath

from navit_jax import command_line, reporting, train
from navit_jax import config as config_lib


def fold_config(config: dict, fold: int) -> dict:
    """The config with training and evaluation on the two parts of a fold."""
    config = copy.deepcopy(config)
    config["data"]["sources"]["clipart"]["split"] = f"fold{fold}:train"
    evaluation = next(iter(config["evals"].values()))
    evaluation["sources"]["clipart"]["split"] = f"fold{fold}:test"
    config["evals"] = {"fold": evaluation}
    return config


def final(workdir: epath.Path) -> dict[str, float]:
    """The last evaluation of a run."""
    values: dict[str, float] = {}
    for record in reporting.read_metrics(workdir):
        values |= {k: v for k, v in record.items() if k.startswith("eval/")}
    return values


def define_main():
    """Defines the flags, and returns what reads them and trains."""
    config = command_line.define_config()
    workdir = flags.DEFINE_string("workdir", None, "Folder of the runs", required=True)

    def main() -> int:
        resolved = config_lib.resolve(config.value)
        results = []
        for fold in range(5):
            folder = epath.Path(workdir.value) / f"fold{fold}"
            code = train.train(fold_config(resolved, fold), folder)
            if code:
                return code
            results.append(final(folder))
        names = [n for n in results[0] if n.endswith("/accuracy")]
        print("| fold | images | " + " | ".join(n.split("/")[1] for n in names) + " |")
        print("|---|---|" + "---|" * len(names))
        for fold, result in enumerate(results):
            images = result[names[0].replace("accuracy", "images")]
            cells = " | ".join(f"{result[n]:.3f}" for n in names)
            print(f"| {fold} | {images:.0f} | {cells} |")
        table = np.array([[result[n] for n in names] for result in results])
        spread = table.std(0, ddof=1) / np.sqrt(5)
        pairs = zip(table.mean(0), spread, strict=True)
        cells = " | ".join(f"{mean:.3f} +- {error:.3f}" for mean, error in pairs)
        print(f"| mean, standard error | | {cells} |")
        return 0

    return main


if __name__ == "__main__":
    command_line.run(define_main())
