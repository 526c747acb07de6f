"""Reads size and orientation of a picture file, and strips it to what its pixels need.

No metadata reaches the decoder, so a broken or hostile EXIF block, ICC profile or text
chunk neither fails the picture nor grows in memory nor warns. (Pillow reports through
`warnings`, whose filters belong to the whole process: a thread can not silence them for
itself. So it is given no reason to.) Sizes are read here, not by a decoder, because
some decoders allocate the whole canvas as soon as they see a header.
"""

import re
import zlib
from collections.abc import Callable
from typing import Literal, NamedTuple

from navit_jax.data import npy, tiff
from navit_jax.data.bad_image import BadImage

# Where Pillow itself refuses: half a GiB of RGB.
MAX_PIXELS = 178_956_970
# The table of sizes is uint16.
MAX_SIDE = 65_535
PNG = b"\x89PNG\r\n\x1a\n"
PNG_END = b"\0\0\0\0IEND\xaeB`\x82"


class Picture(NamedTuple):
    """A picture file whose header was read.

    Attributes:
      format: JPEG, PNG, WEBP, GIF, BMP, TIFF or NPY.
      data: The file without what its pixels do not need; of NPY the pixels alone.
      height, width: As stored, before it is turned.
      orientation: 1 to 8, as EXIF counts.
      notes: `animated` has more frames; `pages` has more pages; `metadata` was broken.
      plain_cmyk: A JPEG of four channels without Adobe's mark, so not inverted.
    """

    format: str
    data: bytes | memoryview
    height: int
    width: int
    orientation: int = 1
    notes: tuple[str, ...] = ()
    plain_cmyk: bool = False


def read_header(data: bytes) -> Picture:
    """Reads the header of a whole file, and no pixel.

    Raises:
      BadImage: `empty`, `not_image`, `truncated`, `zero_size`, `too_large` or
        `undecodable`.
    """
    if not data:
        raise BadImage("empty")
    for signature, read in READERS.items():
        if re.match(signature, data, re.DOTALL):
            picture = read(data)
            break
    else:
        raise BadImage("not_image", "no JPEG, PNG, WebP, GIF, BMP, TIFF or NPY")
    height, width = picture.height, picture.width
    # Pillow warns of TIFF and GIF from half of its limit on.
    limit = MAX_PIXELS // 2 if picture.format in ("TIFF", "GIF") else MAX_PIXELS
    if not height or not width:
        raise BadImage("zero_size", f"{height} x {width}")
    if height * width > limit or max(height, width) > MAX_SIDE:
        raise BadImage("too_large", f"{height} x {width}, over {limit} or {MAX_SIDE}")
    return picture


def _number(
    data: bytes,
    start: int,
    size: int,
    order: Literal["little", "big"] = "little",
    signed: bool = False,
) -> int:
    if start + size > len(data):
        raise BadImage("truncated", "the file ends within its header")
    return int.from_bytes(data[start : start + size], order, signed=signed)


def _orientation(exif: bytes, notes: set[str]) -> int:
    if not exif:
        return 1
    try:
        return tiff.exif_orientation(exif)
    except BadImage:
        notes.add("metadata")
        return 1


def _is_profile(icc: bytes) -> bool:
    return icc[36:40] == b"acsp"


