"""Reads the header of an .npy file whose array is a picture, uint8 [h w 3].

Such a file needs no decoding. It is what `numpy.save` writes, format 1.0 or 2.0; of the
formats of numpy only the text of its header is known here, so nothing in it is run.
"""

import re

from navit_jax.data.bad_image import BadImage

HEADER = re.compile(
    rb"\{'descr': '\|u1', 'fortran_order': False, "
    rb"'shape': \((\d{1,9}), (\d{1,9}), 3\), \} *\n"
)


def read_shape(data: bytes) -> tuple[int, int, int]:
    """Height and width of the picture, and where in the file its pixels start.

    Raises:
      BadImage: `truncated`, or `undecodable`: an array of another kind.
    """
    if data[6:8] not in (b"\1\0", b"\2\0"):
        raise BadImage("undecodable", f"format {data[6:8].hex('.')} of npy, not 1 or 2")
    start = 10 if data[6] == 1 else 12
    stop = start + int.from_bytes(data[8:start], "little")
    if max(start, stop) > len(data):
        raise BadImage("truncated", "the file ends within its header")
    found = HEADER.fullmatch(data, start, stop)
    if not found:
        text = data[start : min(stop, start + 80)].decode("latin-1").strip()
        raise BadImage("undecodable", f"an array {text}, not uint8 [h w 3] in C order")
    return int(found[1]), int(found[2]), stop
