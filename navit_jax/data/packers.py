r"""Assigns images to rows of tokens, given only how long they are.

M images, K budgets of a row: image tokens and, with captions, text tokens
(`pair_packers.py`); the padding of budget 0 is what counts. One core places 4 million
images a second by best fit, 5 by closing:

  python -m timeit -p -s "import numpy as np
  from navit_jax.data.packers import assign_rows
  x = np.random.default_rng(0).integers(4, 129, (16384, 1))" \
  "assign_rows(x, [256], 10, 'best_fit')"
"""

import functools
import operator
from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Int64, Integer

from navit_jax.config import nearest
from navit_jax.data import pair_packers
from navit_jax.errors import ConfigError, DataError

Lengths = Int64[np.ndarray, "M K"]
# In: lengths, K capacities, slots. Out: the row of each image, in order of opening.
Packer = Callable[[Lengths, Sequence[int], int], list[int]]

# When a row has no more room than this times the longest remaining image, `closing`
# ends it. The best of 1, 1.25 and 1.5 on the three loads of tests/test_packers.py.
CLOSE_BELOW = 1.25


def best_fit(lengths: Lengths, capacity: Sequence[int], num_slots: int) -> list[int]:
    """Puts each image, in order, where the least room suffices.

    Among rows with equal room, in the one used last.
    """
    if len(capacity) == 2:
        return pair_packers.best_fit(lengths, capacity, num_slots)
    # Open rows are stacked by their room; a bit of `occupied` is a room that some row
    # has. So the search is a shift and a lowest bit.
    stacks: list[list[int]] = [[] for _ in range(capacity[0] + 1)]
    bits = [1 << room for room in range(capacity[0] + 1)]
    occupied = 0
    shortest = int(lengths[:, 0].min())
    num_images: list[int] = []
    rows: list[int] = []
    for n in lengths[:, 0].tolist():
        if fitting := occupied >> n:
            room = n + (fitting & -fitting).bit_length() - 1
            row = stacks[room].pop()
            if not stacks[room]:
                occupied ^= bits[room]
        else:
            room, row = capacity[0], len(num_images)
            num_images.append(0)
        rows.append(row)
        num_images[row] += 1
        room -= n
        # A row that can take nothing more leaves the pool, or it would clog it.
        if num_images[row] < num_slots and room >= shortest:
            if not stacks[room]:
                occupied |= bits[room]
            stacks[room].append(row)
    return rows


def closing(lengths: Lengths, capacity: Sequence[int], num_slots: int) -> list[int]:
    """Fills one row at a time in order, then ends it with the longest that fit.

    It is ended when the next image does not fit, or when there is little more room than
    the longest remaining image needs: so long images end rows too, and short ones last.
    """
    if len(capacity) == 2:
        return pair_packers.closing(lengths, capacity, num_slots, CLOSE_BELOW)
    bits = [1 << n for n in range(capacity[0] + 1)]
    up_to = [(2 << n) - 1 for n in range(capacity[0] + 1)]
    waiting: list[list[int]] = [[] for _ in range(capacity[0] + 1)]
    first = lengths[:, 0].tolist()
    for i, n in enumerate(first):
        waiting[n].append(i)
    # Images placed in order stay in the front of their lists; these are the others.
    num_waiting = [len(images) for images in waiting]
    present = sum(bits[n] for n in range(capacity[0] + 1) if num_waiting[n])
    rows = [-1] * len(lengths)
    row, room, slots = 0, capacity[0], num_slots
    for i, n in enumerate(first):
        if rows[i] >= 0:
            continue
        if (
            n > room
            or not slots
            or (slots < num_slots and room <= CLOSE_BELOW * (present.bit_length() - 1))
        ):
            candidates = present & up_to[room]
            while slots and candidates:
                k = candidates.bit_length() - 1
                rows[waiting[k].pop()] = row
                num_waiting[k] -= 1
                if not num_waiting[k]:
                    present ^= bits[k]
                room -= k
                slots -= 1
                candidates &= present & up_to[room]
            row, room, slots = row + 1, capacity[0], num_slots
            if rows[i] >= 0:
                continue
        rows[i] = row
        num_waiting[n] -= 1
        if not num_waiting[n]:
            present ^= bits[n]
        room -= n
        slots -= 1
    return rows


