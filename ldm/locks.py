"""Locks that allow one writer at a time, of a run folder, a set of shards or a file. Imports no torch.

A lock is a file that is locked with `flock` and names its owner. The kernel releases it when the owner dies, so a lock
does not outlive a kill or a power failure, and a reused process id does no harm. On file systems without `flock`, only
the named owner is checked.

The package `filelock` 4 has only one of these. Its native lock names no owner. Its soft lock is the existence of a file
that names the owner: it remains after a kill on another machine, and after a requeue of a Slurm job elsewhere.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import shlex
import stat
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from ldm.util import UserError, refuse_if

LOCK = ".lock"  # lock file in the folder of a run or a set of shards
_MOST_BYTES = 4096  # size limit of a lock file
_MOST_IN_NAME = 120  # limit in bytes for a file name within the name of its lock
# Links are not followed, because a folder of somebody else could redirect the write.
_FLAGS = os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
# Errors of file systems without flock.
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)
_held: set[int] = set()  # open descriptors of held locks


def _let_go_in_child() -> None:
    """Close the inherited descriptors, so that a data worker that outlives its parent does not hold the lock."""
    for descriptor in _held:
        with suppress(OSError):
            os.close(descriptor)
    _held.clear()


os.register_at_fork(after_in_child=_let_go_in_child)


def process_start(process: int) -> int | None:
    """Return the start of a process in clock ticks since boot, or None if unknown. It distinguishes reused ids."""
    try:
        fields = Path(f"/proc/{process}/stat").read_bytes().rpartition(b")")[2].split()
        return int(fields[19])
    except (OSError, ValueError, IndexError):
        return None


def process_namespace() -> int:
    """Return the id of this process's PID namespace. Process ids of different namespaces are not comparable."""
    try:
        return Path("/proc/self/ns/pid").stat().st_ino
    except OSError:
        return 0


def is_running(process: int, start: int | None = None) -> bool:
    """Return True if the process id `process` is running and, if `start` is given, started at that time."""
    try:
        os.kill(process, 0)  # signal 0 only checks
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # a process of another user
        pass
    return start is None or process_start(process) in (None, start)


@contextmanager
def locked(path: Path, what: str) -> Iterator[None]:
    """Hold the lock file `path` while `what` (a name for messages) is written. Remove the file at the end.

    Missing folders are created, and removed at the end if they are empty. Among several processes of one job, one takes
    the lock for all.

    Raises:
        UserError: another process holds the lock, or a process on another machine may hold it. The message names it.
    """
    made = make_folders(path.parent)
    try:
        descriptor = _take(path, what)
        _held.add(descriptor)
        owner = os.getpid()
        try:
            yield
        finally:
            if os.getpid() == owner:
                with suppress(OSError):
                    path.unlink()  # before the release, so that a process that waits for it detects the removal
                _held.discard(descriptor)
                os.close(descriptor)
    finally:
        remove_empty(made)


@contextmanager
def locked_file(path: Path) -> Iterator[None]:
    """Hold a lock for the file `path` while it is written; see `locked`. For a checkpoint of a run, also lock the run.

    Otherwise a running training could overwrite the `last.ckpt` that another process wrote.
    """
    with ExitStack() as held:
        run = run_of(path)
        if run is not None:
            held.enter_context(locked(run / LOCK, str(run)))
        held.enter_context(locked(_beside(path), str(path)))
        yield


def check_not_written(path: Path) -> None:
    """Raise `UserError` if another process is writing the file `path` under `locked_file`. The message names it."""
    try:
        descriptor = os.open(_beside(path), _FLAGS)
    except OSError:  # no lock, or no permission to read it
        return
    try:
        _flock(descriptor, _beside(path), str(path))
    finally:
        os.close(descriptor)


