"""Runs commands of this repository under a guard: it notes, and stops, processes, sockets and files outside a folder.

    python tests/hostile/guard.py PLAN RESULT

PLAN is a JSON file with `allowed`, the one folder in which files may be written, made or removed; `warm`, commands that
are run first without the guard, so that what libraries do as they are imported is done; and `guarded`, commands. A
command is `{"name": ..., "words": [script, argument, ...]}`, and may have `prepare`, `[module, function, argument,
...]`, which is called before without the guard. RESULT gets, by name, what the command exited with, what it said, and
what it did that the guard stopped.
"""

from __future__ import annotations

import importlib
import io
import json
import logging
import os
import runpy
import sys
import traceback
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]

PROCESSES = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "os.forkpty")
SOCKETS = ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto", "socket.bind")
CHANGES = (
    *("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.symlink", "os.truncate", "os.chmod"),
    *("os.utime", "shutil.rmtree", "shutil.move"),
)
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


class Guard:
    """An audit hook that stops what must not happen while it is armed."""

    def __init__(self, allowed: Path) -> None:
        self.allowed = str(allowed.resolve())
        self.armed = False
        self.seen: list[str] = []
        sys.addaudithook(self)

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.armed or not self._is_forbidden(event, arguments):
            return
        self.seen.append(f"{event} {arguments!r:.200}")
        raise PermissionError(13, f"the guard stops {event}")

    def _is_forbidden(self, event: str, arguments: tuple[Any, ...]) -> bool:
        if event in PROCESSES or event in SOCKETS:
            return True
        if event == "open":
            path, _, flags = arguments
            return bool(flags & WRITING) and self._is_outside(path)
        if event in ("shutil.copyfile", "os.symlink"):  # reading outside is no harm, nor is a link to it
            return self._is_outside(arguments[1])
        return event in CHANGES and any(map(self._is_outside, arguments))

    def _is_outside(self, path: Any) -> bool:
        if not isinstance(path, (str, bytes, os.PathLike)) or os.fspath(path) in ("/dev/null", b"/dev/null"):
            return False
        parent, name = os.path.split(os.path.abspath(os.fsdecode(path)))  # noqa: PTH100 (a link itself may be removed)
        place = os.path.join(os.path.realpath(parent), name)  # noqa: PTH118
        return place != self.allowed and not place.startswith(self.allowed + os.sep)


def run_command(words: list[str]) -> dict[str, Any]:
    """Run a command; return its output, `said`, and its `exit`: None, a code, a line or `traceback: ...`."""
    sys.argv = [str(ROOT / words[0]), *words[1:]]
    logging.root.handlers = []  # so that the command sets up its own
    said, code = io.StringIO(), None
    with redirect_stdout(said), redirect_stderr(said):
        try:
            runpy.run_path(sys.argv[0], run_name="__main__")
        except SystemExit as stop:
            code = stop.code
        except BaseException:
            code = f"traceback: {traceback.format_exc()}"
    return {"exit": code, "said": said.getvalue() + (code if isinstance(code, str) else "")}


def main() -> None:
    plan = json.loads(Path(sys.argv[1]).read_text())
    result_path = Path(sys.argv[2]).resolve()
    sys.path.insert(0, str(ROOT))
    guard = Guard(Path(plan["allowed"]))
    result = {command["name"]: run_command(command["words"]) | {"stopped": []} for command in plan["warm"]}
    for command in plan["guarded"]:
        if "prepare" in command:
            module, function, *arguments = command["prepare"]
            getattr(importlib.import_module(module), function)(*arguments)
        guard.seen = []
        guard.armed = True
        outcome = run_command(command["words"])
        guard.armed = False
        result[command["name"]] = outcome | {"stopped": guard.seen}
    result_path.write_text(json.dumps(result))


if __name__ == "__main__":
    main()
