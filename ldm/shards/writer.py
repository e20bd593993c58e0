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


def is_spread(pattern: str) -> bool:
    """Whether `pattern` names several shards, rather than the one that takes everything."""
    return bool(_NUMBER.search(pattern)) or "{" in pattern


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


class Shard:
    """A context manager that writes samples to the tar at `path`, which appears when it is whole, and on no error.

    The same samples make the same bytes. `entry` is what an index says of the shard once it is whole: name, number of
    samples, bytes, SHA-256.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.samples = 0
        self.entry: dict[str, Any] = {}
        self._open = ExitStack()

    def __enter__(self) -> Shard:
        with ExitStack() as opened:
            temporary = opened.enter_context(atomic_write(self.path))
            self._file = _Hashing(opened.enter_context(temporary.open("wb")))
            # No `with` for the tar: closing it writes the end mark, which a shard cut short must not get.
            self._tar = tarfile.open(fileobj=self._file, mode="w")
            self._open = opened.pop_all()
        return self

    def __exit__(self, *exception: Any) -> None:
        if exception[0] is not None:
            self._open.__exit__(*exception)
            return
        self._tar.close()
        size = self._file.tell()
        self._open.close()
        digest = self._file.sha256.hexdigest()
        self.entry = {"name": self.path.name, "samples": self.samples, "bytes": size, "sha256": digest}

    def write(self, key: str, members: Mapping[str, bytes]) -> None:
        """Add a sample: `members` by extension, such as `f8.npy`."""
        for extension, data in members.items():
            member = tarfile.TarInfo(f"{key}.{extension}")  # owner, group and time are 0: nothing of this machine
            member.size = len(data)
            self._tar.addfile(member, io.BytesIO(data))
        self._tar.members.clear()  # else a header a member stays in memory
        self.samples += 1


class ShardWriter:
    """A context manager that spreads samples over the shards of `pattern`, `shard_size` to each.

    On an error the shard being written is removed. `shards` lists the finished ones, as `Shard.entry`. A pattern that
    names a single file takes all samples.
    """

    def __init__(self, pattern: str, shard_size: int) -> None:
        self.pattern = pattern
        self.shard_size = shard_size if is_spread(pattern) else None
        self.shards: list[dict[str, Any]] = []
        self._paths = shard_paths(pattern)
        self._shard: Shard | None = None

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, *exception: Any) -> None:
        if self._shard is not None:
            self._close(*exception)

    def write(self, key: str, members: Mapping[str, bytes]) -> None:
        """Add a sample: `members` by extension, such as `f8.npy`.

        Raises:
            UserError: the pattern names no further shard.
        """
        if self._shard is not None and self._shard.samples == self.shard_size:
            self._close(None, None, None)
        if self._shard is None:
            path = next(self._paths, None)
            if path is None:
                raise UserError(
                    f"--out {self.pattern}: {len(self.shards)} shards of {self.shard_size} samples are too few"
                )
            self._shard = Shard(path).__enter__()
        self._shard.write(key, members)

    def _close(self, *exception: Any) -> None:
        shard, self._shard = self._shard, None
        shard.__exit__(*exception)
        if shard.entry:
            self.shards.append(shard.entry)
