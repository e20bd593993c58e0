"""Writing samples to tar shards that are whole or not there, and the same bytes for the same samples."""

from __future__ import annotations

import hashlib
import io
import itertools
import re
import tarfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, BinaryIO

import braceexpand

from ldm.files import atomic_write
from ldm.util import UserError

_NUMBER = re.compile(r"%0?\d*d")


def shard_paths(pattern: str) -> Iterator[Path]:
    """The names that `pattern` stands for, in order: endless for `%06d`, counted for `{000..009}`, else just one.

    Raises:
        UserError: it does not end in `.tar`, has more than one number, or a brace is open.
    """
    if not pattern.endswith(".tar"):
        raise UserError(f"--out {pattern}: name shards such as shards/toms-%06d.tar, or a single .tar")
    numbers = _NUMBER.findall(pattern)
    if len(numbers) > 1:
        raise UserError(f"--out {pattern}: has {len(numbers)} numbers, one is enough")
    if numbers:
        return (Path(pattern.replace(numbers[0], numbers[0] % number)) for number in itertools.count())
    try:
        return map(Path, list(braceexpand.braceexpand(pattern)))
    except braceexpand.UnbalancedBracesError as error:
        raise UserError(f"--out {pattern}: {error}") from error


def existing_shards(pattern: str) -> list[Path]:
    """The files that `shard_paths(pattern)` would name, as far as they are there."""
    if not _NUMBER.search(pattern):
        return [path for path in shard_paths(pattern) if path.exists()]
    path = Path(pattern)
    before, after = _NUMBER.split(path.name)
    matching = re.compile(re.escape(before) + r"\d+" + re.escape(after))
    return sorted(found for found in path.parent.glob("*.tar") if matching.fullmatch(found.name))


class _Hashing:
    """A file to append to that hashes what passes."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.sha256 = hashlib.sha256()

    def write(self, data: bytes) -> int:
        self.sha256.update(data)
        return self.file.write(data)

    def tell(self) -> int:
        return self.file.tell()


class ShardWriter:
    """A context manager that spreads samples over the shards of `pattern`, `shard_size` to each.

    A shard appears under its name when it is whole; on an error the one being written is removed. `shards` lists the
    finished ones: name, number of samples, bytes, SHA-256. A pattern that names a single file takes all samples.
    """

    def __init__(self, pattern: str, shard_size: int) -> None:
        self.pattern = pattern
        self.shard_size = shard_size if _NUMBER.search(pattern) or "{" in pattern else None
        self.shards: list[dict[str, Any]] = []
        self._paths = shard_paths(pattern)
        self._open = ExitStack()
        self._path: Path | None = None
        self._samples = 0

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, *exception: Any) -> None:
        if exception[0] is None:
            self._finish()
        else:
            self._open.__exit__(*exception)

    def write(self, key: str, members: Mapping[str, bytes]) -> None:
        """Add a sample: `members` by extension, such as `f8.npy`.

        Raises:
            UserError: the pattern names no further shard.
        """
        if self._samples == self.shard_size:
            self._finish()
        if self._path is None:
            self._start()
        for extension, data in members.items():
            member = tarfile.TarInfo(f"{key}.{extension}")  # owner, group and time are 0: nothing of this machine
            member.size = len(data)
            self._tar.addfile(member, io.BytesIO(data))
        self._samples += 1

    def _start(self) -> None:
        self._path = next(self._paths, None)
        if self._path is None:
            raise UserError(f"--out {self.pattern}: {len(self.shards)} shards of {self.shard_size} samples are too few")
        temporary = self._open.enter_context(atomic_write(self._path))
        self._file = _Hashing(self._open.enter_context(temporary.open("wb")))
        # No `with` for the tar: closing it writes the end mark, which a shard cut short must not get.
        self._tar = tarfile.open(fileobj=self._file, mode="w")  # noqa: SIM115
        self._samples = 0

    def _finish(self) -> None:
        if self._path is None:
            return
        self._tar.close()
        size = self._file.tell()
        self._open.close()
        digest = self._file.sha256.hexdigest()
        self.shards.append({"name": self._path.name, "samples": self._samples, "bytes": size, "sha256": digest})
        self._path, self._samples = None, 0
