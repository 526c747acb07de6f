"""Reads the directory of a TIFF file, and of the EXIF block that is one.

Follows TIFF 6.0 section 2, and BigTIFF, whose offsets and counts are 8 bytes wide.
"""

from typing import Literal, NamedTuple

from navit_jax.data.bad_image import BadImage

WIDTH, HEIGHT, BITS, COMPRESSION, PHOTOMETRIC = 256, 257, 258, 259, 262
ORIENTATION = 274
STRIPS, TILES = (273, 279), (324, 325)  # tags of (offsets, byte counts)
# Tags that say how the pixels are stored, with one value and with several. All others
# (resolution, EXIF, XMP, ICC, thumbnails, ...) are kept from the decoder.
SINGLE = frozenset({256, 257, 259, 262, 266, 277, 278, 284, 292, 293, 317, 322, 323})
SINGLE |= {332, 512, 513, 514, 515}
MANY = frozenset({258, 273, 279, 320, 324, 325, 338, 339, 347, 519, 520, 521})
MANY |= {529, 530, 532}
# Bytes of one value of each type.
UNITS = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8}
UNITS |= {13: 4, 16: 8, 17: 8, 18: 8}
UNSIGNED = frozenset({1, 3, 4, 13, 16})


class Field(NamedTuple):
    """One entry of a directory: type, number of values, their bytes, the raw entry."""

    kind: int
    num_values: int
    value: bytes
    entry: bytes


class Directory(NamedTuple):
    """The first directory of a TIFF: the fields asked for, and where the next is."""

    order: Literal["little", "big"]
    big: bool
    fields: dict[int, Field]
    next: int

    def numbers(self, tag: int) -> list[int]:
        """The whole numbers of a field; none if it is absent or of another type."""
        field = self.fields.get(tag)
        if field is None or field.kind not in UNSIGNED:
            return []
        unit = UNITS[field.kind]
        return [
            int.from_bytes(field.value[i : i + unit], self.order)
            for i in range(0, len(field.value), unit)
        ]


def read_directory(data: bytes, tags: frozenset[int]) -> Directory:
    """Reads the fields of the first directory whose tags are asked for.

    A field of an unknown type or without values is left out; the first of two counts.

    Raises:
      BadImage: `truncated`, the directory or a value lies outside of the data;
        `undecodable`, no TIFF header, or values that overlap (they could make a small
        file large).
    """
    if data[:2] not in (b"II", b"MM"):
        raise BadImage("undecodable", "no TIFF header")
    order = "little" if data[:2] == b"II" else "big"

    def uint(start: int, size: int) -> int:
        if start + size > len(data):
            raise BadImage("truncated", "the TIFF directory is outside of the data")
        return int.from_bytes(data[start : start + size], order)

    version = uint(2, 2)
    if version not in (42, 43):
        raise BadImage("undecodable", f"TIFF version {version}")
    big = version == 43
    width = 8 if big else 4
    head = 8 if big else 2
    step = 4 + 2 * width
    start = uint(width, width)
    stop = start + head + uint(start, head) * step
    if stop > len(data):
        raise BadImage("truncated", "the TIFF directory is outside of the data")
    fields: dict[int, Field] = {}
    outside = 0
    for at in range(start + head, stop, step):
        tag, kind, count = uint(at, 2), uint(at + 2, 2), uint(at + 4, width)
        size = UNITS.get(kind, 0) * count
        if tag not in tags or tag in fields or size == 0:
            continue
        value_at = at + 4 + width
        if size > width:
            value_at = uint(value_at, width)
            outside += size
        if value_at + size > len(data):
            raise BadImage("truncated", f"TIFF tag {tag} is outside of the data")
        if outside > len(data):
            raise BadImage("undecodable", "the values of the TIFF tags overlap")
        value = data[value_at : value_at + size]
        fields[tag] = Field(kind, count, value, data[at : at + step])
    after = uint(stop, width) if stop + width <= len(data) else 0
    return Directory(order, big, fields, after)


def orientation_of(directory: Directory) -> int:
    """1 to 8; 1 where there is none.

    Raises:
      BadImage: `undecodable`, any other value.
    """
    if ORIENTATION not in directory.fields:
        return 1
    numbers = directory.numbers(ORIENTATION)
    if not numbers or not 1 <= numbers[0] <= 8:
        raise BadImage("undecodable", f"orientation {numbers[:1]}")
    return numbers[0]


def exif_orientation(exif: bytes) -> int:
    """The orientation, 1 to 8, of an EXIF block; 1 where it has none.

    Raises:
      BadImage: the block can not be read.
    """
    while exif.startswith(b"Exif\0\0"):
        exif = exif[6:]
    return orientation_of(read_directory(exif, frozenset({ORIENTATION})))


def strip_tiff(data: bytes) -> tuple[bytes, Directory]:
    """The file with a directory of only the tags that its pixels need, and that one.

    The new directory is appended, so that all offsets stay what they are. It is the
    only one: the first page of several.

    Raises:
      BadImage: as `read_directory`; `truncated` also where compressed pixels lie
        outside of the data; `undecodable` where a tag of one value has several.
    """
    directory = read_directory(data, SINGLE | MANY | {ORIENTATION})
    for tag in SINGLE & directory.fields.keys():
        if directory.fields[tag].num_values != 1:
            raise BadImage("undecodable", f"TIFF tag {tag} has several values")
    # Uncompressed files often state too large a count for their last strip.
    compressed = directory.numbers(COMPRESSION) not in ([], [1])
    for offsets, counts in (STRIPS, TILES):
        starts, sizes = directory.numbers(offsets), directory.numbers(counts)
        stops = [a + b for a, b in zip(starts, sizes, strict=False)]
        if max(stops if compressed else starts, default=0) > len(data):
            raise BadImage("truncated", "pixels of the TIFF are outside of the data")
    order, width, head = directory.order, 4, 2
    if directory.big:
        width, head = 8, 8
    kept = {tag: f for tag, f in directory.fields.items() if tag != ORIENTATION}
    start = len(data) + len(data) % 2  # a directory begins at an even place
    clean = b"".join(
        [
            data[:width],
            start.to_bytes(width, order),
            data[2 * width :],
            b"\0" * (start - len(data)),
            len(kept).to_bytes(head, order),
            *(kept[tag].entry for tag in sorted(kept)),
            b"\0" * width,
        ]
    )
    return clean, directory
