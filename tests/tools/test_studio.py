"""Tests of tools/studio.py: the page that it serves, and its refusals."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path
from urllib.parse import quote

import pytest

from tests.waiting import LIMIT

ROOT = Path(__file__).resolve().parents[2]
TOOL = ROOT / "tools/studio.py"


def fetch(url: str) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(url, timeout=LIMIT) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def test_the_page_is_served_and_loads_nothing_from_elsewhere(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a file.txt").write_text("content")
    line = [sys.executable, str(TOOL), "--port", "0", "--demo", "--folder", str(tmp_path / "in")]
    (tmp_path / "here").mkdir()
    with subprocess.Popen(line, stdout=subprocess.PIPE, text=True, cwd=tmp_path / "here") as process:
        try:
            address = re.search(r"http://127\.0\.0\.1:\d+/", process.stdout.readline())[0]
            code, page = fetch(address)
            loaded = re.findall(r'(?:src|href)="?(?:https?:)?//[^">]*', page)
            assert (code, loaded) == (200, [])
            assert "fonts.googleapis" not in page and '"analytics_enabled":true' not in page
            assert all(f'"elem_id":"{name}"' in page for name in ("images-open", "train-start", "release-merge"))
            theme = fetch(f"{address}theme.css")[1]
            assert not re.findall(r"@import|url\(['\"]?https?:", theme)
            assert fetch(f"{address}studio/file?path={quote(str(tmp_path / 'in/a file.txt'))}") == (200, "content")
            for path in (tmp_path / "secret", "/etc/passwd", f"{tmp_path}/in/../secret"):
                assert fetch(f"{address}studio/file?path={quote(str(path))}")[0] == 403
            for path in ("/etc/passwd", str(tmp_path / "in/a file.txt")):
                assert fetch(f"{address}gradio_api/file={quote(path)}")[0] in (403, 404)
        finally:
            process.send_signal(signal.SIGINT)
        assert process.wait(LIMIT) in (0, 130)
    assert [path.name for path in (tmp_path / "here").iterdir()] == ["outputs"]


@pytest.mark.parametrize(("options", "reason"), [
    (["--host", "0.0.0.0"], "LDM_STUDIO_PASSWORD"),
    (["--folder", "missing"], "--folder missing: no such folder"),
    (["--port", "70000"], "--port 70000"),
    (["--work", "a{b}"], "--work a{b}: has a letter with a meaning"),
])  # fmt: skip
def test_wrong_options_end_in_one_line(command, options: list[str], reason: str) -> None:
    done = command("tools/studio.py", *options)
    assert done.returncode == 1
    assert reason in done.stderr and done.stderr.count("\n") == 1
