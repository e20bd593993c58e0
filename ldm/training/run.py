"""The folder of a run: where it is, what it goes on from, and the configs that it saved before.

Imports torch only where a launcher started several processes.
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
from pathlib import Path

from ldm.distributed.collectives import said_by_first
from ldm.distributed.ranks import is_first_process, launched
from ldm.files import check_within, remove_leftovers
from ldm.locks import LOCK, check_not_written, locked, make_folders, remove_empty, run_of
from ldm.training.arguments import Arguments
from ldm.util import UserError

# Tells the processes that Lightning starts for the other devices which run they belong to.
_SHARED_FOLDER = "LDM_RUN_FOLDER"
LAST = "last.ckpt"
_FORMAT = "%Y-%m-%dT%H-%M-%S"
_STARTED = re.compile(r"\d{4}-\d\d-\d\dT\d\d-\d\d-\d\d")


@dataclass(frozen=True)
class Run:
    """A run folder, `logs/<time>_<name>/{checkpoints,configs,images,...}`, and the checkpoint that it goes on from."""

    folder: Path
    started: str  # prefix of the config files, so that they sort by time
    resume: Path | None
    made: tuple[Path, ...] = ()  # folders that this start made for it, innermost first

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    @property
    def configs(self) -> Path:
        return self.folder / "configs"

    @property
    def saved_configs(self) -> list[Path]:
        """The configs that earlier starts of this run saved, oldest first."""
        return sorted(self.configs.glob("*.yaml"))


def plan_run(arguments: Arguments) -> Run:
    """Return the run that `arguments` ask for: in the folder of `--resume`, or in a new one.

    A new folder is made at once, so that no other run takes its name.

    Raises:
        UserError: what `--resume` names does not exist, or needs a config that is not given; a link in the run folder
            leads out of it, or `--name` or `--postfix` would.
    """
    started = time.strftime(_FORMAT)
    resume = _checkpoint_to_resume(arguments.resume) if arguments.resume else None
    own = run_of(resume) if resume is not None else None
    if own is not None:
        if arguments.name:
            raise UserError(f"--name {arguments.name!r} names a new run, but --resume goes on in {own}")
        _check_links(own)
        return Run(own, _after_saved_configs(own / "configs", started), resume)
    if not arguments.base:
        raise UserError(f"{resume} lies in no run folder, so its config is unknown: give it with --base")
    folder, made = _new_folder(arguments, started)
    return Run(folder, started, resume, made)


def _after_saved_configs(configs: Path, started: str) -> str:
    """Return `started`, or a second after the last of `configs` where the clock has been set back since.

    The order of their names is the order in which a resumed run merges them.
    """
    saved = [path.name[: len(started)] for path in configs.glob("*.yaml")]
    newest = max((name for name in saved if _STARTED.fullmatch(name)), default="")
    if started > newest:
        return started
    later = datetime.strptime(newest, _FORMAT) + timedelta(seconds=1)
    return later.strftime(_FORMAT)


def _checkpoint_to_resume(name: str) -> Path:
    path = Path(name)
    if path.is_file():
        return path
    if path.is_dir():
        for candidate in (path / "checkpoints" / LAST, path / LAST):
            if candidate.is_file():
                return candidate
        raise UserError(f"--resume {name}: it holds no checkpoints/last.ckpt; did that run save one?")
    raise UserError(f"--resume {name}: no such run folder or checkpoint")


def _check_links(folder: Path) -> None:
    """Raise `UserError` for a link in the run `folder` by which the run would write outside.

    A checkpoint may be a link: it is replaced by a new file, or removed, and what it leads to stays.
    """
    for place, folders, files in os.walk(folder):
        for name in (*folders, *files):
            path = Path(place, name)
            if path.is_symlink() and (path.is_dir() or path.suffix != ".ckpt"):
                check_within(folder, path, "link")


def _check_part(option: str, text: str) -> None:
    """Raise `UserError` unless `text`, given to `option`, can be a part of the name of a folder."""
    if Path(text).name != text or not text.isprintable() or "\\" in text:
        raise UserError(f"{option} {text!r}: becomes a part of the run folder's name; leave out slashes and the like")


def _new_folder(arguments: Arguments, started: str) -> tuple[Path, tuple[Path, ...]]:
    """The folder of a new run, and the folders that were made for it, innermost first."""
    if "LOCAL_RANK" in os.environ and _SHARED_FOLDER in os.environ:
        return Path(os.environ[_SHARED_FOLDER]), ()
    parts = [started, arguments.name or Path(arguments.base[0]).stem]
    if arguments.name:
        _check_part("--name", arguments.name)
    if arguments.postfix:
        _check_part("--postfix", arguments.postfix)
        parts.append(arguments.postfix.lstrip("_"))
    folder, made = arguments.logdir / "_".join(parts), ()
    launch = launched()
    if is_first_process():
        folder, made = _claim_folder(folder)
    if launch and launch.processes * launch.machines > 1:  # whose clocks may differ, or seconds pass between them
        folder = Path(said_by_first(str(folder), launch))
    os.environ[_SHARED_FOLDER] = str(folder)
    return folder, made


def _claim_folder(first: Path) -> tuple[Path, tuple[Path, ...]]:
    """Make `first`, or with a number behind it the first that does not exist: runs of one second get one each."""
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
    """Keep other processes from writing to the run's folder, and remove a new one that never got to its first step.

    What killed processes left half written in the folder is removed. The first process of a job does this for all.

    Raises:
        UserError: another process trains in the folder, or is writing the checkpoint that the run goes on from.
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