def _jpeg(data: bytes) -> Picture:
    notes: set[str] = set()
    kept, exif, at = [data[:2]], b"", 2
    height = width = channels = adobe = 0
    while True:
        at = data.find(b"\xff", at)
        marker = _number(data, at + 1, 1) if at >= 0 else 0xD9
        if marker == 0xFF:
            at += 1
            continue
        if marker in (0x00, 0x01) or 0xD0 <= marker <= 0xD8:  # these have no body
            at += 2
            continue
        if marker == 0xDA:
            kept.append(data[at:])
            break
        stop = at + 2 + _number(data, at + 2, 2, "big") if marker != 0xD9 else at
        if stop > len(data) or marker == 0xD9:
            raise BadImage("truncated", "the file ends before its pixels")
        body, keep = data[at + 4 : stop], not (0xE0 <= marker <= 0xEF or marker == 0xFE)
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            height, width = _number(body, 1, 2, "big"), _number(body, 3, 2, "big")
            channels = _number(body, 5, 1)
        elif body.startswith((b"JFIF\0", b"Adobe")) and marker in (0xE0, 0xEE):
            # These two tell the decoder how colours are stored; shorter is not theirs.
            keep = len(body) >= (14 if marker == 0xE0 else 12)
            adobe |= keep and marker == 0xEE
            notes |= set() if keep else {"metadata"}
        elif body.startswith(b"Exif\0\0") and marker == 0xE1:
            exif = exif or body
        elif body.startswith(b"ICC_PROFILE\0\1") and not _is_profile(body[14:]):
            notes.add("metadata")
        if keep:
            kept.append(data[at:stop])
        at = stop
    turn = _orientation(exif, notes)
    plain = channels == 4 and not adobe
    return Picture(
        "JPEG", b"".join(kept), height, width, turn, tuple(sorted(notes)), plain
    )


def _png(data: bytes) -> Picture:
    notes: set[str] = set()
    kept, exif, at = [PNG], b"", len(PNG)
    width, height = _number(data, 16, 4, "big"), _number(data, 20, 4, "big")
    kind, _ = b"", _number(data, 24, 9)  # the rest of the first chunk is there too
    while at + 8 <= len(data) and kind != b"IEND":
        stop = at + 12 + _number(data, at, 4, "big")
        kind = data[at + 4 : at + 8]
        if kind in (b"IHDR", b"PLTE", b"IDAT"):
            kept.append(data[at:stop])
        elif kind == b"tRNS":
            kept.append(_key_colour(data[at:stop], depth=data[24], colour=data[25]))
        elif kind[:1].islower():
            body = data[at + 8 : stop - 4]
            if zlib.crc32(data[at + 4 : stop - 4]).to_bytes(4) != data[stop - 4 : stop]:
                notes.add("metadata")
            elif kind == b"eXIf":
                exif = body
            elif kind == b"acTL" and int.from_bytes(body[:4]) > 1:
                notes.add("animated")
            elif kind == b"iCCP" and not _is_profile(_inflate(body)):
                notes.add("metadata")
        at = stop
    if at <= len(data):
        # Put behind half a chunk it would be read as the rest of that.
        kept.append(PNG_END)
    turn = _orientation(exif, notes)
    return Picture("PNG", b"".join(kept), height, width, turn, tuple(sorted(notes)))


