"""State of a set of shards in its folder: checks before it begins, and the index while it is unfinished.

The index of an unfinished set has `complete: false`. If the set can be resumed, the index also has the settings that it
is made from.
"""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np

from ldm.files import atomic_write
from ldm.locks import LOCK, locked
from ldm.shards import npy
from ldm.shards.index import FORMAT_VERSION, INDEX, read_index, write_index
from ldm.shards.sample import null_path, null_paths
from ldm.shards.writer import existing_shards, shard_paths
from ldm.util import UserError, refuse_if

logger = logging.getLogger(__name__)

RESUMABLE = "made_from"  # entry of the index: the settings that must be equal for the set to be resumed
PARTS = ".parts"
POLL = 0.5  # seconds between checks for the work of other processes


def check_out(out: str, overwrite: bool) -> None:
    """Check that a set can be written to the pattern `out`. An unfinished set is left to `can_resume`.

    Raises:
        UserError: `out` names no shards, the folder holds another set, or shards would be replaced without `overwrite`.
    """
    shard_paths(out)
    folder = Path(out).parent
    index, there = read_index(folder), existing_shards(out)
    unfinished = index is not None and not index.get("complete", True) and index.get("out") == Path(out).name
    refuse_if(
        index is not None and not there and not unfinished,
        f"{folder / INDEX}: this folder holds another set, and its index would be lost; choose another folder",
    )
    if there and not overwrite and not unfinished:
        raise UserError(f"{there[0]} exists; choose another folder, or give --overwrite to replace {len(there)} shards")


def locked_set(out: str) -> AbstractContextManager[None]:
    """Lock the folder of `out` while a set is written, so that two sets cannot mix.

    Raises:
        UserError: another process writes a set there.
    """
    return locked(Path(out).parent / LOCK, f"--out {out}")


def can_resume(out: str, made_from: Mapping[str, Any]) -> bool:
    """Return True if the folder of `out` holds an unfinished set made from `made_from`.

    Raises:
        UserError: the unfinished set has shards and other settings. The message names the first that differs.
    """
    path = Path(out).parent / INDEX
    index = read_index(path.parent)
    if index is None or index.get("complete", True):
        return False
    begun = index.get(RESUMABLE, {})
    differing = [key for key in {**made_from, **begun} if begun.get(key) != made_from.get(key)]
    if not differing:
        return True
    if not existing_shards(out):
        return False
    key, how = differing[0], f"has no {RESUMABLE}"
    if begun:
        how = f"was begun with {key} {begun.get(key, 'unset')}, this command has {made_from.get(key, 'it unset')}"
    raise UserError(
        f"{path}: the unfinished set {how}; give the same command to resume it, or --overwrite to start again"
    )


def wait_for_begin(out: str, made_from: Mapping[str, Any], is_whole: bool = True) -> bool:
    """Wait until rank 0 has begun the set. Return False if the set is already finished.

    Unless `made_from` `is_whole`, the index of the finished set has further settings.

    Raises:
        UserError: the unfinished set has other settings.
    """
    folder, told = Path(out).parent, False
    while not can_resume(out, made_from):
        index = read_index(folder)
        if index is not None and index.get("complete"):
            finished = index.get(RESUMABLE, {})
            if finished == made_from or (not is_whole and {**finished, **made_from} == finished):
                return False
        if not told:
            logger.info("waiting for rank 0 to begin the set in %s", folder)
        told = True
        time.sleep(POLL)
    return True


def begin(out: str, made_from: Mapping[str, Any] | None = None) -> None:
    """Mark the set as unfinished, then remove the existing set. An interruption leaves no set that looks complete."""
    folder = Path(out).parent
    mark = {"format": FORMAT_VERSION, "out": Path(out).name, "complete": False, "shards": []}
    write_index(folder, mark | ({RESUMABLE: made_from} if made_from else {}))
    shutil.rmtree(folder / PARTS, ignore_errors=True)
    for path in [*null_paths(folder), *existing_shards(out)]:
        path.unlink(missing_ok=True)


def stop(out: str, interrupted: bool) -> None:
    """Remove the index of an unfinished set without shards. Log the state of the folder if the user interrupted."""
    folder, there = Path(out).parent, existing_shards(out)
    index = read_index(folder) or {}
    unfinished = not index.get("complete", True)
    if unfinished and not there:
        (folder / INDEX).unlink()
        shutil.rmtree(folder / PARTS, ignore_errors=True)
    if not interrupted:
        return
    if not there:
        logger.warning("interrupted: %s holds no finished shard; give the same command again", folder)
    elif unfinished:
        how = "again to resume it" if RESUMABLE in index else "with --overwrite to start again"
        what = f"{folder} holds {len(there)} shards of an unfinished set, which training refuses"
        logger.warning("interrupted: %s; give the same command %s", what, how)
    else:
        logger.warning("interrupted: nothing was written, the %d shards in %s are unchanged", len(there), folder)


def finish(out: str, nulls: Mapping[str, np.ndarray], shards: Sequence[Mapping[str, Any]], **about: Any) -> None:
    """Write the arrays `nulls` of `null_path`, by key, then the index with the entries `shards` and `about`."""
    folder = Path(out).parent
    for key, null in nulls.items():
        with atomic_write(null_path(folder, key)) as path:
            path.write_bytes(npy.encode(null))
    index = {"format": FORMAT_VERSION, "out": Path(out).name, "complete": True, **about, "shards": list(shards)}
    write_index(folder, index)
    shutil.rmtree(folder / PARTS, ignore_errors=True)
