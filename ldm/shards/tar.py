"""Places of the members of a WebDataset tar, read from its headers alone, and members by offset.

It is our own, on top of `tarfile`, since WebDataset reads front to back, while an epoch here is a permutation of all
samples; and since `tarfile` takes a damaged header for the end of the tar.
"""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from ldm.files import MOST_IN_MEMBER, check_file, open_file
from ldm.util import UserError

_GZIP = b"\x1f\x8b"
_MOST_IN_HEADER = 1 << 14  # old Pythons read one in the square of its length
_MOST_IN_TAIL = 1 << 22
_EXTENDED = (
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
)


@dataclass
class TarSample:
    """Members `<key>.<extension>` of one sample: extension (lower case) to (offset, size) in bytes."""

    key: str
    spans: dict[str, tuple[int, int]] = field(default_factory=dict)


def split_name(name: str) -> tuple[str, str]:
    """Return `"a/b.f8.npy"` as key `"a/b"` and extension `"f8.npy"`: WebDataset cuts at the first dot of the name."""
    folder, slash, file_name = name.rpartition("/")
    stem, _, extension = file_name.partition(".")
    return folder + slash + stem, extension.lower()


def is_sample(key: str, extension: str) -> bool:
    """Return whether such a member belongs to a sample; `__meta__.json`, `.hidden` and names without a dot do not."""
    stem = key.rpartition("/")[2]
    return bool(extension and stem) and not (stem.startswith("__") and stem.endswith("__"))


def check_name(name: str, where: str) -> None:
    """Raise `UserError` for a member's name that would lead out of the folder that it is unpacked in."""
    if name.startswith(("/", "\\")) or ".." in name.replace("\\", "/").split("/"):
        raise UserError(f"{where}: refused: its member {name!r} points outside the tar")


class Member(tarfile.TarInfo):
    """Header of a tar. A damaged one raises, where tarfile would take it for the end; the length of extended ones is
    bounded.
    """

    @classmethod
    def frombuf(cls, buf: bytes, encoding: str, errors: str) -> tarfile.TarInfo:
        try:
            return super().frombuf(buf, encoding, errors)
        except tarfile.EOFHeaderError:
            raise
        except tarfile.HeaderError as error:  # which tarfile would take for the end
            raise ValueError(f"no end mark, but a header that is damaged or cut short ({error})") from error

    def _proc_member(self, tar: tarfile.TarFile) -> tarfile.TarInfo:
        """Check the size of an extended header; tarfile calls this for each member."""
        if self.type in _EXTENDED and not 0 <= self.size <= _MOST_IN_HEADER:
            raise ValueError(f"an extended header of {self.size} bytes")
        return super()._proc_member(tar)


def check_member(member: tarfile.TarInfo, where: str) -> bool:
    """Return whether `member` of the tar `where` is a file, not a folder.

    Raises:
        UserError: it is a link, a device or a sparse file, leads outside, or is larger than any sample.
    """
    if member.isdir():
        return False
    if not member.isreg() or member.sparse is not None:
        raise UserError(f"{where}: its member {member.name!r:.200} is no plain file but a link, a device or sparse")
    check_name(member.name, where)
    if not 0 <= member.size <= MOST_IN_MEMBER:
        raise UserError(f"{where}: its member {member.name!r:.200} has {member.size} bytes, too many for a sample")
    return True


def _members(path: Path) -> Iterator[tuple[str, int, int]]:
    """Yield name, offset and size of each plain file in the tar, in order; all that is broken is a `UserError`."""
    with open_file(path) as file:
        if file.read(2) == _GZIP:
            raise UserError(f"{path}: is compressed; unpack it with gunzip, or name it as 'pipe:gzip -dc {path}'")
        file.seek(0)
        try:
            with tarfile.open(fileobj=file, mode="r:", tarinfo=Member) as tar:
                position = -1
                while (member := tar.next()) is not None:
                    if tar.offset <= position or member.size < 0:  # a crafted header can send the reader in circles
                        raise UserError(f"{path}: broken tar: a member of size {member.size} at byte {position}")
                    position = tar.offset
                    tar.members.clear()  # else the whole list stays in memory
                    if check_member(member, str(path)):
                        yield member.name, member.offset_data, member.size
                # A header of zeros is taken for the end: only zeros may follow it.
                file.seek(tar.offset)
                rest = file.read(tarfile.BLOCKSIZE)
                while rest and not rest.strip(b"\0"):
                    rest = file.read(1 << 20)
                if rest or file.tell() < tar.offset + tarfile.BLOCKSIZE:
                    raise UserError(f"{path}: truncated or damaged tar: no end mark at byte {tar.offset}")
        except (UserError, GeneratorExit):
            raise
        except Exception as error:  # on broken input tarfile raises what it comes across: ValueError, OverflowError...
            raise UserError(f"{path}: truncated or damaged tar: {error or type(error).__name__}") from error


def index_tar(path: Path) -> list[TarSample]:
    """Return the samples of a plain tar, in the order of their first members, without names such as `__meta__.json`.

    Raises:
        UserError: the tar is missing, truncated, damaged, compressed, holds a name that leads outside, or one twice.
    """
    samples: dict[str, TarSample] = {}
    check_file(path)
    if not path.exists():
        raise UserError(f"{path}: no such file")
    for name, offset, size in _members(path):
        key, extension = split_name(name.removeprefix("./"))
        if not is_sample(key, extension):
            continue
        sample = samples.setdefault(key, TarSample(key))
        if extension in sample.spans:
            raise UserError(f"{path}: holds {name!r} twice")
        sample.spans[extension] = (offset, size)
    return list(samples.values())


def stream_tar(file: BinaryIO, url: str) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Yield key and members, by extension, of each sample of a tar that is read front to back, compressed or not.

    The members of a sample must follow each other.

    Raises:
        UserError: as `index_tar`; a broken tar raises whatever tarfile trips over.
    """
    current, members = "", {}
    with tarfile.open(fileobj=file, mode="r|*", tarinfo=Member) as tar:
        while (member := tar.next()) is not None:
            tar.members.clear()
            if not check_member(member, url):
                continue
            key, extension = split_name(member.name.removeprefix("./"))
            if not is_sample(key, extension):
                continue
            if key != current and members:
                yield current, members
                members = {}
            if extension in members:
                raise UserError(f"{url}: holds {member.name!r} twice")
            current = key
            members[extension] = tar.extractfile(member).read()
        for _ in range(_MOST_IN_TAIL // tarfile.RECORDSIZE):  # an endless one says nothing
            if tar.fileobj.read(tarfile.RECORDSIZE).strip(b"\0"):
                raise UserError(f"{url}: damaged tar: data behind its end mark")
    if members:
        yield current, members
