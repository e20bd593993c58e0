"""Processes that run functions or scripts of this repository, forked from a server that has imported its modules.

A fresh Python process imports for 3 to 5 s of processor time. A forked one starts in a tenth of a second.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
_CONTEXT = multiprocessing.get_context("forkserver")
# Modules that commands import while they work, beside those of ldm/. The tests add one.
PRELOADED = [
    "main",
    "matplotlib.backends.backend_agg",
    "pytorch_lightning.loggers",
    "safetensors.torch",
    "tensorboard.summary.writer.event_file_writer",
    "torch.optim",
    "torch.utils.tensorboard",
    "transformers.models.clip.modeling_clip",
]


def start(
    function: Callable[..., None],
    *arguments: Any,
    folder: Path,
    output: Path,
    errors: Path | None = None,
    environment: Mapping[str, str] | None = None,
) -> BaseProcess:
    """Start a process that calls `function` in `folder`, on one thread.

    The process appends to the files `output` and `errors`, by default the same. Its environment is `environment`, by
    default that of the caller. `function` and `arguments` must be picklable.
    """
    given = dict(os.environ if environment is None else environment)
    _CONTEXT.set_forkserver_preload([*PRELOADED, *_modules(), "benchmarks.frozen_heap"])  # the last is imported last
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = str(ROOT)  # import path of the server, which the first process starts
    try:
        process = _CONTEXT.Process(target=_call, args=(folder, output, errors or output, given, function, arguments))
        process.start()
    finally:
        os.environ.pop("PYTHONPATH")
        if before is not None:
            os.environ["PYTHONPATH"] = before
    return process


def start_script(words: list[str], folder: Path, output: Path, **options: Any) -> BaseProcess:
    """Start `python` with `words`: a script, with its path in full, and its arguments. See `start` for the rest."""
    return start(run_here, words, folder=folder, output=output, **options)


def run_script(
    words: list[str], folder: Path, environment: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run `python` with `words` to its end, and return what `subprocess.run` with `text` and `capture_output` does."""
    with tempfile.TemporaryDirectory() as kept:
        files = Path(kept, "output"), Path(kept, "errors")
        process = start_script(words, folder, files[0], errors=files[1], environment=environment)
        process.join()
        said = [path.read_text() for path in files]
    return subprocess.CompletedProcess(words, process.exitcode, *said)


def run_here(words: list[str]) -> None:
    """Run a script in this process as `python` does."""
    sys.argv = list(words)
    sys.path.insert(0, str(Path(words[0]).parent))
    runpy.run_path(words[0], run_name="__main__")


def _modules() -> list[str]:
    paths = (path.relative_to(ROOT).with_suffix("") for path in sorted((ROOT / "ldm").rglob("*.py")))
    return [".".join(path.parts).removesuffix(".__init__") for path in paths]


def _call(
    folder: Path,
    output: Path,
    errors: Path,
    environment: Mapping[str, str],
    function: Callable[..., None],
    arguments: tuple[Any, ...],
) -> None:
    for stream, path in ((sys.stdout, output), (sys.stderr, errors)):
        with path.open("ab") as file:
            os.dup2(file.fileno(), stream.fileno())
    multiprocessing.set_start_method("fork", force=True)  # for data workers, as in a process that a user starts
    os.chdir(folder)
    # The server has the variables of the moment when it started, such as the folder of an earlier run.
    os.environ.clear()
    os.environ.update(environment)

    import torch

    torch.set_num_threads(1)
    function(*arguments)
