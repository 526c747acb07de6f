"""One model of many sizes beside models of one size each; native beside square.

`python benchmarks/resolutions.py --workdir=runs/resolutions` trains the variants of
configs/ablations/resolution.py over the five folds of the embedded set (30 runs of two
minutes on two quiet cores; what is done is not done again), prints two Markdown tables
and draws the first as a picture: figure 5 of NaViT (arXiv 2307.06304), in small.
"""

import pathlib
import runpy
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from absl import flags
from etils import epath
from five_fold import FOLDS, fold_config, mean_and_error, train_fold

from navit_jax import baselines, command_line, experiment, pictures
from navit_jax import config as config_lib
from navit_jax.errors import ConfigError

CONFIG = pathlib.Path(__file__).parent.parent / "configs/ablations/resolution.py"
# By fold, what was measured, by name.
Values = Sequence[dict[str, Any]]


def variant_config(variant: str, tiny: bool) -> dict[str, Any]:
    """A variant's config, resolved."""
    config = runpy.run_path(str(CONFIG))["get_config"](variant).unlock()
    if tiny:
        config.steps = 2
        config.data.update(rows=2, tokens=128, slots=16)
        config.model.update(width=32, depth=1, num_heads=2, mlp=64)
        config.model.update(attention="dense", remat="none")  # compiles quickly
        for section in config.evals.values():
            section.update(sides=(64, 128), rows=8)
    return config_lib.resolve(config)


def guess_without_pixels(config: dict[str, Any], fold: int) -> dict[str, float]:
    """What classifiers get that see no pixel, as `<eval set>/<classifier>`.

    They learn from the training part as it is.
    """
    config = fold_config(config, fold)
    training, found = experiment.build_stream(config), {}
    for name, section in config["evals"].items():
        _, judged = next(iter(experiment.build_eval_streams(config, section, name)))
        for guess, value in baselines.pixel_free(training, judged).items():
            found[f"{name}/{guess}"] = value
    return found


def pick(values: Values, name: str) -> np.ndarray:
    """One number of each fold."""
    return np.array([value[name] for value in values], float)


def upscaled(values: Values, sides: Sequence[int]) -> list[float]:
    """The share of all judged images that are enlarged at each side."""
    images = pick(values, f"eval/fold_{sides[0]}/images")
    shares = [pick(values, f"eval/fold_{side}/upscaled") for side in sides]
    return [float((share * images).sum() / images.sum()) for share in shares]


def print_sizes(runs: dict[str, Values], guesses: Values, sides: list[int]) -> None:
    """The table of the models of native aspect: accuracy at every side."""
    columns = ["trained at", "images seen", "tokens seen", *(f"{s} px" for s in sides)]
    print(f"| {' | '.join(columns)} | mixed less it, at its side |")
    print("|---|" + "---|" * len(columns))
    for variant, values in runs.items():
        if variant == "square":
            continue
        seen = [
            f"{pick(values, f'data/{name}').mean():,.0f}"
            for name in ("images_seen", "tokens_seen")
        ]
        accuracy = {s: pick(values, f"eval/fold_{s}/accuracy") for s in sides}
        cells = [mean_and_error(accuracy[side]) for side in sides]
        less = ""
        if variant != "mixed":
            own = pick(runs["mixed"], f"eval/fold_{variant}/accuracy")
            less = mean_and_error(own - accuracy[int(variant)], "+.3f")
        print(f"| {' | '.join([variant, *seen, *cells, less])} |")
    shares = [f"{share:.0%}" for share in upscaled(runs["mixed"], sides)]
    print(f"| images upscaled | | | {' | '.join(shares)} | |")
    majority = mean_and_error(pick(guesses, "fold/majority"))
    aspect = mean_and_error(pick(guesses, "fold/aspect_only"))
    print(f"\nAlways the commonest class: {majority}; the aspect alone: {aspect}.")


def print_squares(runs: dict[str, Values], guesses: Values, sides: list[int]) -> None:
    """The table of native aspect against squares, on both sets, paired by fold."""
    columns = [
        "set", "side", "tokens an image, native", "square", "accuracy, native",
        "square", "native less square", "the aspect alone", "the commonest class",
    ]  # fmt: skip
    print(f"\n| {' | '.join(columns)} |\n{'|---' * len(columns)}|")
    for part, title in {"fold": "as it is", "padded": "padded"}.items():
        known = [
            mean_and_error(pick(guesses, f"{part}/{name}"))
            for name in ("aspect_only", "majority")
        ]
        for side in sides:
            both = [
                {
                    name: pick(runs[variant], f"eval/{part}_{side}/{name}")
                    for name in ("accuracy", "tokens_per_image")
                }
                for variant in ("mixed", "square")
            ]
            tokens = [f"{values['tokens_per_image'].mean():.1f}" for values in both]
            native, square = (values["accuracy"] for values in both)
            cells = [mean_and_error(native), mean_and_error(square)]
            cells.append(mean_and_error(native - square, "+.3f"))
            print(f"| {' | '.join([title, str(side), *tokens, *cells, *known])} |")


