"""What a person may write where shards are named: a path, a folder, a glob, a brace pattern, a URL, a list of these."""

from __future__ import annotations

import glob
import re
from collections.abc import Iterable
from pathlib import Path

from ldm.config.braces import expand_braces
from ldm.util import UserError

_SCHEME = re.compile(r"[a-z][a-z0-9+.-]+:")


def is_stream(url: str) -> bool:
    """Whether `url` can only be read front to back: `pipe:`, `http:` and the like."""
    return _SCHEME.match(url) is not None


def names_all_there(urls: str | Path | Iterable[str | Path]) -> bool:
    """Whether `urls` has a folder or a glob, which stand for whatever shards are there."""
    entries = [urls] if isinstance(urls, (str, Path)) else urls
    patterns = [re.sub("^file:(//)?", "", pattern) for entry in entries for pattern in str(entry).split("::")]
    return any(_local(pattern).is_dir() if _is_there(pattern) else glob.has_magic(pattern) for pattern in patterns)


def _local(pattern: str) -> Path:
    try:
        return Path(pattern).expanduser()
    except RuntimeError as error:  # ~nobody
        raise UserError(f"{pattern:.100}: {error}") from error


def _is_there(name: str) -> bool:
    try:
        return _local(name).exists()
    except (OSError, ValueError):  # too long, or with a null character: no name of a file
        return False


def _expand_local(pattern: str) -> list[str]:
    path = _local(pattern)
    if _is_there(pattern) and path.is_dir():
        found = sorted(str(tar) for tar in path.glob("[!.]*.tar"))  # a hidden one is still being written
        if not found:
            raise UserError(f"{pattern}: the folder holds no .tar")
        return found
    if not _is_there(pattern) and glob.has_magic(pattern):
        found = sorted(glob.glob(str(path)))  # noqa: PTH207  (the pattern may begin at the root)
        if not found:
            raise UserError(f"{pattern}: no file matches")
        return found
    return [str(path)]


def expand_urls(urls: str | Path | Iterable[str | Path]) -> list[str]:
    """Every shard that `urls` names, in order: local paths without `file:`, and streams as they are.

    Braces are expanded and `::` joins several, as in WebDataset; a folder stands for its tars, a glob for its matches.

    Raises:
        UserError: nothing matches, a brace is open, or a shard is named twice.
    """
    if isinstance(urls, (str, Path)):
        urls = [urls]
    found: list[str] = []
    for entry in urls:
        for pattern in str(entry).split("::"):
            if _is_there(pattern):  # a name that exists means itself, braces and all
                found += _expand_local(pattern)
                continue
            for url in expand_braces(pattern):
                found += [url] if is_stream(url) else _expand_local(url)
    if not found:
        raise UserError(f"no shards: {urls!r} names none")
    seen: set[str] = set()
    for url in found:
        if url in seen:
            raise UserError(f"{url}: named twice among the shards")
        seen.add(url)
    return found