def _key_colour(chunk: bytes, depth: int, colour: int) -> bytes:
    """The colour that a PNG calls transparent, as Pillow compares it: in 8 bits."""
    if colour == 0 and depth in (2, 4):
        values = [v * 255 // (2**depth - 1) for v in chunk[9:10]]
    elif colour == 2 and depth == 16:
        values = list(chunk[8:14:2])
    else:
        return chunk
    body = b"tRNS" + b"".join(v.to_bytes(2) for v in values)
    return (len(body) - 4).to_bytes(4) + body + zlib.crc32(body).to_bytes(4)


def _inflate(profile: bytes) -> bytes:
    """The first bytes of a compressed ICC profile of a PNG, however long it gets."""
    compressed = profile.partition(b"\0")[2][1:]
    try:
        return zlib.decompressobj().decompress(compressed, 128)
    except zlib.error:
        return b""


def _gif(data: bytes) -> Picture:
    width, height = _number(data, 6, 2), _number(data, 8, 2)
    at = 13 + _table(_number(data, 10, 1))
    kept, control, frames = [data[:at]], b"", 0
    while at < len(data) and data[at] != 0x3B and frames < 2:
        if data[at] == 0x2C:
            frames += 1
            stop = at + 10 + _table(_number(data, at + 9, 1)) + 1
            stop = _blocks_end(data, stop)
            if frames == 1:
                left, top, across, down = (
                    _number(data, at + i, 2) for i in (1, 3, 5, 7)
                )
                # A frame may be larger than the screen that it says it is for.
                width, height = max(width, left + across), max(height, top + down)
                kept += [control, data[at:stop]]
        elif data[at] == 0x21:
            stop = _blocks_end(data, at + 2)
            if data[at + 1 : at + 2] == b"\xf9":
                control = data[at:stop]
        else:
            stop = at + 1
        at = stop
    if not frames:
        raise BadImage("truncated", "the file ends before its first frame")
    notes = ("animated",) if frames > 1 else ()
    return Picture("GIF", b"".join(kept), height, width, notes=notes)


def _table(flags: int) -> int:
    """Bytes of a GIF's colour table, which its flags tell of."""
    return 6 << (flags & 7) if flags & 0x80 else 0


def _blocks_end(data: bytes, at: int) -> int:
    """Where a GIF's chain of blocks ends: behind an empty one, or with the file."""
    while at < len(data) and data[at]:
        at += 1 + data[at]
    return min(at + 1, len(data))


def _webp(data: bytes) -> Picture:
    if 8 + _number(data, 4, 4) > len(data):
        raise BadImage("truncated", "the file is shorter than it says")
    kind = data[12:16]
    if kind == b"VP8X":
        width, height = _number(data, 24, 3) + 1, _number(data, 27, 3) + 1
    elif kind == b"VP8L":
        bits = _number(data, 21, 4)
        width, height = (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    else:
        width, height = _number(data, 26, 2) & 0x3FFF, _number(data, 28, 2) & 0x3FFF
    notes: set[str] = set()
    exif, frames, at = b"", 0, 12
    while at + 8 <= len(data):
        kind, size = data[at : at + 4], _number(data, at + 4, 4)
        if kind == b"EXIF":
            exif = data[at + 8 : at + 8 + size]
        elif kind == b"ICCP" and not _is_profile(data[at + 8 : at + 8 + size]):
            notes.add("metadata")
        frames += kind == b"ANMF"
        at += 8 + size + size % 2
    if frames > 1:
        notes.add("animated")
    turn = _orientation(exif, notes)
    return Picture("WEBP", data, height, width, turn, tuple(sorted(notes)))


def _bmp(data: bytes) -> Picture:
    if _number(data, 14, 4) == 12:
        width, height = _number(data, 18, 2), _number(data, 20, 2)
    else:
        width = _number(data, 18, 4, signed=True)
        # Below 0 where the rows are stored from the top.
        height = abs(_number(data, 22, 4, signed=True))
    return Picture("BMP", data, height, max(width, 0))


def _tiff(data: bytes) -> Picture:
    notes: set[str] = set()
    clean, directory = tiff.strip_tiff(data)
    height, width = directory.numbers(tiff.HEIGHT), directory.numbers(tiff.WIDTH)
    if not height or not width:
        raise BadImage("undecodable", "a TIFF without a size")
    if directory.next:
        notes.add("pages")
    try:
        turn = tiff.orientation_of(directory)
    except BadImage:
        turn = 1
        notes.add("metadata")
    return Picture("TIFF", clean, height[0], width[0], turn, tuple(sorted(notes)))


def _npy(data: bytes) -> Picture:
    height, width, start = npy.read_shape(data)
    pixels = memoryview(data)[start : start + height * width * 3]
    return Picture("NPY", pixels, height, width)


READERS: dict[bytes, Callable[[bytes], Picture]] = {
    rb"\x93NUMPY": _npy,
    rb"\xff\xd8\xff": _jpeg,
    rb"\x89PNG\r\n\x1a\n": _png,
    rb"GIF8[79]a": _gif,
    rb"RIFF....WEBPVP8[ LX]": _webp,
    rb"II[*+]\0|MM\0[*+]": _tiff,
    rb"BM": _bmp,
}
