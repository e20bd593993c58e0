"""Run folder: its path, its lock, the checkpoint to resume, and the saved configs.

Imports torch only if a launcher started several processes.
"""

from __future__ import annotations

import itertools
import os
import re
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import cached_property
from pathlib import Path

from ldm.distributed.collectives import broadcast_text
from ldm.distributed.ranks import is_first_process, launched
from ldm.events import EventLog
from ldm.files import check_within, remove_leftovers
from ldm.locks import LOCK, check_not_written, locked, make_folders, remove_empty, run_of
from ldm.training.arguments import Arguments
from ldm.util import UserError, refuse_if

# Environment variable that passes the run folder to the processes that Lightning starts for the other devices.
_SHARED_FOLDER = "LDM_RUN_FOLDER"
LAST = "last.ckpt"
_FORMAT = "%Y-%m-%dT%H-%M-%S"
_STARTED = re.compile(r"\d{4}-\d\d-\d\dT\d\d-\d\d-\d\d")


@dataclass(frozen=True)
class Run:
    """Run folder, `logs/<time>_<name>/{checkpoints,configs,images,...}`, and the checkpoint to resume."""

    folder: Path
    started: str  # prefix of the config files, so that they sort by time
    resume: Path | None
    made: tuple[Path, ...] = ()  # folders made by this process, innermost first

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    @property
    def configs(self) -> Path:
        return self.folder / "configs"

    @property
    def saved_configs(self) -> list[Path]:
        """Configs saved by earlier starts of this run, oldest first."""
        return sorted(self.configs.glob("*.yaml"))

    @cached_property
    def events(self) -> EventLog:
        return EventLog(self.folder)


def plan_run(arguments: Arguments) -> Run:
    """Return the run for `arguments`: in the folder of `--resume`, or in a new one.

    A new folder is made at once, so that no other run takes its name.

    Raises:
        UserError: the path of `--resume` does not exist, or needs a config that is not given; or a link in the run
            folder, `--name` or `--postfix` leads out of the folder; or Lightning would change the folder's path.
    """
    started = time.strftime(_FORMAT)
    resume = _literal(_checkpoint_to_resume(arguments.resume, arguments.logdir)) if arguments.resume else None
    own = run_of(resume) if resume is not None else None
    if own is not None:
        if arguments.name:
            raise UserError(f"--name {arguments.name!r} is for a new run; leave it out to resume {own}")
        _check_links(own)
        return Run(own, _after_saved_configs(own / "configs", started), resume)
    refuse_if(
        not arguments.base, f"{resume}: not in a run folder, so its config is unknown; give the config with --base"
    )
    folder, made = _new_folder(arguments, started)
    return Run(folder, started, resume, made)


def _after_saved_configs(configs: Path, started: str) -> str:
    """Return `started`, or the time of the last of `configs` plus one second if the clock was set back.

    A resumed run merges its configs in the order of their names.
    """
    saved = [path.name[: len(started)] for path in configs.glob("*.yaml")]
    newest = max((name for name in saved if _STARTED.fullmatch(name)), default="")
    if started > newest:
        return started
    later = datetime.strptime(newest, _FORMAT) + timedelta(seconds=1)
    return later.strftime(_FORMAT)


def _literal(path: Path) -> Path:
    """Return `path` so that Lightning, which expands `~` and `$NAME`, takes it as it is.

    A `~` that the shell has left is the home folder, unless a folder of that name exists.

    Raises:
        UserError: `path` has the name of an environment variable.
    """
    if str(path).startswith("~"):
        path = path.absolute() if os.path.lexists(path.parts[0]) else path.expanduser()
    refuse_if(
        os.path.expandvars(path) != str(path),
        f"{path}: Lightning would replace the variable in this path; rename the folder",
    )
    return path


def _checkpoint_to_resume(name: str, logs: Path) -> Path:
    """Return the checkpoint at the path `name`, or of the run `name` in the folder `logs`."""
    path = Path(name)
    if not path.exists() and (logs / path).exists():
        path = logs / path
    if path.is_file():
        return path
    if path.is_dir():
        for candidate in (path / "checkpoints" / LAST, path / LAST):
            if candidate.is_file():
                return candidate
        raise UserError(f"--resume {name}: has no checkpoints/last.ckpt; give another run or a checkpoint file")
    raise UserError(f"--resume {name}: no such run folder or checkpoint")


def _check_links(folder: Path) -> None:
    """Raise `UserError` for a link in the run `folder` through which the run would write outside.

    A checkpoint may be a link. The run replaces or removes the link, and its target stays.
    """
    for place, folders, files in os.walk(folder):
        for name in (*folders, *files):
            path = Path(place, name)
            if path.is_symlink() and (path.is_dir() or path.suffix != ".ckpt"):
                check_within(folder, path, "link")


def _check_part(option: str, text: str) -> None:
    """Raise `UserError` unless `text`, the value of `option`, can be a part of a folder name."""
    refuse_if(
        Path(text).name != text or not text.isprintable() or "\\" in text,
        f"{option} {text!r}: becomes part of a folder name; leave out slashes and control characters",
    )


def _new_folder(arguments: Arguments, started: str) -> tuple[Path, tuple[Path, ...]]:
    """Return the folder of a new run, and the folders made for it, innermost first."""
    if "LOCAL_RANK" in os.environ and _SHARED_FOLDER in os.environ:
        return Path(os.environ[_SHARED_FOLDER]), ()
    parts = [started, arguments.name or Path(arguments.base[0]).stem]
    if arguments.name:
        _check_part("--name", arguments.name)
    if arguments.postfix:
        _check_part("--postfix", arguments.postfix)
        parts.append(arguments.postfix.lstrip("_"))
    folder, made = _literal(arguments.logdir / "_".join(parts)), ()
    launch = launched()
    if is_first_process():
        folder, made = _claim_folder(folder)
    if launch and launch.processes * launch.machines > 1:  # their clocks may differ
        folder = Path(broadcast_text(str(folder), launch))
    os.environ[_SHARED_FOLDER] = str(folder)
    return folder, made


def _claim_folder(first: Path) -> tuple[Path, tuple[Path, ...]]:
    """Make the folder `first`; if it exists, `first`-2, `first`-3 and so on. Runs may start in the same second."""
    above = next((place for place in first.parents if place.exists()), None)
    refuse_if(above is not None and not above.is_dir(), f"--logdir {first.parent}: {above} is a file; name a folder")
    outer = make_folders(first.parent)
    for number in itertools.count(1):
        folder = first if number == 1 else first.with_name(f"{first.name}-{number}")
        try:
            folder.mkdir()
        except FileExistsError:
            continue
        return folder, (folder, *outer)
    raise AssertionError("endless")


@contextmanager
def hold_run(run: Run) -> Iterator[None]:
    """Lock the run's folder, and remove a new folder if the run ends before its first step.

    Unfinished files of killed processes are removed from the folder. The first process of a job does this for all.

    Raises:
        UserError: another process trains in the folder, or writes the checkpoint to resume.
    """
    if not is_first_process():
        yield
        return
    try:
        with locked(run.folder / LOCK, str(run.folder)):
            if run.resume is not None:
                check_not_written(run.resume)
            for folder, _, _ in os.walk(run.folder):
                remove_leftovers(Path(folder))
            yield
    finally:
        if run.made and not run.configs.exists() and not any(run.checkpoints.glob("*")):
            if sys.exc_info()[0] is not None:
                shutil.rmtree(run.folder, ignore_errors=True)
            remove_empty(list(run.made))
