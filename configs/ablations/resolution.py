"""One model of many sizes beside models of one size each.

Source: NaViT (arXiv 2307.06304), section 3.2, figure 5: B/16 trained at sides
    U(64, R) against the same at R alone, at equal compute and native aspect; here
    configs/smoke.py at half its steps, at sides U(32, 128) against 48, 64, 96 or 128.
Command: python benchmarks/resolutions.py --workdir=runs/resolutions
    trains all variants over five folds; one alone, on the usual split:
    python -m navit_jax.train --config=configs/ablations/resolution.py:64 --workdir=RUN
Variants: mixed; 48, 64, 96, 128: that side alone; square: as mixed, but every image
    is squeezed into a square of as many pixels, and judged so.
Cost: 2 minutes a run on two cores. Every variant takes 600 steps of 4 rows of 512
    tokens: equal compute, so the smaller the images, the more of them are seen.
Expect: docs/results.md. Of the figure it has the flat curve of the mixed model and its
    gain over 128 alone; not its gain over smaller sides alone, which here see up to
    four times as many pictures for the same tokens.
"""

import pathlib
import runpy

SMOKE = pathlib.Path(__file__).parent.parent / "smoke.py"
SIDES = (32, 48, 64, 80, 96, 128, 160)
FIXED = ("48", "64", "96", "128")


def get_config(variant: str = "mixed"):
    if variant not in ("mixed", "square", *FIXED):
        known = ", ".join(("mixed", "square", *FIXED))
        raise ValueError(f"unknown variant {variant!r}; known: {known}")
    config = runpy.run_path(str(SMOKE))["get_config"]().unlock()
    config.steps = 600

    # Rows so long that the few large images of a fixed side fill them too.
    config.data.update(rows=4, tokens=512, slots=96, square=variant == "square")
    config.data.resolution = {"name": "uniform", "low": 32, "high": 128, "of": "side"}
    if variant in FIXED:
        config.data.resolution = {"name": "fixed", "side": int(variant)}

    config.train.evaluate_every = 0
    config.checkpoint.keep = 1
    drawings = {"name": "clipart", "split": "validation"}
    evals = {"validation": drawings}
    if variant not in FIXED:
        evals["padded"] = {"name": "padded", "source": drawings}
    config.evals = {
        name: {"sources": {"clipart": source}, "sides": SIDES}
        for name, source in evals.items()
    }
    return config.lock()
