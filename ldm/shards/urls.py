"""Expansion of shard names: a path, a folder, a glob, a brace pattern, a URL, or a list of these.

An existing path is not a pattern, even if it has special characters. In a pattern, only the part after the existing
folders is expanded.
"""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ldm.config.braces import expand_braces
from ldm.util import UserError, check_keys, check_number, located, refuse_if

MOST_REPEATS = 999  # maximum number of times that an epoch has a sample
_SCHEME = re.compile(r"[a-z][a-z0-9+.-]+:")
_FILE_SCHEME = re.compile("^file:(//)?")


def is_stream(url: str) -> bool:
    """Return True if `url` is a stream without random access, such as `pipe:` or `http:`."""
    return _SCHEME.match(url) is not None and not _is_there(url)


def shard_weights(urls: Any) -> dict[str, float]:
    """Return the shards of training `urls` in order, each with its weight. An entry of a list may be a mapping.

    The mapping has `urls`, as for `expand_urls`, and `weight`, the number of times that an epoch has each sample.

    Raises:
        UserError: as `expand_urls`, or a mapping has another key or no valid weight.
    """
    expand_urls(without_weights(urls))  # refuses a shard that occurs twice
    return {shard: weight for names, weight in _weighted(urls) for shard in expand_urls(names)}


def without_weights(urls: Any) -> Any:
    """Return training `urls` for `expand_urls`, with the names in place of mappings with a weight."""
    if not isinstance(urls, (list, tuple, Mapping)):
        return urls
    return [name for names, _ in _weighted(urls) for name in names]


def _weighted(urls: Any) -> list[tuple[list[Any], float]]:
    """Return the names in each entry of `urls`, with their weight."""
    found: list[tuple[list[Any], float]] = []
    for entry in urls if isinstance(urls, (list, tuple)) else [urls]:
        if not isinstance(entry, Mapping):
            found.append(([entry], 1.0))
            continue
        check_keys("an entry of training_urls", entry, ("urls", "weight"))
        names, weight = entry.get("urls"), entry.get("weight", 1.0)
        if not names or not isinstance(names, (str, Path, list, tuple)):
            raise UserError(f"training_urls: {dict(entry)!r:.100} names no shards; give urls: a/*.tar, and weight: 3")
        check_number("training_urls: weight", weight, above=0, most=MOST_REPEATS, whole=False)
        found.append(([names] if isinstance(names, (str, Path)) else list(names), float(weight)))
    return found


def names_all_there(urls: str | Path | Iterable[str | Path]) -> bool:
    """Return True if `urls` has a folder or a glob, which select all existing shards."""
    for entry in [urls] if isinstance(urls, (str, Path)) else urls:
        for pattern in _split(str(entry)):
            path = _without_scheme(pattern)
            if _is_there(path) and _local(path).is_dir():
                return True
            if not _is_url(path) and not _is_there(path) and glob.has_magic(path[len(existing_folder(path)) :]):
                return True
    return False


def _is_url(name: str) -> bool:
    return is_stream(name) and existing_folder(name) in ("", "/")  # a folder that is there may have a colon


def existing_folder(pattern: str) -> str:
    """Return the longest beginning of `pattern` that is an existing folder, with its slash."""
    end = len(pattern)
    while (end := pattern.rfind("/", 0, end)) > 0:
        if _is_there(pattern[:end]):
            return pattern[: end + 1]
    return "/" if pattern.startswith("/") else ""


def _local(pattern: str) -> Path:
    path = Path(pattern)
    if not path.parts or os.path.lexists(path.parts[0]):  # an existing folder named ~x
        return path
    with located(f"{pattern:.100}", RuntimeError):  # an unknown user
        return path.expanduser()


def _without_scheme(pattern: str) -> str:
    """Return `pattern` without `file:`, unless a file or folder that exists begins with it."""
    if _is_there(pattern) or existing_folder(pattern) not in ("", "/"):
        return pattern
    return _FILE_SCHEME.sub("", pattern)


def _is_there(name: str) -> bool:
    try:
        return os.path.lexists(_local(name))
    except (OSError, ValueError):  # too long, or with a null character
        return False


def _split(entry: str) -> list[str]:
    """Return the patterns that `::` joins in `entry`, unless `entry` is an existing file or folder."""
    path = _without_scheme(entry)
    if _is_there(path):
        return [entry]
    folder = existing_folder(path)
    first, *others = path[len(folder) :].split("::")
    return [folder + first, *others] if "::" in folder else entry.split("::")


def _expand_local(pattern: str, folder: str) -> list[str]:
    """Return the paths of a pattern without braces that begins with the existing `folder`."""
    path = _local(pattern)
    if _is_there(pattern) and path.is_dir():
        found = sorted(str(tar) for tar in path.glob("[!.]*.tar"))  # a hidden file is still being written
        refuse_if(not found, f"{pattern}: the folder has no .tar")
        return found
    if not _is_there(pattern) and glob.has_magic(pattern[len(folder) :]):
        start = glob.escape(str(_local(folder) / "_")[:-1]) if folder else ""
        found = sorted(glob.glob(start + pattern[len(folder) :]))  # noqa: PTH207  (the pattern may begin at the root)
        refuse_if(not found, f"{pattern}: no file matches")
        return found
    return [str(path)]


def _expand(pattern: str) -> Iterator[str]:
    """Yield the shards of one `pattern` without `::`."""
    path = _without_scheme(pattern)
    folder = existing_folder(path)
    if _is_there(path) or folder not in ("", "/"):  # existing folders are not expanded
        names = [path] if _is_there(path) else (folder + rest for rest in expand_braces(path[len(folder) :]))
    else:
        names = expand_braces(pattern)
    for name in names:
        if _is_url(name):
            yield name
        else:
            yield from _expand_local(name, existing_folder(name))


def expand_urls(urls: str | Path | Sequence[str | Path]) -> list[str]:
    """Return the shards of `urls` in order: local paths without `file:`, and URLs of streams.

    Braces and `::` are expanded as in WebDataset. A folder stands for its tars, and a glob for its matches.

    Raises:
        UserError: `urls` are not names, nothing matches, a brace is not closed, or a shard occurs twice.
    """
    urls = [urls] if isinstance(urls, (str, Path)) else urls
    if not isinstance(urls, (list, tuple)) or not all(isinstance(entry, (str, Path)) for entry in urls):
        raise UserError(f"shards {urls!r:.100}: give a path, a pattern or a list of these")
    found = [url for entry in urls for pattern in _split(str(entry)) for url in _expand(pattern)]
    refuse_if(not found, f"{urls!r} names no shards")
    seen: set[str] = set()
    for url in found:
        refuse_if(url in seen, f"{url}: occurs twice among the shards")
        seen.add(url)
    return found
