"""Reads a compiled program's text: what runs, how often, what devices send each other.

XLA's own cost analysis counts the body of a loop once; here each operation is counted
as often as it runs.
"""

import math
import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

KINDS = (
    "all-gather", "all-reduce", "all-to-all", "collective-permute", "reduce-scatter"
)  # fmt: skip
SLICES = "between slices"
# Bits, dimensions, and what a layout says behind them: S(1) is memory on the chip.
SHAPE = re.compile(r"\b(?:pred|bf|[fsuc])(\d*)\w*\[([\d,]*)\](\{[^}]*\})?")
OPERATION = re.compile(r"^\s+(?:ROOT )?%[\w.\-]+ = (.+?) ([a-z][\w\-]*)\((.*)$")
CALLED = re.compile(r"\b(\w+)=\{?(%[\w.\-]+(?:, %[\w.\-]+)*)")
KNOWN_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
LIMIT = re.compile(r" = s32\[\]\S* constant\((\d+)\)")
CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
GROUPS = re.compile(
    r"replica_groups=(?:\{\{([\d,]+)\}|\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?"
    r"|mesh\[([^\]]*)\](?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))? "
    r"\{([^}]*)\})"
)
PAIRS = re.compile(r"source_target_pairs=\{\{(\d+),(\d+)\}")


class Step(NamedTuple):
    """An operation of a program.

    Attributes:
      kind: Its opcode.
      line: Its text.
      times: How often it runs.
      fused: Whether it is a part of another, whose result alone is stored.
    """

    kind: str
    line: str
    times: int
    fused: bool


class Collective(NamedTuple):
    """What devices send each other.

    Attributes:
      kind: One of `KINDS`, or "between slices": what comes over the slow network.
      size: Bytes of the result on a device.
      times: How often it runs.
      group: The devices, by their number in the mesh, of which it is with one.
    """

    kind: str
    size: int
    times: int
    group: tuple[int, ...] = ()


def walk(hlo: str, trips: int = 1) -> Iterator[Step]:
    """All operations that run, those of loops and calls too.

    Args:
      hlo: `compiled.as_text()`.
      trips: Of loops whose number of rounds the text does not tell: the data do.
    """
    bodies: dict[str, list[str]] = {}
    name = entry = ""
    for line in hlo.splitlines():
        if line[:1] not in ("", " ", "}") and line.endswith("{"):
            name = line.removeprefix("ENTRY ").split(" ")[0].lstrip("%")
            bodies[name] = []
            entry = name if line.startswith("ENTRY") else entry
        elif line[:1] == " ":
            bodies[name].append(line)

    def rounds(line: str, called: dict[str, list[str]]) -> int:
        if known := KNOWN_TRIPS.search(line):
            return int(known[1])
        condition = "\n".join(bodies[called["condition"][0]])
        found = LIMIT.findall(condition)
        counted = len(found) == 1 and "direction=LT" in condition
        return int(found[0]) if counted else trips

    def visit(name: str, times: int, fused: bool) -> Iterator[Step]:
        for line in bodies[name]:
            if not (operation := OPERATION.match(line)):
                continue
            kind = operation[2]
            yield Step(kind, line, times, fused)
            if kind in ("async-update", "async-done"):
                continue  # they name again what was started
            called = {
                key: [other.strip()[1:] for other in others.split(",")]
                for key, others in CALLED.findall(line)
                if key != "control_predecessors"
            }
            often = times * (rounds(line, called) if kind == "while" else 1)
            for key, others in called.items():
                # What is applied to pairs of numbers is a part too.
                applied = key == "to_apply" and kind != "call"
                part = fused or applied or kind == "fusion"
                for other in others:
                    if other in bodies:
                        yield from visit(other, often, part)

    if entry:
        yield from visit(entry, 1, False)


