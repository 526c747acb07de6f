r"""Assigns images with their texts to rows, given how long both are: two budgets.

The packers of `packers.py` for pairs. What the image tokens leave unused counts first;
text room only has to suffice, and decides between equals. M pairs. One core places 1.5
million pairs a second, by best fit fewer where texts have little room
(`python benchmarks/packing.py` has the table over it):

  python -m timeit -p -s "import numpy as np
  from navit_jax.data.packers import assign_rows
  x = np.random.default_rng(0).integers((4, 1), (129, 25), (16384, 2))" \
  "assign_rows(x, [256, 96], 10, 'closing')"
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int64

Pairs = Int64[np.ndarray, "M 2"]


def best_fit(lengths: Pairs, capacity: Sequence[int], num_slots: int) -> list[int]:
    """Puts each pair, in order, where the least room for images suffices.

    Only rows with room for its text count; among equals the one with the least room for
    text, and of these the one used last.
    """
    num_tokens, num_text = capacity
    # Open rows are stacked by both rooms. A bit of `occupied` is an image room that
    # some row has; a bit of `texts` at that room, a text room that it has beside it.
    stacks: dict[tuple[int, int], list[int]] = {}
    texts = [0] * (num_tokens + 1)
    occupied = 0
    shortest, shortest_text = lengths.min(0).tolist()
    num_images: list[int] = []
    rows: list[int] = []
    # Two flat lists: a list for each pair would wake the garbage collector.
    for n, t in zip(lengths[:, 0].tolist(), lengths[:, 1].tolist(), strict=True):
        fitting = occupied >> n
        while fitting:
            lowest = fitting & -fitting
            room = n + lowest.bit_length() - 1
            if enough := texts[room] >> t:
                text_room = t + (enough & -enough).bit_length() - 1
                stack = stacks[room, text_room]
                row = stack.pop()
                if not stack:
                    texts[room] ^= 1 << text_room
                    if not texts[room]:
                        occupied ^= 1 << room
                break
            fitting ^= lowest
        else:
            room, text_room, row = num_tokens, num_text, len(num_images)
            num_images.append(0)
        rows.append(row)
        num_images[row] += 1
        room -= n
        text_room -= t
        # A row that can take nothing more leaves the pool, or it would clog it.
        if (
            num_images[row] < num_slots
            and room >= shortest
            and text_room >= shortest_text
        ):
            stack = stacks.setdefault((room, text_room), [])
            if not stack:
                texts[room] |= 1 << text_room
                occupied |= 1 << room
            stack.append(row)
    return rows


def closing(
    lengths: Pairs, capacity: Sequence[int], num_slots: int, close_below: float
) -> list[int]:
    """Fills one row at a time in order, then ends it with the longest that fit.

    Of equally long images the one with the longest text that fits: so the short texts
    are left for rows that have no room for others. It pads less than best fit does.

    Args:
      close_below: A row with no more room than this times the longest remaining image
        is ended.
    """
    num_tokens, num_text = capacity
    waiting: dict[tuple[int, int], list[int]] = {}
    # A bit of `present` is a length that some image has; a bit of `texts` at that
    # length, the length of a text beside it.
    present, texts = 0, [0] * (num_tokens + 1)
    first, second = lengths[:, 0].tolist(), lengths[:, 1].tolist()
    for i, (n, t) in enumerate(zip(first, second, strict=True)):
        waiting.setdefault((n, t), []).append(i)
        present |= 1 << n
        texts[n] |= 1 << t
    # Pairs placed in order stay in the front of their lists; these are the others.
    num_waiting = {pair: len(places) for pair, places in waiting.items()}

    def leave(n: int, t: int) -> int:
        """Takes such a pair off; the bit of an image length that was the last of it."""
        num_waiting[n, t] -= 1
        if num_waiting[n, t]:
            return 0
        texts[n] ^= 1 << t
        return 0 if texts[n] else 1 << n

    rows = [-1] * len(lengths)
    row, room, rest, slots = 0, num_tokens, num_text, num_slots
    for i, (n, t) in enumerate(zip(first, second, strict=True)):
        if rows[i] >= 0:
            continue
        little = slots < num_slots and room <= close_below * (present.bit_length() - 1)
        if little or n > room or t > rest or not slots:
            candidates = present & (2 << room) - 1
            while slots and candidates:
                longest = candidates.bit_length() - 1
                fitting = texts[longest] & (2 << rest) - 1
                if not fitting:
                    candidates ^= 1 << longest
                    continue
                text = fitting.bit_length() - 1
                rows[waiting[longest, text].pop()] = row
                present ^= leave(longest, text)
                room -= longest
                rest -= text
                slots -= 1
                candidates &= present & (2 << room) - 1
            row, room, rest, slots = row + 1, num_tokens, num_text, num_slots
            if rows[i] >= 0:
                continue
        rows[i] = row
        present ^= leave(n, t)
        room -= n
        rest -= t
        slots -= 1
    return rows
