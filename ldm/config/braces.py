"""Brace patterns, as WebDataset expands them: `{000..003}` and `{a,b}`."""

from __future__ import annotations

import re
from collections.abc import Iterator

import braceexpand

from ldm.util import UserError

_RANGE = re.compile(r"(-?\d+)\.\.(-?\d+)")
# Characters of all names that a pattern stands for: {0..999999999} would be gigabytes, a million real names are less.
_MOST_EXPANDED = 1 << 26


def expand_braces(pattern: str) -> Iterator[str]:
    """Yield the names that `pattern` stands for, without a leading `file:`.

    Raises:
        UserError: a brace is not closed, or the names are too many.
    """
    try:
        if most_names(pattern) * len(pattern) > _MOST_EXPANDED:
            raise ValueError("stands for too many names; name fewer shards")
        for name in braceexpand.braceexpand(pattern):
            yield re.sub("^file:(//)?", "", name)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{pattern:.100}: {error!s:.200}") from error


def most_names(pattern: str) -> int:
    """Return an upper bound of the number of names that `pattern` stands for, without expanding the braces."""
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
