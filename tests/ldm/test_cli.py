"""What a command line does with errors, and where it looks for checkpoints."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from ldm.cli import newest_checkpoint, run
from ldm.util import UserError


def raises(error: BaseException):
    def main() -> None:
        raise error

    return main


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (UserError("size 0: give 1 or more"), "error: size 0: give 1 or more"),
        (FileNotFoundError(2, "No such file or directory", "a.ckpt"), "error: a.ckpt: No such file or directory"),
        (KeyboardInterrupt(), 130),
    ],
)
def test_errors_of_users_are_one_line(error: BaseException, code: object) -> None:
    with pytest.raises(SystemExit) as end:
        run(raises(error))
    assert end.value.code == code


def test_errors_of_ours_keep_their_traceback() -> None:
    with pytest.raises(ZeroDivisionError):
        run(raises(ZeroDivisionError()))


def test_newest_checkpoint(tmp_path: Path) -> None:
    for age, name in enumerate(("newer", "older")):
        path = tmp_path / name / "checkpoints" / "last.ckpt"
        path.parent.mkdir(parents=True)
        path.touch()
        os.utime(path, (1000 - age, 1000 - age))
    assert newest_checkpoint(tmp_path).parts[-3] == "newer"


def test_no_checkpoint_is_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--train-ckpt"):
        newest_checkpoint(tmp_path)
