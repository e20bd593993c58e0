"""Writing a set of shards: where it may be, what is there when it begins, is cut short or goes on, and its end.

While a set is made, its index says so, and what it is made from if its maker can go on with it.
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
from ldm.shards.sample import TEXT_ENCODINGS, null_path
from ldm.shards.writer import existing_shards, shard_paths
from ldm.util import UserError

logger = logging.getLogger(__name__)

RESUMABLE = "made_from"  # the index's entry that tells whether a command goes on with the set
PARTS = ".parts"
POLL = 0.5  # seconds between looks at what other processes have done


def check_out(out: str, overwrite: bool) -> None:
    """Refuse a pattern that names no shards, to mix two sets in one folder, and to write over what is there.

    An unfinished set is no hindrance: `goes_on` tells whether it is the same one.

    Raises:
        UserError: one of these.
    """
    shard_paths(out)
    folder = Path(out).parent
    index, there = read_index(folder), existing_shards(out)
    unfinished = index is not None and not index.get("complete", True) and index.get("out") == Path(out).name
    if index is not None and not there and not unfinished:
        raise UserError(f"{folder / INDEX}: another set is in this folder, whose index would be lost: take another")
    if there and not overwrite and not unfinished:
        raise UserError(f"{there[0]} exists; take another folder, or give --overwrite to replace {len(there)} shards")


def locked_set(out: str) -> AbstractContextManager[None]:
    """Hold the lock on the folder of `out`: two sets in the making would mix there.

    Raises:
        UserError: another process makes a set there.
    """
    return locked(Path(out).parent / LOCK, f"--out {out}")


def goes_on(out: str, made_from: Mapping[str, Any]) -> bool:
    """Whether an unfinished set of `out` is there to go on with.

    Raises:
        UserError: one with shards is, but `made_from` something else; says what.
    """
    path = Path(out).parent / INDEX
    index = read_index(path.parent)
    if index is None or index.get("complete", True):
        return False
    begun = index.get(RESUMABLE, {})
    differing = [key for key in made_from if begun.get(key) != made_from[key]]
    if not differing:
        return True
    if not existing_shards(out):
        return False
    key, how = differing[0], "does not say what it is made from"
    if key in begun:
        how = f"was begun with {key} {begun[key]}, this is {made_from[key]}"
    raise UserError(f"{path}: the unfinished set {how}; give the same command to go on, or --overwrite to begin anew")


def wait_for_begin(out: str, made_from: Mapping[str, Any]) -> bool:
    """Wait until another process has begun the set; False if the set is already finished.

    Raises:
        UserError: it is made from something else.
    """
    folder, told = Path(out).parent, False
    while not goes_on(out, made_from):
        index = read_index(folder)
        if index is not None and index.get("complete") and index.get(RESUMABLE) == made_from:
            return False
        if not told:
            logger.info("waiting for rank 0 to begin the set in %s", folder)
        told = True
        time.sleep(POLL)
    return True


def begin(out: str, made_from: Mapping[str, Any] | None = None) -> None:
    """Mark the set as unfinished, and remove the one that is there: whatever happens next, neither seems whole."""
    folder = Path(out).parent
    mark = {"format": FORMAT_VERSION, "out": Path(out).name, "complete": False, "shards": []}
    write_index(folder, mark | ({RESUMABLE: made_from} if made_from else {}))
    shutil.rmtree(folder / PARTS, ignore_errors=True)
    for path in [*(null_path(folder, key) for key in TEXT_ENCODINGS), *existing_shards(out)]:
        path.unlink(missing_ok=True)


def stop(out: str, interrupted: bool) -> None:
    """Clear up the mark of a set that has no shard yet, and tell a person who interrupted what is there."""
    folder, there = Path(out).parent, existing_shards(out)
    index = read_index(folder) or {}
    unfinished = not index.get("complete", True)
    if unfinished and not there:
        (folder / INDEX).unlink()
        shutil.rmtree(folder / PARTS, ignore_errors=True)
    if not interrupted:
        return
    if not there:
        logger.warning("interrupted: no shard was finished, none is in %s; give the same command again", folder)
    elif unfinished:
        how = "again to go on" if RESUMABLE in index else "with --overwrite to make it anew"
        what = f"{len(there)} shards of an unfinished set, which training refuses, are in {folder}"
        logger.warning("interrupted: %s; give the same command %s", what, how)
    else:
        logger.warning("interrupted: nothing was written, the %d shards in %s are as they were", len(there), folder)


def finish(out: str, nulls: Mapping[str, np.ndarray], shards: Sequence[Mapping[str, Any]], **about: Any) -> None:
    """Put the empty caption's encodings and, last, the index beside the shards: `about` says what they are."""
    folder = Path(out).parent
    for key, null in nulls.items():
        with atomic_write(null_path(folder, key)) as path:
            path.write_bytes(npy.encode(null))
    index = {"format": FORMAT_VERSION, "out": Path(out).name, "complete": True, **about, "shards": list(shards)}
    write_index(folder, index)
    shutil.rmtree(folder / PARTS, ignore_errors=True)
