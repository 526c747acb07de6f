"""Reads tars of image and text, from front to end, as samples of members.

A sample is what follows each other and shares a name up to the first dot, as webdataset
has it. Nothing is ever written by a name that a tar gives.
"""

import dataclasses
import pathlib
import tarfile
from collections.abc import Callable, Iterable, Iterator

# A larger member is refused by its header.
MAX_BYTES = 256 * 2**20
# What `tarfile` raises for headers that are no headers.
BROKEN = (tarfile.TarError, ValueError, OverflowError, RecursionError, MemoryError)


@dataclasses.dataclass(frozen=True)
class Member:
    """One file of a tar.

    Attributes:
      name: As the tar has it; "" where the tar ends before its end mark.
      data: Its bytes, if it is wanted.
      reason: Why it can not be used, or "". After `cut` there is none.
    """

    name: str
    data: bytes = b""
    reason: str = ""


def read_members(
    path: pathlib.Path, wanted: Iterable[str], advance: Callable[[int], object]
) -> Iterator[Member]:
    """The files of a tar, in its order.

    `cut` is the last one of a tar that ends before its end mark, or goes on with what
    is no header. Links, devices and names that lead out of a folder are refused.

    Args:
      wanted: Extensions, lower case; of others the data are not read.
      advance: Called with the number of bytes read since it was called last.
    """
    wanted, told = frozenset(wanted), 0
    try:
        # Of the stdlib: formats of names, sizes and checksums are its business.
        tar = tarfile.open(path, "r:")  # noqa: SIM115
    except BROKEN:
        yield Member("", reason="not_tar")
        return
    with tar:
        while True:
            try:
                found = tar.next()
            except BROKEN:
                yield Member("", reason="cut")
                return
            if found is None:
                break
            # It keeps all that it has seen.
            tar.members.clear()  # pyright: ignore[reportAttributeAccessIssue]
            if found.size < 0 or tar.offset <= told:
                yield Member("", reason="cut")
                return
            reason = _refuse(found)
            data = b""
            if not reason and split_name(found.name)[1] in wanted:
                try:
                    file = tar.extractfile(found)
                    data = file.read() if file else b""
                except BROKEN:
                    reason = "cut"
            if found.isreg() or reason:
                yield Member(found.name, data, reason)
            if reason == "cut":
                return
            advance(tar.offset - told)
            told = tar.offset
        with path.open("rb") as file:
            file.seek(tar.offset)
            mark = file.read(tarfile.BLOCKSIZE)
    if mark != bytes(tarfile.BLOCKSIZE):
        yield Member("", reason="cut")


def _refuse(member: tarfile.TarInfo) -> str:
    """Why a member is not looked at, or ""."""
    path = pathlib.PurePosixPath(member.name)
    if path.is_absolute() or ".." in path.parts:
        return "unsafe_name"
    if member.issym() or member.islnk():
        return "link"
    if not (member.isreg() or member.isdir()) or member.issparse():
        return "special_file"
    return "too_large" if member.size > MAX_BYTES else ""


def split_name(name: str) -> tuple[str, str]:
    """The key of a sample and the extension: the file's name parts at its first dot.

    ("", "") of a file that lacks one of them, which is no sample's.
    """
    folder, slash, file = name.removeprefix("./").rpartition("/")
    stem, _, extension = file.partition(".")
    return (
        (f"{folder}{slash}{stem}", extension.lower())
        if stem and extension
        else ("", "")
    )


def read_samples(
    members: Iterable[Member],
) -> Iterator[tuple[str, dict[str, bytes], str]]:
    """Groups members that follow each other and share a key: (key, data, reason).

    With a reason the sample can not be used: that of a member, `duplicate` where its
    key or an extension comes twice, or `cut` where it may lack members.
    """
    seen: set[str] = set()
    key, parts, reason = "", {}, ""
    for member in members:
        if not member.name:
            yield key, {}, member.reason
            return
        name, extension = split_name(member.name)
        if not name:
            if member.reason:
                yield member.name, {}, member.reason
            continue
        if name != key:
            if key:
                yield key, parts, reason
            key, parts, reason = name, {}, "duplicate" if name in seen else ""
            seen.add(name)
        reason = reason or member.reason or ("duplicate" if extension in parts else "")
        parts[extension] = member.data
    if key:
        yield key, parts, reason
