"""Recursive listing of a folder, which reports unreadable paths."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass, field
from pathlib import Path

from ldm.util import UserError

logger = logging.getLogger(__name__)


@dataclass
class Found:
    """Files of a folder at any depth, hidden files and folders, and unreadable paths with the reason."""

    files: list[Path] = field(default_factory=list)
    hidden: list[Path] = field(default_factory=list)  # without the content of hidden folders
    unreadable: dict[Path, str] = field(default_factory=dict)


class ReadFolders:
    """Folders that a walk has read, so that it reads each once, and circular links end."""

    def __init__(self) -> None:
        self._paths: dict[tuple[int, int], Path] = {}  # by device and inode

    def first_path(self, folder: Path) -> Path:
        """Return the path by which `folder` is read: the first one given. Raises `OSError` if it is not there."""
        state = folder.stat()
        return self._paths.setdefault((state.st_dev, state.st_ino), folder)


def walk(folder: Path) -> Found:
    """List the files in `folder`, sorted by path, without hidden files and folders.

    Links to folders are followed. Each folder is read once, by a path without links if possible, so that circular links
    end. Skipped links give a warning.

    Raises:
        UserError: `folder` cannot be listed.
    """
    found, links, seen = Found(), [], ReadFolders()
    _walk(folder, found, links, seen)
    if folder in found.unreadable:
        raise UserError(f"{folder}: {found.unreadable[folder]}")
    for link in links:  # grows in the loop, because a linked folder may contain links
        _walk(link, found, links, seen)
    found.files.sort()
    return found


def _walk(folder: Path, found: Found, links: list[Path], seen: ReadFolders) -> None:
    """Add the files in `folder` to `found`, and its links to folders to `links`."""
    waiting = [folder]
    while waiting:
        current = waiting.pop()
        try:
            if (first := seen.first_path(current)) != current:
                warn_of_link(current, first)
                continue
            with os.scandir(current) as listing:
                entries = sorted(listing, key=lambda entry: entry.name)
        except OSError as error:
            found.unreadable[current] = folder_fault(error)
            continue
        for entry in entries:
            path = Path(entry.path)
            if entry.name.startswith("."):
                found.hidden.append(path)
                continue
            if is_folder(entry):
                (links if entry.is_symlink() else waiting).append(path)
            elif (reason := fault_of(entry)) is None:
                found.files.append(path)
            else:
                found.unreadable[path] = reason


def warn_of_link(link: Path, first: Path) -> None:
    """Log a warning of a link to a folder that is read by the path `first`."""
    logger.warning("%s: skipped, because this link leads to %s, which is read already", link, first)


def is_folder(entry: os.DirEntry[str]) -> bool:
    """Return True for a folder, or a link to one that can be followed."""
    try:
        return entry.is_dir()
    except OSError:  # a circular link, whose fault `fault_of` tells
        return False


def fault_of(entry: os.DirEntry[str]) -> str | None:
    """Return the reason why `entry`, which is no folder, cannot be read; None for a plain file."""
    try:
        if entry.is_file():
            return None
        return f"is {'a link to a file that is not there' if entry.is_symlink() else 'not a plain file'}"
    except OSError as error:
        return f"cannot be read: {error.strerror}"


def folder_fault(error: OSError) -> str:
    """Return the reason why a folder cannot be read."""
    return f"the folder cannot be read: {error.strerror}"
