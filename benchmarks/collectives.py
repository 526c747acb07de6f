"""Reads from a compiled program's text what its devices send to each other."""

import math
import re
from typing import NamedTuple

KINDS = (
    "all-gather", "all-reduce", "all-to-all", "collective-permute", "reduce-scatter"
)  # fmt: skip
SHAPE = re.compile(r"\b(?:pred|bf|[fsuc])(\d*)\[([\d,]*)\]")
OPERATION = re.compile(rf" = (.+?) ({'|'.join(KINDS)})(-start)?\(")
CALLED = re.compile(r"\b\w+=\{?(%[\w.\-]+(?:, %[\w.\-]+)*)")
TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')


class Collective(NamedTuple):
    """One operation: the bytes of its result on a device, and how often it runs."""

    kind: str
    size: int
    times: int


def read(hlo: str, trips: int = 1) -> list[Collective]:
    """The collectives of a program, `compiled.as_text()`, with those in its loops.

    Args:
      trips: Of loops whose number of rounds the text does not tell: the data do, or
        the program is for a TPU, whose text never does.
    """
    bodies, name, entry = {}, "", ""
    for line in hlo.splitlines():
        if line[:1] not in ("", " ", "}") and line.endswith("{"):
            name = line.removeprefix("ENTRY ").split(" ")[0].lstrip("%")
            bodies[name] = []
            entry = name if line.startswith("ENTRY") else entry
        elif line[:1] == " ":
            bodies[name].append(line)

    def walk(name: str, times: int) -> list[Collective]:
        found = []
        for line in bodies[name]:
            if operation := OPERATION.search(line):
                sizes = [_size(*shape) for shape in SHAPE.findall(operation[1])]
                # What starts an operation also returns its operand.
                size = max(sizes) if operation[3] else sum(sizes)
                found.append(Collective(operation[2], size, times))
                continue
            known = TRIPS.search(line)
            rounds = int(known[1]) if known else trips if " while(" in line else 1
            for others in CALLED.findall(line):
                for other in others.split(", "):
                    found += walk(other[1:], times * rounds)
        return found

    return walk(entry, 1)


def _size(bits: str, dims: str) -> int:
    """Bytes of an array; a `pred` has no bits in its name and takes a byte."""
    return int(bits or 8) // 8 * math.prod(int(n) for n in dims.split(",") if n)
