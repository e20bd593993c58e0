"""Tests of JSON and YAML files of data sets: whatever they hold, one line or their content."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from ldm.data.parsed import read_json, read_yaml
from ldm.util import UserError

LAUGHS = "a: &a [lol]\n" + "".join(
    f"{chr(98 + i)}: &{chr(98 + i)} [*{chr(97 + i)}, *{chr(97 + i)}]\n" for i in range(24)
)


def test_read_json_and_read_yaml_return_the_content(tmp_path: Path) -> None:
    (tmp_path / "a").write_text('{"a": [1, "é"]}', encoding="utf-8")
    assert read_json(tmp_path / "a", "list") == read_yaml(tmp_path / "a", "list") == {"a": [1, "é"]}


@pytest.mark.parametrize("read", [read_json, read_yaml])
@pytest.mark.parametrize("kind", ["missing", "pipe", "folder", "large", "deep", "binary", "aliases", "cut"])
def test_what_cannot_be_read_is_one_line(tmp_path: Path, read, kind: str) -> None:
    path = tmp_path / "a"
    texts = {"deep": "[" * 100_000, "binary": b"\xff\xfe\x00", "aliases": LAUGHS, "cut": '{"a": ["b'}
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "large":
        path.touch()
        os.truncate(path, 1 << 40)
    elif kind != "missing":
        path.write_bytes(texts[kind] if isinstance(texts[kind], bytes) else texts[kind].encode())
    with pytest.raises(UserError, match=r"^numbers '/.*a': cannot be read: .") as caught:
        read(path, "numbers")
    assert len(str(caught.value).splitlines()) == 1
