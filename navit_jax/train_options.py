"""Section `train` of a config."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class TrainOptions:
    """Section `train` of a config: how the loop goes about its steps.

    Attributes:
      accumulate: Passes a step's rows are split into; the gradients stay the same.
      ema: Decay of the running mean of the parameters, which evaluation then uses;
        0 for none.
      report_every: Steps between reports.
      evaluate_every: Steps between evaluations; 0 is at the end only.
      save_every: Steps between checkpoints; 0 is at the end only. The step of an
        evaluation is saved too.
      bad_images: Share of the last 10,000 planned images that may be unusable.
      nonfinite_steps: Skipped steps of the run that may have been not finite.
      hang_seconds: A run in which nothing happens for so long leaves with 43; 0: never.
    """

    accumulate: int = 1
    ema: float | int = 0.0
    report_every: int = 10
    evaluate_every: int = 0
    save_every: int = 1000
    bad_images: float | int = 0.01
    nonfinite_steps: int = 10
    hang_seconds: float | int = 1800