def is_held(path: Path) -> bool:
    """Return True if the owner named in the lock file `path` is running, or is on another machine.

    Takes no lock, so that it cannot be in the way of a writer.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        owner = _owner(descriptor)
    except OSError:  # a folder
        return False
    finally:
        os.close(descriptor)
    if not owner or owner["host"] != os.uname().nodename:
        return bool(owner)
    start = owner.get("start")
    return is_running(owner["pid"], start if isinstance(start, int) else None)


def run_of(checkpoint: Path) -> Path | None:
    """Return the run folder for the path `checkpoint`, which may not exist, or None if there is no run."""
    for folder in (checkpoint.parent, checkpoint.parent.resolve()):
        if folder.name == "checkpoints" and (folder.parent / "configs").is_dir():
            return folder.parent
    return None


def _beside(path: Path) -> Path:
    return path.with_name(f".{short_name(path.name)}{LOCK}")


def short_name(name: str) -> str:
    """Return `name`, or for a long name a unique shorter one, to which a suffix can be added within 255 bytes."""
    encoded = os.fsencode(name)
    if len(encoded) <= _MOST_IN_NAME:
        return name
    return f"{os.fsdecode(encoded[: _MOST_IN_NAME // 2])}-{hashlib.sha256(encoded).hexdigest()[:16]}"


def make_folders(folder: Path) -> list[Path]:
    """Create `folder`. Return the folders that were missing, innermost first."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    return missing


def remove_empty(folders: list[Path]) -> None:
    """Remove the empty ones among `folders`, which are ordered innermost first."""
    for folder in folders:
        with suppress(OSError):
            folder.rmdir()


def _take(path: Path, what: str) -> int:
    while True:
        try:
            descriptor = os.open(path, _FLAGS | os.O_CREAT, 0o666)
        except OSError as error:
            if error.errno == errno.ELOOP:
                raise UserError(f"{path}: is a link at the path of a lock file; remove it") from error
            error.filename = str(path)
            raise
        try:
            _check_kind(descriptor, path)
            works = _flock(descriptor, path, what)
            if not _is_same_file(descriptor, path):  # its owner has removed it
                os.close(descriptor)
                continue
            _check_owner(_owner(descriptor), path, what, works)
            _write_owner(descriptor, path)
            return descriptor
        except BaseException:
            with suppress(OSError):
                os.close(descriptor)
            raise


def _write_owner(descriptor: int, path: Path) -> None:
    """Write this process as the owner into the locked file, or remove the file if the disk is full."""
    try:
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(_own()).encode(), 0)
    except OSError as error:
        with suppress(OSError):
            path.unlink()
        error.filename = str(path)
        raise


def _check_kind(descriptor: int, path: Path) -> None:
    """Raise `UserError` unless the open file looks like a lock file, whose content may be overwritten."""
    found = os.fstat(descriptor)
    is_lock = stat.S_ISREG(found.st_mode) and found.st_size <= _MOST_BYTES and found.st_nlink <= 1
    refuse_if(
        not is_lock or os.pread(descriptor, 1, 0) not in (b"", b"{"),
        f"{path}: not a lock file, but has the path of one; move it away",
    )


def _flock(descriptor: int, path: Path, what: str) -> bool:
    """Lock the file. Return False if the file system has no locks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):  # PermissionError on some network file systems
        raise UserError(
            f"{what}: {_named(_owner(descriptor))} is writing it ({path}); wait for it to end, or stop it"
        ) from None
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            error.filename = str(path)
            raise
        return False
    return True


def _is_same_file(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _own() -> dict[str, Any]:
    start = process_start(os.getpid())
    return {"host": os.uname().nodename, "pid": os.getpid(), "start": start, "job": os.environ.get("SLURM_JOB_ID")}


def _owner(descriptor: int) -> dict[str, Any]:
    """Return the owner in the lock file, or an empty dict."""
    try:
        owner = json.loads(os.pread(descriptor, _MOST_BYTES, 0))
    except ValueError:
        return {}
    is_whole = isinstance(owner, dict) and isinstance(owner.get("host"), str) and type(owner.get("pid")) is int
    return owner if is_whole and owner["pid"] > 0 else {}


def _named(owner: dict[str, Any]) -> str:
    return f"process {owner['pid']} on {owner['host']!r}" if owner else "another process"


def _check_owner(owner: dict[str, Any], path: Path, what: str, locks_work: bool) -> None:
    """Raise `UserError` if the owner in a lock file may still be writing although the file is not locked here."""
    own = _own()
    if not owner or (own["job"] is not None and owner.get("job") == own["job"]):
        return  # the same Slurm job after a requeue
    if owner["host"] == own["host"]:
        if not locks_work and is_running(owner["pid"], owner.get("start")):
            raise UserError(f"{what}: {_named(owner)} is writing it ({path}); wait for it to end, or stop it")
        return
    raise UserError(
        f"{what}: {_named(owner)} is writing it, or was killed there; if it no longer runs: rm {shlex.quote(str(path))}"
    )
