"""Offsets of the members of a WebDataset tar, from its headers alone.

WebDataset reads a tar from front to back, but an epoch here is a permutation of all samples. `tarfile` treats a damaged
header as the end of the tar. This module therefore extends `tarfile`.
"""

from __future__ import annotations

import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from ldm.files import MOST_IN_MEMBER, check_file, open_file
from ldm.util import UserError, refuse_if

_GZIP = b"\x1f\x8b"
_MOST_IN_HEADER = 1 << 14  # older Python versions take quadratic time for long ones
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
    """Members `<key>.<extension>` of one sample, by lower-case extension.

    `spans` has their (offset, size) in bytes, `checksums` the CRC-32 of the tar header before each.
    """

    key: str
    spans: dict[str, tuple[int, int]] = field(default_factory=dict)
    checksums: dict[str, int] = field(default_factory=dict)


def split_name(name: str) -> tuple[str, str]:
    """Split `"a/b.f8.npy"` into the key `"a/b"` and the extension `"f8.npy"`, at the first dot like WebDataset."""
    folder, slash, file_name = name.rpartition("/")
    stem, _, extension = file_name.partition(".")
    return folder + slash + stem, extension.lower()


def is_sample(key: str, extension: str) -> bool:
    """Return True if a member belongs to a sample, unlike `__meta__.json`, `.hidden` and names without a dot."""
    stem = key.rpartition("/")[2]
    return bool(extension and stem) and not (stem.startswith("__") and stem.endswith("__"))


def check_name(name: str, where: str) -> None:
    """Raise `UserError` for a member's name that points outside the folder of unpacking."""
    if name.startswith(("/", "\\")) or ".." in name.replace("\\", "/").split("/"):
        raise UserError(f"{where}: refused: its member {name!r} points outside the tar")


def names_sample(header: bytes, key: str, extension: str) -> bool:
    """Return True if a tar header names the member `extension` of the sample `key`."""
    try:
        member = tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape")
    except tarfile.HeaderError:
        return False
    return member.isreg() and split_name(member.name.removeprefix("./")) == (key, extension)


class Member(tarfile.TarInfo):
    """Tar header that raises an error if it is damaged. `tarfile` takes a damaged header for the end of the tar.

    Extended headers have a size limit. `checksum` is the CRC-32 of the header.
    """

    @classmethod
    def frombuf(cls, buf: bytes, encoding: str, errors: str) -> tarfile.TarInfo:
        try:
            member = super().frombuf(buf, encoding, errors)
            member.checksum = zlib.crc32(buf)
            return member
        except tarfile.EOFHeaderError:
            raise
        except tarfile.HeaderError as error:  # tarfile would end the tar here
            raise ValueError(f"damaged or truncated header instead of an end mark ({error})") from error

    def _proc_member(self, tar: tarfile.TarFile) -> tarfile.TarInfo:
        """Check the size of an extended header. tarfile calls this for each member."""
        if self.type in _EXTENDED and not 0 <= self.size <= _MOST_IN_HEADER:
            raise ValueError(f"extended header of {self.size} bytes")
        return super()._proc_member(tar)


def check_member(member: tarfile.TarInfo, where: str) -> bool:
    """Return True if `member` of the tar `where` is a file, and False for a folder.

    Raises:
        UserError: it is a link, a device or a sparse file, points outside, or is larger than any sample.
    """
    if member.isdir():
        return False
    name = f"{where}: its member {member.name!r:.200}"
    is_plain = member.isreg() and member.sparse is None
    refuse_if(not is_plain, f"{name} is not a plain file but a link, a device or sparse")
    check_name(member.name, where)
    is_too_large = not 0 <= member.size <= MOST_IN_MEMBER
    refuse_if(is_too_large, f"{name} has {member.size} bytes; a member may have up to {MOST_IN_MEMBER}")
    return True


def _members(path: Path) -> Iterator[tuple[str, int, int, int]]:
    """Yield name, offset, size and header's CRC-32 of each plain file in the tar. Raise `UserError` for any damage."""
    with open_file(path) as file:
        refuse_if(
            file.read(2) == _GZIP, f"{path}: is compressed; unpack it with gunzip, or name it as 'pipe:gzip -dc {path}'"
        )
        file.seek(0)
        try:
            with tarfile.open(fileobj=file, mode="r:", tarinfo=Member) as tar:
                position = -1
                while (member := tar.next()) is not None:
                    if tar.offset <= position or member.size < 0:  # a crafted header could cause an endless loop
                        raise UserError(f"{path}: broken tar: a member of size {member.size} at byte {position}")
                    position = tar.offset
                    tar.members.clear()  # to save memory
                    if check_member(member, str(path)):
                        yield member.name, member.offset_data, member.size, member.checksum
                # tarfile ends at a header of zeros. Only zeros may follow it.
                file.seek(tar.offset)
                rest = file.read(tarfile.BLOCKSIZE)
                while rest and not rest.strip(b"\0"):
                    rest = file.read(1 << 20)
                refuse_if(
                    rest or file.tell() < tar.offset + tarfile.BLOCKSIZE,
                    f"{path}: truncated or damaged tar: no end mark at byte {tar.offset}",
                )
        except (UserError, GeneratorExit):
            raise
        except Exception as error:  # on damaged input, tarfile raises ValueError, OverflowError, ...
            raise UserError(f"{path}: truncated or damaged tar: {error or type(error).__name__}") from error


def index_tar(path: Path) -> list[TarSample]:
    """Return the samples of an uncompressed tar, in the order of their first members.

    Raises:
        UserError: the tar is missing, truncated, damaged or compressed, or has a repeated name or one that points
            outside.
    """
    samples: dict[str, TarSample] = {}
    check_file(path)
    refuse_if(not path.exists(), f"{path}: no such file")
    for name, offset, size, checksum in _members(path):
        key, extension = split_name(name.removeprefix("./"))
        if not is_sample(key, extension):
            continue
        sample = samples.setdefault(key, TarSample(key))
        if extension in sample.spans:
            raise UserError(f"{path}: has the member {name!r} twice")
        sample.spans[extension] = (offset, size)
        sample.checksums[extension] = checksum
    return list(samples.values())


def stream_tar(file: BinaryIO, url: str) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Yield key and members (by extension) of each sample of a streamed tar, which may be compressed.

    The members of a sample must be adjacent.

    Raises:
        UserError: as `index_tar`. A damaged tar raises the exceptions of tarfile.
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
                raise UserError(f"{url}: has the member {member.name!r} twice")
            current = key
            members[extension] = tar.extractfile(member).read()
        for _ in range(_MOST_IN_TAIL // tarfile.RECORDSIZE):  # a bounded number of reads, for endless streams
            refuse_if(tar.fileobj.read(tarfile.RECORDSIZE).strip(b"\0"), f"{url}: damaged tar: data after its end mark")
    if members:
        yield current, members
