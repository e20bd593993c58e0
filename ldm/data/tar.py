"""Where the members of a WebDataset tar lie, read from its headers alone, and fetching them by offset."""

from __future__ import annotations

import os
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from ldm.util import UserError

_GZIP = b"\x1f\x8b"


@dataclass
class TarSample:
    """The members `<key>.<extension>` of one sample: extension (lower case) to (offset, size) in bytes."""

    key: str
    spans: dict[str, tuple[int, int]] = field(default_factory=dict)


def split_name(name: str) -> tuple[str, str]:
    """`"a/b.f8.npy"` as key `"a/b"` and extension `"f8.npy"`: WebDataset cuts at the first dot of the file name."""
    folder, slash, file_name = name.rpartition("/")
    stem, _, extension = file_name.partition(".")
    return folder + slash + stem, extension.lower()


def check_name(name: str, where: str) -> None:
    """Raise `UserError` for a member's name that would lead out of the folder that it is unpacked in."""
    if name.startswith(("/", "\\")) or ".." in name.replace("\\", "/").split("/"):
        raise UserError(f"{where}: refused: its member {name!r} points outside the tar")


def _members(path: Path) -> Iterator[tuple[str, int, int]]:
    """Name, offset and size of each plain file in the tar, in order; whatever is broken is a `UserError`."""
    with path.open("rb") as file:
        if file.read(2) == _GZIP:
            raise UserError(f"{path}: is compressed; unpack it with gunzip, or name it as 'pipe:gzip -dc {path}'")
        file.seek(0)
        try:
            with tarfile.open(fileobj=file, mode="r:") as tar:
                position = -1
                while (member := tar.next()) is not None:
                    if tar.offset <= position or member.size < 0:  # a crafted header can send the reader in circles
                        raise UserError(f"{path}: broken tar: a member of size {member.size} at byte {position}")
                    position = tar.offset
                    tar.members.clear()  # else the whole list stays in memory
                    if not member.isreg():
                        continue
                    if member.sparse is not None:
                        raise UserError(f"{path}: its member {member.name!r} is sparse, which is not read")
                    check_name(member.name, str(path))
                    yield member.name, member.offset_data, member.size
                # tarfile takes a damaged header for the end: only zeros may follow the last member.
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
    """The samples of a plain tar, in the order of their first members; names such as `__meta__.json` are no samples.

    Raises:
        UserError: the tar is missing, truncated, damaged, compressed, holds a name that leads outside, or one twice.
    """
    samples: dict[str, TarSample] = {}
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    for name, offset, size in _members(path):
        key, extension = split_name(name.removeprefix("./"))
        stem = key.rpartition("/")[2]
        if not extension or not stem or (stem.startswith("__") and stem.endswith("__")):
            continue
        sample = samples.setdefault(key, TarSample(key))
        if extension in sample.spans:
            raise UserError(f"{path}: holds {name!r} twice")
        sample.spans[extension] = (offset, size)
    return list(samples.values())


def read_span(descriptor: int, offset: int, size: int, name: str) -> bytearray:
    """`size` bytes at `offset` of an open file; `UserError` naming `name` where it ends early."""
    data = os.pread(descriptor, size, offset)
    if len(data) != size:
        raise UserError(f"{name}: the file ends early; it changed after it was indexed")
    return bytearray(data)  # writable, so that tensors can share it
