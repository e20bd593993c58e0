"""Expansion of brace patterns like `{000..003}` and `{a,b}`, with the rules of WebDataset."""

from __future__ import annotations

import re
from collections.abc import Iterator

import braceexpand

from ldm.util import UserError

_RANGE = re.compile(r"(-?\d+)\.\.(-?\d+)")
_PLAIN_BACKSLASH = re.compile(r"\\(?![\\{},])")  # escapes nothing, as in a path of Windows
# Total characters of the expanded names. A million shard names need less, and {0..999999999} needs gigabytes.
_MOST_EXPANDED = 1 << 26


def expand_braces(pattern: str) -> Iterator[str]:
    """Yield the names of `pattern`, without a leading `file:`.

    Raises:
        UserError: a brace is not closed, or there are too many names.
    """
    try:
        if most_names(pattern) * len(pattern) > _MOST_EXPANDED:
            raise ValueError("expands to too many names; name fewer shards")
        for name in braceexpand.braceexpand(_PLAIN_BACKSLASH.sub(r"\\\\", pattern)):
            yield re.sub("^file:(//)?", "", name)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{pattern:.100}: {error!s:.200}") from error


def most_names(pattern: str) -> int:
    """Return an upper bound of the number of names of `pattern`, without expanding it."""
    names = 1
    for first, last in _RANGE.findall(pattern):
        names *= abs(int(first) - int(last)) + 1
    choices: list[int] = []  # alternatives of each open brace
    for letter in pattern:
        if letter == "{":
            choices.append(1)
        elif letter == "," and choices:
            choices[-1] += 1
        elif letter == "}" and choices:
            names *= choices.pop()
    return names
