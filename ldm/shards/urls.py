"""What a person may write where shards are named: a path, a folder, a glob, a brace pattern, a URL, a list of these."""

from __future__ import annotations

import glob
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import braceexpand

from ldm.util import UserError

_SCHEME = re.compile(r"[a-z][a-z0-9+.-]+:")
_RANGE = re.compile(r"(-?\d+)\.\.(-?\d+)")
# Characters of all names that a pattern stands for: {0..999999999} would be gigabytes, a million real names are less.
_MOST_EXPANDED = 1 << 26


def is_stream(url: str) -> bool:
    """Whether `url` can only be read front to back: `pipe:`, `http:` and the like."""
    return _SCHEME.match(url) is not None


def runs_command(text: str) -> bool:
    """Whether `text`, read as URLs, has a `pipe:`, which WebDataset gives to a shell."""
    if ":" not in text:
        return False
    try:
        return any(url.lower().startswith("pipe:") for pattern in text.split("::") for url in _expand_braces(pattern))
    except UserError:  # what cannot be expanded is not read either
        return False


def names_all_there(urls: str | Path | Iterable[str | Path]) -> bool:
    """Whether `urls` has a folder or a glob, which stand for whatever shards are there."""
    entries = [urls] if isinstance(urls, (str, Path)) else urls
    patterns = [re.sub("^file:(//)?", "", pattern) for entry in entries for pattern in str(entry).split("::")]
    return any(_local(pattern).is_dir() if _is_there(pattern) else glob.has_magic(pattern) for pattern in patterns)


def _expand_braces(pattern: str) -> Iterator[str]:
    """The names that `pattern` stands for, without `file:`.

    Raises:
        UserError: a brace is open, or they are too many.
    """
    try:
        if _most_names(pattern) * len(pattern) > _MOST_EXPANDED:
            raise ValueError("stands for too many names; name fewer shards")
        for name in braceexpand.braceexpand(pattern):
            yield re.sub("^file:(//)?", "", name)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{pattern:.100}: {error!s:.200}") from error


def _most_names(pattern: str) -> int:
    """An upper bound of how many names the braces of `pattern` stand for, told without expanding them."""
    names = 1
    for first, last in _RANGE.findall(pattern):
        names *= abs(int(first) - int(last)) + 1
    choices: list[int] = []  # of each brace that is open
    for letter in pattern:
        if letter == "{":
            choices.append(1)
        elif letter == "," and choices:
            choices[-1] += 1
        elif letter == "}" and choices:
            names *= choices.pop()
    return names


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
            for url in _expand_braces(pattern):
                found += [url] if is_stream(url) else _expand_local(url)
    if not found:
        raise UserError(f"no shards: {urls!r} names none")
    seen: set[str] = set()
    for url in found:
        if url in seen:
            raise UserError(f"{url}: named twice among the shards")
        seen.add(url)
    return found
