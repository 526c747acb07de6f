"""What a config will do: `python -m navit_jax.plan --config=... --packing`.

Prints padding, images a row, slot use and attention work of the packing plan, without
reading a pixel, and draws a picture of packed rows. With captions, it recommends how
much room for text a row should have (data.text.tokens).
"""

import bisect
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from absl import flags
from etils import epath

from navit_jax import command_line, experiment, pictures
from navit_jax import config as config_lib
from navit_jax.data import Stream
from navit_jax.data.plan import Plan
from navit_jax.errors import ConfigError

# Windows planned along a run whose token dropping is scheduled: a step of the rate is
# then placed to 1/64 of the run.
PLACES = 32


def images_of_run(plan: Plan, steps: int) -> int:
    """Images that so many steps will see, to about 1 %.

    Windows differ, and a schedule of the drop rate changes the images a row along the
    run, so rows are summed over windows spread over it.
    """
    rows = plan.rows * steps
    images = float(rows * plan.slots)  # No run sees more.
    for _ in range(2):
        ends = np.linspace(0, images, PLACES + 1)
        rows_an_image = []
        for middle in (ends[1:] + ends[:-1]) / 2:
            numbers = range(2**62)
            number = bisect.bisect_right(numbers, middle, key=plan.images_before) - 1
            window = plan.plan_window(*plan.label(number))
            rows_an_image.append(len(window) / window.starts[-1])
        reached = np.cumsum([0, *rows_an_image]) * images / PLACES
        beyond = max(0, rows - reached[-1]) / rows_an_image[-1]
        images = float(np.interp(rows, reached, ends)) + beyond
    return round(images)


def packing_report(stream: Stream, steps: int, windows: int = 1) -> str:
    """A table of what the first windows of the training stream are like.

    Args:
      steps: Of the run, whose images and drop rates are told too.
      windows: How many the table is of.
    """
    plan = stream.plan
    report = plan.report(windows)
    images = images_of_run(plan, steps)
    shares = zip(stream.loader.names, report["source_shares"], strict=True)
    epoch = sum(len(table) for table in plan.tables)
    ends = plan.token_drop.average(np.array([0, images]))
    rates = [f"{rate:.2f}" for rate in ends]
    lines = [
        ("batch", f"{plan.rows} rows x {plan.tokens} tokens x {plan.slots} slots"),
        ("planned here", f"the first {report['rows']:,} rows, "
         f"{report['images']:,} images"),
        ("padding", f"{report['padding']:.2%} of the tokens"),
        ("images a row", f"{report['images_per_row']:.2f}"),
        ("slot use", f"{report['slot_use']:.1%}; {report['full_rows']:.1%} of the rows"
         " have no slot left"),
        ("slots that suffice", f"{report['enough_slots']}, at 0.05 points of padding"),
        ("attention work", f"{report['attention_work']:.3f} of dense rows"),
        ("images that had to shrink", f"{report['shrunk']:,}"),
        ("token dropping, first to last", " to ".join(rates)),
        ("sources", ", ".join(f"{name} {share:.1%}" for name, share in shares)),
        *text_lines(plan, report),
        ("images of the run", f"{images:,} in {steps:,} steps, "
         f"{images / epoch:.1f} times the {epoch:,} there are"),
    ]  # fmt: skip
    width = max(len(name) for name, _ in lines)
    return "\n".join(f"{name:{width}s}  {value}" for name, value in lines)


def text_lines(plan: Plan, report: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The lines on texts; none without captions."""
    if not plan.captions:
        return []
    mean = report["text_tokens"] / report["images"]
    return [
        ("text room", f"{plan.text_tokens} tokens a row; texts have {mean:.1f}"),
        ("text padding", f"{report['text_padding']:.2%} of the text tokens"),
        ("text room that suffices", f"{report['enough_text']}, at 1.5 % of padding, or "
         "0.1 points more than without texts"),
    ]  # fmt: skip


def draw_rows(stream: Stream, num_rows: int = 12) -> Any:
    """A figure of the first planned rows as bars of tokens, one colour an image."""
    window = stream.plan.plan_window(*stream.plan.label(0))
    rows = [window.row(r).kept.tolist() for r in range(min(num_rows, len(window)))]
    return pictures.draw_plan(rows, stream.plan.tokens)


def draw_images(stream: Stream, num_rows: int = 3) -> Any:
    """Loads the first rows; a figure of their images above the tokens they take."""
    window = stream.plan.plan_window(*stream.plan.label(0))
    planned = [window.row(r) for r in range(min(num_rows, len(window)))]
    batch = stream.loader.pack(stream.loader.load(planned).images)
    return pictures.draw_batch(batch, stream.plan.patch, num_rows)


def _check_writable(path: epath.Path) -> None:
    try:
        path.open("ab").close()
    except OSError as error:
        raise ConfigError(f"--picture={path} can not be written: {error}") from error


def define_main() -> Callable[[], int]:
    """Defines the flags, and returns what reads them and reports."""
    config = command_line.define_config()
    packing = flags.DEFINE_bool("packing", False, "Report the packing plan")
    windows = flags.DEFINE_integer("windows", 1, "Windows that are planned for it")
    picture = flags.DEFINE_string("picture", None, "Where its picture goes, a .png")
    images = flags.DEFINE_bool("images", False, "Draw the images too, not only bars")

    def main() -> int:
        if not packing.value:
            raise ConfigError("say what to plan: --packing")
        resolved = config_lib.resolve(config.value)
        experiment.check_sections(resolved)
        path = epath.Path(picture.value) if picture.value else None
        if path:
            _check_writable(path)
        stream = experiment.build_stream(resolved)
        print(packing_report(stream, resolved["steps"], windows.value))
        draw = draw_images if images.value else draw_rows
        if path:
            path.write_bytes(pictures.encode(draw(stream), "png"))
            print(f"picture: {path}")
        return 0

    return main


if __name__ == "__main__":
    command_line.run(define_main())
