"""The set of shards that pre-encoding writes: where it may be, and what is there when it begins or is cut short."""

from __future__ import annotations

import logging
from pathlib import Path

from ldm.data.index import FORMAT_VERSION, INDEX, read_index, write_index
from ldm.data.writer import existing_shards, shard_paths
from ldm.util import UserError

logger = logging.getLogger(__name__)

NULL = "null.t5.npy"


def check_out(out: str, overwrite: bool) -> None:
    """Refuse a pattern that names no shards, to mix two sets in one folder, and to write over what is there.

    Raises:
        UserError: one of these.
    """
    shard_paths(out)
    folder = Path(out).parent
    index, there = read_index(folder), existing_shards(out)
    unfinished = index is not None and not index.get("complete", True)
    if index is not None and not there and not (unfinished and index.get("out") == Path(out).name):
        raise UserError(f"{folder / INDEX}: another set is in this folder, whose index would be lost: take another")
    if there and not overwrite:
        state = ", left by an interrupted run" if unfinished else ""
        raise UserError(
            f"{there[0]} exists{state}; take another folder, or give --overwrite to replace {len(there)} shards"
        )


def begin(out: str) -> None:
    """Mark the set as unfinished, and remove the one that is there: whatever happens next, neither seems whole."""
    folder = Path(out).parent
    write_index(folder, {"format": FORMAT_VERSION, "out": Path(out).name, "complete": False, "shards": []})
    for path in [folder / NULL, *existing_shards(out)]:
        path.unlink(missing_ok=True)


def stop(out: str, interrupted: bool) -> None:
    """Clear up the mark of a set that has no shard yet, and tell a person who interrupted what is there."""
    folder, there = Path(out).parent, existing_shards(out)
    unfinished = not (read_index(folder) or {}).get("complete", True)
    if unfinished and not there:
        (folder / INDEX).unlink()
    if not interrupted:
        return
    if not there:
        logger.warning("interrupted: no shard was finished, none is in %s; give the same command again", folder)
    elif unfinished:
        what = f"{len(there)} shards of an unfinished set, which training refuses, are in {folder}"
        logger.warning("interrupted: %s; give the same command with --overwrite to make it anew", what)
    else:
        logger.warning("interrupted: nothing was written, the %d shards in %s are as they were", len(there), folder)