def draw(runs: dict[str, Values], guesses: Values, sides: list[int]) -> Any:
    """A figure of the first table: accuracy over the side that is asked for.

    Bands and bars are a standard error over the folds.
    """
    figure = pictures.figure(7.5, 4.8)
    axes = figure.subplots()
    variants = [variant for variant in runs if variant != "square"]
    for variant, colour in zip(variants, pictures.COLOURS, strict=False):
        names = [f"eval/fold_{side}/accuracy" for side in sides]
        table = np.array([pick(runs[variant], name) for name in names])
        mean, folds = table.mean(1), table.shape[1]
        error = table.std(1, ddof=1) / np.sqrt(folds) if folds > 1 else 0 * mean
        if variant == "mixed":
            axes.fill_between(
                sides, mean - error, mean + error, color=colour, alpha=0.2, lw=0
            )
            axes.plot(
                sides, mean, "o-", color=colour, lw=2, ms=4, zorder=4,
                label="one model of many sizes",
            )  # fmt: skip
            continue
        at = sides.index(int(variant))
        axes.plot(sides, mean, color=colour, lw=1, alpha=0.45)
        axes.errorbar(
            sides[at], mean[at], error[at], fmt="D", color=colour, ms=7, capsize=3,
            mec="white", zorder=5, label=f"at {variant} alone",
        )  # fmt: skip
    lines = {"the aspect alone": "aspect_only", "the commonest class": "majority"}
    for title, name in lines.items():
        value = pick(guesses, f"fold/{name}").mean()
        axes.axhline(value, ls="--", lw=1, color="#888888", zorder=1)
        axes.text(
            0.6, value, title, fontsize=8, va="bottom", ha="center", color="#555555",
            transform=axes.get_yaxis_transform(),
        )  # fmt: skip
    shares = upscaled(runs["mixed"], sides)
    labels = [f"{s}\n{share:.0%}" for s, share in zip(sides, shares, strict=True)]
    axes.set_xticks(sides, labels, fontsize=9)
    axes.annotate(
        "images upscaled", (0, 0), (-8, -20), fontsize=8.5, ha="right", va="top",
        color="#555555", xycoords="axes fraction", textcoords="offset points",
    )  # fmt: skip
    axes.set_xlabel("side of the square of the image's area, pixels", fontsize=9)
    axes.set_ylabel(f"accuracy{', mean of folds' * (folds > 1)}", fontsize=9)
    axes.tick_params(axis="y", labelsize=9)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    # Above the axes, where no curve can run through it.
    figure.legend(loc="outside upper center", ncols=5, frameon=False, fontsize=8)
    return figure


def define_main():
    """Defines the flags, and returns what reads them, trains, prints and draws."""
    workdir = flags.DEFINE_string("workdir", None, "Folder of the runs", required=True)
    chosen = flags.DEFINE_list("folds", [str(i) for i in range(FOLDS)], "As 0,1")
    picture = flags.DEFINE_string(
        "picture", None, "A .png or .svg file; default: resolutions.png in --workdir"
    )
    tiny = flags.DEFINE_bool("tiny", False, "Two steps of three variants: a test")

    def main() -> int:
        known = [str(i) for i in range(FOLDS)]
        if not chosen.value or set(chosen.value) - set(known):
            raise ConfigError(f"--folds={','.join(chosen.value)}: give some of 0 .. 4")
        folds = sorted({int(fold) for fold in chosen.value})
        folder = epath.Path(workdir.value).absolute()
        if not jax.config.jax_compilation_cache_dir:
            # The variants are one program: it is compiled once.
            jax.config.update("jax_compilation_cache_dir", str(folder / "compiled"))
        names = runpy.run_path(str(CONFIG))["FIXED"]
        names = ("mixed", "square", *(names if not tiny.value else names[1:2]))
        configs = {name: variant_config(name, tiny.value) for name in names}
        runs: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
        for fold in folds:
            for name, config in configs.items():
                runs[name].append(
                    train_fold(config, fold, folder / name / f"fold{fold}")
                )
        guesses = [guess_without_pixels(configs["mixed"], fold) for fold in folds]
        sides = configs["mixed"]["evals"]["validation"]["sides"]
        print_sizes(runs, guesses, sides)
        print_squares(runs, guesses, sides)
        path = pathlib.Path(picture.value or folder / "resolutions.png")
        draw(runs, guesses, sides).savefig(path, dpi=150)
        print(f"\nPicture: {path}")
        return 0

    return main


if __name__ == "__main__":
    command_line.run(define_main())
