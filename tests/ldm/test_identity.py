"""A shard that is read again: the same file, after errors that pass."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from ldm.identity import check_identity, identity_of, read_with_retries
from ldm.util import UserError


def failing(times: int, number: int, calls: list[int]):
    def read() -> str:
        calls.append(1)
        if len(calls) <= times:
            raise OSError(number, os.strerror(number))
        return "data"

    return read


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE])
def test_with_retries_outlasts_a_momentary_error(monkeypatch, number: int) -> None:
    pauses: list[float] = []
    monkeypatch.setattr("ldm.identity.time.sleep", pauses.append)
    assert read_with_retries(failing(3, number, []), Path("a.tar")) == "data"
    assert len(pauses) == 3
    calls: list[int] = []
    with pytest.raises(UserError, match=r"a.tar: cannot be read: "):
        read_with_retries(failing(100, number, calls), Path("a.tar"))
    assert len(calls) == 5


@pytest.mark.parametrize(
    ("number", "said"), [(errno.ENOENT, "was deleted or moved"), (errno.EACCES, "Permission denied")]
)
def test_with_retries_does_not_repeat_what_stays(monkeypatch, number: int, said: str) -> None:
    calls: list[int] = []
    with pytest.raises(UserError, match=f"a.tar: .*{said}"):
        read_with_retries(failing(100, number, calls), Path("a.tar"))
    assert len(calls) == 1


def test_check_identity_tells_a_replaced_file(tmp_path: Path) -> None:
    path, other = tmp_path / "a.tar", tmp_path / "b.tar"
    for name in (path, other):
        name.write_bytes(b"same")
    with path.open("rb") as file:
        known = identity_of(file.fileno())
        check_identity(file.fileno(), path, known)
    os.utime(other, ns=(known[1], known[1]))
    other.replace(path)
    with path.open("rb") as file, pytest.raises(UserError, match=r"a.tar: was replaced"):
        check_identity(file.fileno(), path, known)
