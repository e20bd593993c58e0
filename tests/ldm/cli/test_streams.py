"""Standard streams that fail: the program goes on, and its files stay its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.waiting import LIMIT

PROGRAM = """
import logging, os, sys
from tqdm import tqdm
from ldm.cli.run import run

def main():
    with open("file", "w") as file:
        for number in tqdm(range(3), mininterval=0):
            print("line " * 4000, flush=True)
            logging.getLogger("x").info("message %d", number)
            print("line " * 4000, file=sys.stderr, flush=True)
            os.write(1, b"of a library in C")
            file.write(f"{number}\\n")
        file.write("whole\\n")

run(main)
"""


def call(folder: Path, redirected: str) -> tuple[int, str]:
    """Run `PROGRAM` with its streams `redirected`; returns its exit code and its file."""
    (folder / "program.py").write_text(
        PROGRAM.replace('os.write(1, b"of a library in C")', "") if "full" in redirected else PROGRAM
    )
    line = f"{sys.executable} program.py {redirected}"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(["bash", "-c", f"set -o pipefail; {line}"], cwd=folder, env=environment, timeout=LIMIT)
    return done.returncode, (folder / "file").read_text()


@pytest.mark.parametrize(
    "redirected",
    ["> /dev/full", "> /dev/full 2>&1", ">&- 2>&-", "<&- >&- 2>&-", "2>&1 | true", "> /dev/null 2> /dev/full"],
)
def test_a_stream_that_fails_ends_no_program(tmp_path: Path, redirected: str) -> None:
    assert call(tmp_path, redirected) == (0, "0\n1\n2\nwhole\n")


def test_run_says_what_it_can(tmp_path: Path) -> None:
    code, _ = call(tmp_path, "> out 2> err")
    assert code == 0 and (tmp_path / "out").read_text().count("message") == 3