def auto(lengths: Lengths, capacity: Sequence[int], num_slots: int) -> list[int]:
    """The better, by the number of rows, of best fit and closing."""
    candidates = (pack(lengths, capacity, num_slots) for pack in (best_fit, closing))
    return min(candidates, key=max)


def first_fit(
    lengths: Lengths, capacity: Sequence[int], num_slots: int, open_rows: int
) -> list[int]:
    """The paper's greedy packer: each image goes in the first open row with room (B.3).

    When it fits in none of `open_rows` rows, all of them are closed and it opens the
    next ones. Only a row without a free slot is replaced before.
    """
    pool: list[int] = []
    num_images: list[int] = []
    rests: list[Sequence[int]] = []
    rows: list[int] = []
    for needs in lengths.tolist():
        n = needs[0]
        for row in pool:
            if n <= rests[row][0] and all(map(operator.le, needs, rests[row])):
                break
        else:
            if len(pool) == open_rows:
                pool = []
            row = len(num_images)
            pool.append(row)
            num_images.append(0)
            rests.append(capacity)
        rows.append(row)
        num_images[row] += 1
        rests[row] = list(map(operator.sub, rests[row], needs))
        if num_images[row] == num_slots:
            pool.remove(row)
    return rows


PACKERS = {
    "auto": auto,
    "best_fit": best_fit,
    "closing": closing,
    "next_fit": functools.partial(first_fit, open_rows=1),
}


def choose(packer: str) -> Packer:
    """The packer of a name: one of PACKERS, or `first_fit:<number of open rows>`.

    Raises:
      ConfigError: there is no such packer.
    """
    name, _, count = packer.partition(":")
    if name == "first_fit":
        if not (count.isdecimal() and int(count)):
            raise ConfigError(
                f"data.packer={packer!r}: say how many rows are open at once, "
                "like 'first_fit:32'"
            )
        return functools.partial(first_fit, open_rows=int(count))
    if packer not in PACKERS:
        hint = nearest(packer, [*PACKERS, "first_fit:32"])
        raise ConfigError(f"data.packer={packer!r}: {hint}")
    return PACKERS[packer]


def assign_rows(
    lengths: Integer[np.ndarray, "M K"],
    capacity: Sequence[int],
    num_slots: int,
    packer: str = "auto",
    rng: np.random.Generator | None = None,
) -> Int64[np.ndarray, " M"]:
    """The row of each image, numbered from 0 in the order of their opening.

    Args:
      lengths: What each image needs of each of the K budgets, one or two.
      capacity: What a row has of each.
      num_slots: Images in a row, at most.
      packer: A name for `choose`.
      rng: Shuffles the order in which images are considered; None takes them as given.
        Sorted lengths pack badly: small images collect in rows that run out of slots.

    Raises:
      ConfigError: there is no such packer.
      DataError: an image needs more than a row has, or less than nothing.
      ValueError: more than two budgets.
    """
    pack = choose(packer)
    if not 1 <= len(capacity) <= 2:
        raise ValueError(f"capacity={capacity}: give image tokens and, at most, text")
    if not len(lengths):
        return np.zeros(0, np.int64)
    bad = np.flatnonzero(((lengths > np.array(capacity)) | (lengths < 0)).any(1))
    if bad.size:
        raise DataError(
            f"image {bad[0]} of length {lengths[bad[0]].tolist()} does not fit in a "
            f"row of {list(capacity)}; shrink it first"
        )
    order = np.arange(len(lengths)) if rng is None else rng.permutation(len(lengths))
    rows = np.empty(len(lengths), np.int64)
    rows[order] = pack(lengths[order].astype(np.int64), tuple(capacity), num_slots)
    return rows


def fill_exactly(
    lengths: Integer[np.ndarray, " M"],
    rows: Int64[np.ndarray, " M"],
    capacity: int,
    full_lengths: Integer[np.ndarray, " M"],
) -> Int64[np.ndarray, " M"]:
    """Lengths under which the last image of each row takes the room that is left.

    The paper names it and does not use it (B.3): the drop rate of that image follows
    from the others of its row.

    Args:
      full_lengths: Tokens before dropping; no image gets more, so a row of small
        images may keep some room.
    """
    used = np.bincount(rows, weights=lengths).astype(np.int64)
    last = np.full(len(used), -1)
    last[rows] = np.arange(len(rows))
    last = last[last >= 0]
    filled = lengths.astype(np.int64)
    room = capacity - used[rows[last]]
    filled[last] = np.minimum(filled[last] + room, full_lengths[last])
    return filled
