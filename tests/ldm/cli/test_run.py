"""Tests of the entry point of commands: errors, signals, help and log format."""

from __future__ import annotations

import argparse
import logging
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from tqdm import tqdm

from ldm.cli.paths import newest_checkpoint
from ldm.cli.run import NO_MEMORY, HelpFormatter, Lines, PrintableFormatter, call, run
from ldm.util import UserError
from tests.conftest import ROOT
from tests.waiting import LIMIT


def raises(error: BaseException):
    def main() -> None:
        raise error

    return main


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (UserError("size 0: give 1 or more"), "error: size 0: give 1 or more"),
        (FileNotFoundError(2, "No such file or directory", "a.ckpt"), "error: a.ckpt: No such file or directory"),
        (OSError(28, "No space left on device"), "error: No space left on device"),
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has 8.00 GiB."),
            "error: CUDA out of memory; use a smaller batch, with --batch-size if the command has it",
        ),
        (KeyboardInterrupt(), 130),
        (MemoryError(), f"error: {NO_MEMORY}"),
        (OSError(12, "Cannot allocate memory"), f"error: {NO_MEMORY}"),
        (RuntimeError("can't start new thread"), f"error: {NO_MEMORY}"),
        (
            RuntimeError("[enforce fail at alloc_cpu.cpp:1] DefaultCPUAllocator: can't allocate memory: 9"),
            f"error: {NO_MEMORY}",
        ),
        (
            RuntimeError("DataLoader worker (pid(s) 7) exited unexpectedly"),
            "error: DataLoader worker (pid(s) 7) exited unexpectedly: "
            "it may have been killed for lack of memory; use fewer workers",
        ),
        (
            UnicodeEncodeError("ascii", "K\xe4se.png", 1, 2, "ordinal not in range(128)"),
            "error: 'K\\xe4se.png' does not fit the encoding ascii of this locale; "
            "set PYTHONUTF8=1, or a locale such as LC_ALL=C.UTF-8",
        ),
    ],
)
def test_expected_errors_are_one_line(error: BaseException, code: object) -> None:
    with pytest.raises(SystemExit) as end:
        run(raises(error))
    assert end.value.code == code


def test_unexpected_errors_keep_their_traceback() -> None:
    for error in (ZeroDivisionError(), RuntimeError("a shape")):
        with pytest.raises(type(error)):
            run(raises(error))


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), ValueError("ours")])
def test_an_expected_error_in_a_thread_is_one_line(
    error: Exception, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture, monkeypatch
) -> None:
    monkeypatch.setattr("threading.excepthook", None)

    def main() -> None:
        thread = threading.Thread(target=raises(error))
        thread.start()
        thread.join(LIMIT)

    run(main)
    assert ("No space left" in caplog.text) == isinstance(error, OSError)
    assert ("Traceback" in capsys.readouterr().err) == isinstance(error, ValueError)


def test_an_error_begins_a_line_after_a_bar(capsys: pytest.CaptureFixture[str]) -> None:
    def main() -> None:
        for _ in tqdm(range(3)):
            raise UserError("unreadable")

    with pytest.raises(SystemExit):
        run(main)
    assert capsys.readouterr().err.endswith("\n")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_signals_clean_up(tmp_path: Path, number: int, code: int) -> None:
    def main() -> None:
        try:
            (tmp_path / "half.tmp").touch()
            signal.raise_signal(number)
        finally:
            (tmp_path / "half.tmp").unlink()

    before = signal.getsignal(number)
    with pytest.raises(SystemExit) as end:
        run(main)
    assert end.value.code == code and not list(tmp_path.iterdir())
    assert signal.getsignal(number) is before


def test_newest_checkpoint(tmp_path: Path) -> None:
    for age, name in enumerate(("newer", "older")):
        path = tmp_path / name / "checkpoints" / "last.ckpt"
        path.parent.mkdir(parents=True)
        path.touch()
        os.utime(path, (1000 - age, 1000 - age))
    assert newest_checkpoint(tmp_path).parts[-3] == "newer"


def test_newest_checkpoint_refuses_a_folder_without_any(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--train-ckpt"):
        newest_checkpoint(tmp_path)


def test_help_formatter_keeps_the_docstring_and_shows_defaults() -> None:
    parser = argparse.ArgumentParser(description="First,\n    x-%06d.tar", formatter_class=HelpFormatter)
    parser.add_argument("--count", type=int, default=0, help="number of items")
    parser.add_argument("--name", help="label")
    parser.add_argument("--quick", action="store_true", help="skip checks")
    text = parser.format_help()
    assert "First,\n    x-%06d.tar\n" in text and "number of items (default: 0)\n" in text
    assert "label\n" in text and "skip checks\n" in text


@pytest.mark.parametrize(
    ("message", "arguments", "expected"),
    [
        ("\na\n%s", ("b\nc\x1b[2J",), "\na\n" + r"b\nc\x1b[2J"),
        ("%s", (Lines("a\nb\x1b"),), "a\nb" + r"\x1b"),
        ("%d %.1f %s %r", (3, 0.25, None, "a\nb"), r"3 0.2 None 'a\\nb'"),
        ("%s: %s", (Path("a\nb"), ValueError("c\nd")), r"a\nb: c\nd"),
        ("raw \x1b", (), r"raw \x1b"),
        ("%(a)s", ({"a": "b\x1b"},), r"b\x1b"),
    ],
)
def test_printable_formatter_escapes_arguments(message: str, arguments: tuple, expected: str) -> None:
    record = logging.LogRecord("a", logging.INFO, "a.py", 1, message, arguments, None)
    assert PrintableFormatter().format(record) == expected
    assert record.args == (arguments[0] if isinstance(arguments[0], dict) else arguments) if arguments else True


def test_file_names_in_errors_are_escaped() -> None:
    with pytest.raises(SystemExit) as end:
        run(raises(FileNotFoundError(2, "No such file or directory", "a\n\x1bb.ckpt")))
    assert end.value.code == r"error: a\n\x1bb.ckpt: No such file or directory"


def test_a_legacy_locale_prints_every_file_name(tmp_path: Path) -> None:
    code = (
        "import logging; from ldm.cli.run import run; from ldm.util import UserError\n"
        "def main():\n"
        "    logging.info('K\\xe4se \\u732b'); open('K\\xe4se.png')\n"
        "run(main)"
    )
    legacy = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, env=legacy)
    assert done.stdout == "K\\xe4se \\u732b\n"
    assert done.returncode == 1 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


def test_call_runs_this_python_and_prints_the_command(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    call("-c", f"import sys; open({str(tmp_path / 'executable')!r}, 'w').write(sys.executable)")
    assert (tmp_path / "executable").read_text() == sys.executable
    assert caplog.messages[0].startswith("\n$ python -c 'import sys; ")
    with pytest.raises(UserError, match="the command above failed with exit code 3"):
        call("-c", "raise SystemExit(3)")
