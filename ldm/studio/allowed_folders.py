"""Paths that the page may read: those in the folders named at the start. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ldm.config.load import find_config
from ldm.files import is_within
from ldm.studio.commands import ROOT
from ldm.util import UserError, refuse_if

_SHIPPED = ROOT / "configs"


class AllowedFolders:
    """Folders whose content may be read, at any depth, after links and `..` are followed.

    Args:
        folders: the folders, which must exist.
        further: other files and folders.

    Raises:
        UserError: one of them is not a folder.
    """

    def __init__(self, folders: Sequence[Path], further: Sequence[Path] = ()) -> None:
        for folder in folders:
            refuse_if(not folder.is_dir(), f"--folder {folder}: no such folder")
        self.folders = list(dict.fromkeys(folder.resolve() for folder in folders))
        self._further = [path.resolve() for path in further]

    def add(self, path: Path) -> None:
        """Allow a further file or folder."""
        self._further.append(path.resolve())

    def has(self, path: Path) -> bool:
        """Return True if `path` lies in an allowed folder."""
        return any(is_within(folder, path) for folder in (*self.folders, *self._further))

    def check(self, text: str | Path | None, what: str = "path") -> Path:
        """Return the path `text` if it lies in an allowed folder. `what` names it in messages.

        Raises:
            UserError: it is empty, not a valid path, or lies outside of all of them.
        """
        path = Path(text or "")
        refuse_if(text is None or not str(text).strip(), f"{what}: is empty; give a path")
        if self.has(path):
            return path
        named = ", ".join(map(str, self.folders))
        raise UserError(f"{what} {str(text)!r:.200}: lies outside of the folders that this studio may read ({named}); "
                        "start it with --folder to add one")  # fmt: skip

    def check_existing(self, text: str | Path | None, what: str = "path") -> Path:
        """Return the path `text` as `check` does, if it exists.

        Raises:
            UserError: as `check`, or there is no such file or folder.
        """
        path = self.check(text, what)
        refuse_if(not path.exists(), f"{what} {str(text)!r:.200}: no such file or folder")
        return path

    def check_config(self, name: str, what: str) -> None:
        """Check the file that the tools read as the config `name`, unless that is empty.

        Raises:
            UserError: there is no such file, or it lies neither in this repository's configs nor in an allowed folder.
        """
        if not name:
            return
        if "/" in name:
            self._check_own(Path(name), what)  # before a look at the file
        self._check_own(find_config(name), what)

    def _check_own(self, path: Path, what: str) -> None:
        """Check `path` as `check` does, unless it is one of the shipped configs."""
        if not is_within(_SHIPPED, path):
            self.check(path, what)

    def check_folder(self, text: str | Path | None, what: str = "folder") -> Path:
        """Return the path `text` as `check` does, if it is a folder.

        Raises:
            UserError: as `check`, or there is no such folder.
        """
        path = self.check_existing(text, what)
        refuse_if(not path.is_dir(), f"{what} {str(text)!r:.200}: is not a folder")
        return path
