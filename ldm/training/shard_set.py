"""Writing a set of shards: where it may be, and what is there when it begins, is cut short, or is whole."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ldm.data import npy
from ldm.data.index import INDEX, read_index, write_index
from ldm.data.writer import ShardWriter, existing_shards, shard_paths
from ldm.files import atomic_write
from ldm.util import UserError

logger = logging.getLogger(__name__)

FORMAT_VERSION = 1
NULL = "null.t5.npy"

Sample = tuple[str, Mapping[str, bytes]]  # its key, and its members by extension


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


def write_samples(out: str, batches: Iterable[Iterable[Sample]], shard_size: int) -> list[dict[str, Any]]:
    """Write the shards of `out`, which stay marked as unfinished until `finish`; returns what `ShardWriter` lists.

    The old set goes when the first batch is there. Whatever `batches` raises comes through.
    """
    writer, begun = ShardWriter(out, shard_size), False
    try:
        with writer:
            for batch in batches:
                samples = list(batch)
                if not begun:  # only now it is sure that there will be a set to replace the old one
                    _begin(out)
                    begun = True
                for key, members in samples:
                    writer.write(key, members)
    except BaseException as error:
        _stop(out, interrupted=isinstance(error, KeyboardInterrupt))
        raise
    return writer.shards


def finish(out: str, null: np.ndarray, shards: list[dict[str, Any]], **about: Any) -> None:
    """Put the empty caption's encoding and, last, the index beside the shards: `about` says what they are."""
    folder = Path(out).parent
    with atomic_write(folder / NULL) as path:
        path.write_bytes(npy.encode(null))
    index = {"format": FORMAT_VERSION, "out": Path(out).name, "complete": True, **about, "shards": shards}
    write_index(folder, index)


def _begin(out: str) -> None:
    """Mark the set as unfinished, and remove the one that is there: whatever happens next, neither seems whole."""
    folder = Path(out).parent
    write_index(folder, {"format": FORMAT_VERSION, "out": Path(out).name, "complete": False, "shards": []})
    for path in [folder / NULL, *existing_shards(out)]:
        path.unlink(missing_ok=True)


def _stop(out: str, interrupted: bool) -> None:
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