def read(hlo: str, trips: int = 1) -> list[Collective]:
    """The collectives of a program; arguments as of `walk`."""
    found = []
    for step in walk(hlo, trips):
        kind = step.kind.removesuffix("-start")
        if kind == "recv" and "xla_megascale" in step.line:
            kind = SLICES
        elif kind not in KINDS:
            continue
        operation = OPERATION.match(step.line)
        assert operation
        sizes = [size(*shape) for shape in SHAPE.findall(operation[1])]
        if kind == SLICES:
            sizes = [max(sizes)]  # beside it is a number
        elif step.kind.endswith("-start") and kind != "all-reduce":
            # What starts returns its operands too, and numbers of what is under way.
            sizes = [each for each in sizes if each > 4]
            sizes = sizes[len(sizes) // 2 :]
        group = find_group(step.line)
        found.append(Collective(kind, sum(sizes), step.times, group))
    return found


def count_cycles(hlo: str) -> int:
    """What a TPU's compiler expects of its own operations; 0 where it says nothing.

    Kernels and collectives are not in it.
    """
    cycles = 0
    for step in walk(hlo):
        if not step.fused and (found := CYCLES.search(step.line)):
            cycles += int(found[1]) * step.times
    return cycles


def largest(hlo: str, number: int = 5) -> list[tuple[int, str, str]]:
    """Bytes, shape and name in the source of the largest results, one of each shape."""
    found: dict[str, tuple[int, str, str]] = {}
    for step in walk(hlo):
        operation = OPERATION.match(step.line)
        if step.fused or step.kind == "parameter" or not operation:
            continue
        source = re.search(r'op_name="([^"]*)"', step.line)
        for shape in SHAPE.finditer(operation[1]):
            text = shape[0].split("{")[0]
            if "S(1)" not in (shape[3] or "") and text not in found and source:
                found[text] = size(*shape.groups()), text, source[1]
    return sorted(found.values(), reverse=True)[:number]


def find_group(line: str) -> tuple[int, ...]:
    """The devices of the first group of a collective, by their number; () if all."""
    if pair := PAIRS.search(line):
        return int(pair[1]), int(pair[2])
    if not (groups := GROUPS.search(line)):
        return ()
    listed, num, each, dims, order, mesh, *placed, axes = groups.groups()
    if listed:
        return tuple(_numbers(listed))
    if mesh is not None:
        named = re.findall(r"'(\w+)'=(\d+)", mesh)
        sizes = [int(length) for _, length in named]
        asked = set(re.findall(r"'(\w+)'", axes))
        ids = _count(placed[0] or str(math.prod(sizes)), placed[1]).reshape(sizes)
        own = tuple(slice(None) if name in asked else 0 for name, _ in named)
        return tuple(ids[own].ravel().tolist())
    ids = _count(dims, order).reshape(int(num), int(each))
    return tuple(ids[0].tolist())


def name_axes(group: Sequence[int], mesh_shape: dict[str, int]) -> str:
    """The axes of a mesh that a group of devices is along, as "fsdp" or "replica+fsdp".

    Args:
      group: As of `find_group`.
      mesh_shape: Sizes of the axes, outermost first.
    """
    if not group:
        group = range(math.prod(mesh_shape.values()))
    places = np.unravel_index(np.asarray(group), tuple(mesh_shape.values()))
    names = [
        name
        for name, place in zip(mesh_shape, places, strict=True)
        if len(np.unique(place)) > 1
    ]
    return "+".join(names) or "none"


def size(bits: str, dims: str, _: str | None = None) -> int:
    """Bytes of an array; a `pred` has no bits in its name and takes a byte."""
    return int(bits or 8) * math.prod(int(n) for n in dims.split(",") if n) // 8


def _count(dims: str, order: str | None) -> np.ndarray:
    """0, 1, .. in these dimensions, which are then put in another order."""
    sizes = _numbers(dims)
    ids = np.arange(math.prod(sizes)).reshape(sizes)
    return ids.transpose(_numbers(order)) if order else ids


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]
