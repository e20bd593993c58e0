"""Prompts of a prior for what a training is most likely to change, and for all else that a base knows.

Importing this module imports no torch.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path

from ldm.text_files import read_lines
from ldm.util import UserError, check_number

_SCENES = ("a photo of {}", "a drawing of {}")


def keep_prompts(subjects: Sequence[str], table: Path, general: Path, count: int) -> list[str]:
    """Return prompts for the classes `subjects`, for their neighbours in `table`, and `count` lines of `general`.

    The lines are spread over the file. Capitals and further spaces in a class do not matter.

    Raises:
        UserError: a class is in no group of `table`, or `general` has fewer lines.
    """
    lines = [line for _, line in read_lines(general)]
    check_number("--general", count, least=0, most=len(lines))
    subjects = [" ".join(subject.lower().split()) for subject in subjects]
    classes = [name for subject in subjects for name in (subject, *neighbours_of(subject, table))]
    near = [scene.format(_with_article(name)) for name in dict.fromkeys(classes) for scene in _SCENES]
    return [*near, *(lines[number * len(lines) // count] for number in range(count))]


def neighbours_of(subject: str, table: Path) -> list[str]:
    """Return the classes that share a group with the class `subject`, which begins it if any group begins with it.

    `table` has a group per line, of names between commas; lines that begin with # are comments.

    Raises:
        UserError: no group has the class.
    """
    lines = (line for _, line in read_lines(table) if not line.startswith("#"))
    groups = [[name.strip() for name in line.split(",")] for line in lines]
    found = [group for group in groups if group[0] == subject] or [group for group in groups if subject in group]
    if not found:
        known = sorted({name for group in groups for name in group})
        near = difflib.get_close_matches(subject, known, n=1)
        hint = f"{near[0]!r}" if near else f"the most similar of its {len(known)}"
        raise UserError(
            f"--keep {subject!r}: {table} has no such class; take {hint}, and give prompts of your own class with "
            "--prompt in addition"
        )
    return [name for group in found for name in group if name != subject]


def _with_article(name: str) -> str:
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"
