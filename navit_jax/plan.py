"""What a config will do: `python -m navit_jax.plan --config=... --packing`.

Prints padding, images a row, slot use and attention work of the packing plan, without
reading a pixel, and draws a picture of packed rows. With captions, it recommends how
much room for text a row should have (data.text.tokens).

`--topology=v5e:16x16` compiles the training step for TPUs that are not here, and says
what it takes there: memory, what is sent, an estimate of time (`navit_jax/pods.py`);
with `--search` of several meshes, accumulations and rematerialisations.
"""

import bisect
import json
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from absl import flags
from etils import epath

from navit_jax import command_line, experiment, pictures, pod_search, pods
from navit_jax import config as config_lib
from navit_jax.data import Stream
from navit_jax.data.plan import Plan
from navit_jax.errors import ConfigError
from navit_jax.topology import Topology, open_topology

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


def plan_on(
    config: Mapping[str, Any], stream: Stream, on: Topology, classes: int
) -> dict[str, Any]:
    """What a step takes on a topology, as of `pods.account`.

    Raises:
      ConfigError: it does not fit; the message says what would help, and by how much.
    """
    try:
        return pods.account(config, stream, on, classes)
    except pods.OutOfMemory as error:
        knobs = pods.find_room(config, stream, on, classes)
        lines = [f"  {name}: {found}" for name, found in knobs]
        raise ConfigError(
            f"{on.text}: {error}, and has {on.chip.memory / 2**30:.0f} at most. What "
            "would help:\n" + "\n".join(lines)
        ) from error


def _check_writable(flag: str, path: epath.Path) -> None:
    try:
        path.open("ab").close()
    except OSError as error:
        raise ConfigError(f"{flag}={path} can not be written: {error}") from error


def define_main() -> Callable[[], int]:
    """Defines the flags, and returns what reads them and reports."""
    config = command_line.define_config()
    packing = flags.DEFINE_bool("packing", False, "Report the packing plan")
    windows = flags.DEFINE_integer("windows", 1, "Windows that are planned for it")
    picture = flags.DEFINE_string("picture", None, "Where its picture goes, a .png")
    images = flags.DEFINE_bool("images", False, "Draw the images too, not only bars")
    on = flags.DEFINE_string("topology", "", "Compile for it, as v5e:16x16")
    output = flags.DEFINE_string("output", None, "Where what is found goes, a .json")
    stand_in = flags.DEFINE_bool(
        "stand_in", False, "The embedded drawings for sets that are not here"
    )
    classes = flags.DEFINE_integer("classes", 0, "Of the sources, for --stand_in")
    search = flags.DEFINE_bool("search", False, "Try meshes, accumulation and remat")

    def main() -> int:
        if not packing.value and not on.value:
            raise ConfigError("say what to plan: --packing or --topology=v5e:16x16")
        resolved = config_lib.resolve(config.value)
        experiment.check_sections(resolved)
        files = {"--picture": picture.value, "--output": output.value}
        for flag, path in files.items():
            if path:
                _check_writable(flag, epath.Path(path))
        topology = open_topology(on.value) if on.value else None
        resolved = pods.stand_in(resolved) if stand_in.value else resolved
        stream = experiment.build_stream(resolved)
        if packing.value:
            print(packing_report(stream, resolved["steps"], windows.value))
        draw = draw_images if images.value else draw_rows
        if picture.value:
            drawn = pictures.encode(draw(stream), "png")
            epath.Path(picture.value).write_bytes(drawn)
            print(f"picture: {picture.value}")
        if topology:
            num_classes = classes.value or stream.num_classes
            found: Any = None
            if search.value:
                found = pod_search.search(resolved, stream, topology, num_classes)
                print(pod_search.format_table(found))
            else:
                found = plan_on(resolved, stream, topology, num_classes)
                print(pods.format_account(found))
            if output.value:
                text = json.dumps(found, indent=1) + "\n"
                epath.Path(output.value).write_text(text)
        return 0

    return main


if __name__ == "__main__":
    command_line.run(define_main())
