"""Writers of tar shards. A shard appears only when it is complete, and equal samples give equal bytes."""

from __future__ import annotations

import hashlib
import io
import itertools
import re
import tarfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, BinaryIO

from ldm.config.braces import expand_braces
from ldm.files import atomic_write
from ldm.util import UserError, refuse_if

_NUMBER = re.compile(r"%0?\d*d")


def shard_paths(pattern: str) -> Iterator[Path]:
    """Yield the paths of `pattern` in order: unlimited for `%06d`, limited for `{000..009}`, else one.

    The folder, and the name of an existing file, are not expanded.

    Raises:
        UserError: `pattern` does not end in `.tar`, names several folders, has several numbers, or has an open brace.
    """
    refuse_if(
        not pattern.endswith(".tar"), f"--out {pattern}: name shards such as shards/toms-%06d.tar, or a single .tar"
    )
    path = Path(pattern)
    _check_folder(path)
    if not is_spread(pattern):
        return iter([path])
    numbers = _NUMBER.findall(path.name)
    refuse_if(len(numbers) > 1, f"--out {pattern}: has {len(numbers)} numbers; give one")
    if numbers:
        return (path.with_name(path.name.replace(numbers[0], numbers[0] % number)) for number in itertools.count())
    try:
        names = list(expand_braces(path.name))
    except UserError as error:
        raise UserError(f"--out {pattern}: {str(error).removeprefix(f'{path.name:.100}: ')}") from error
    _check_names(pattern, names)
    return (path.with_name(name) for name in names)


def _check_folder(path: Path) -> None:
    """Raise `UserError` for a folder that is a pattern. The shards of a set share one folder and its index."""
    folder = str(path.parent)
    if path.parent.exists():
        return
    is_pattern = _NUMBER.search(folder) is not None
    with suppress(UserError):  # an open brace is an ordinary character
        is_pattern = is_pattern or len(list(expand_braces(folder))) > 1
    refuse_if(
        is_pattern,
        f"--out {path}: a set needs one folder, but {folder} stands for several; put the pattern into the file "
        "name, or create this folder first if its name is not a pattern",
    )


def _check_names(pattern: str, names: Sequence[str]) -> None:
    twice = next((name for name, count in Counter(names).items() if count > 1), None)
    other = next((name for name in names if "/" in name or not name.endswith(".tar")), None)
    refuse_if(twice is not None, f"--out {pattern}: names {twice} twice")
    refuse_if(other is not None, f"--out {pattern}: names {other}, which is not a shard such as toms-000.tar")


def is_spread(pattern: str) -> bool:
    """Return True if `pattern` names several shards, and False if one shard takes all samples."""
    path = Path(pattern)
    return (bool(_NUMBER.search(path.name)) or "{" in path.name) and not path.exists()


def is_unlimited(pattern: str) -> bool:
    """Return True if `pattern` has names for any number of shards."""
    return is_spread(pattern) and bool(_NUMBER.search(Path(pattern).name))


def existing_shards(pattern: str) -> list[Path]:
    """Return the existing files among `shard_paths(pattern)`."""
    path = Path(pattern)
    if not is_spread(pattern) or not _NUMBER.search(path.name):
        return [path for path in shard_paths(pattern) if path.exists()]
    before, after = _NUMBER.split(path.name)
    matching = re.compile(re.escape(before) + r"\d+" + re.escape(after))
    return sorted(found for found in path.parent.glob("*.tar") if matching.fullmatch(found.name))


class _Hashing:
    """File for writing that computes the SHA-256 of its content."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.sha256 = hashlib.sha256()

    def write(self, data: bytes) -> int:
        self.sha256.update(data)
        return self.file.write(data)

    def tell(self) -> int:
        return self.file.tell()


class Shard:
    """Context manager that writes samples to the tar at `path`. On an error, no file remains.

    After a successful exit, `entry` is the index entry of the shard: name, samples, bytes and SHA-256.
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
            # The tar is closed only on success, because closing writes the end mark.
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
        """Add a sample with `members` by extension, such as `f8.npy`."""
        for extension, data in members.items():
            member = tarfile.TarInfo(
                f"{key}.{extension}"
            )  # owner, group and time are 0, so that equal samples give equal bytes
            member.size = len(data)
            self._tar.addfile(member, io.BytesIO(data))
        self._tar.members.clear()  # to save memory
        self.samples += 1


class ShardWriter:
    """Context manager that writes samples to the shards of `pattern`, `shard_size` per shard.

    A pattern that names one file takes all samples. `shards` has the `Shard.entry` of each finished shard. On an error,
    the current shard is removed.
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
        """Add a sample with `members` by extension, such as `f8.npy`.

        Raises:
            UserError: the pattern has no further name.
        """
        if self._shard is not None and self._shard.samples == self.shard_size:
            self._close(None, None, None)
        if self._shard is None:
            path = next(self._paths, None)
            refuse_if(
                path is None,
                f"--out {self.pattern}: {len(self.shards)} shards of {self.shard_size} samples are too few",
            )
            self._shard = Shard(path).__enter__()
        self._shard.write(key, members)

    def _close(self, *exception: Any) -> None:
        shard, self._shard = self._shard, None
        shard.__exit__(*exception)
        if shard.entry:
            self.shards.append(shard.entry)
