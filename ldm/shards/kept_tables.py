"""Tables of large shards, kept in a file of their folder and memory-mapped from there.

Building a table walks the headers of the tar, 0.2 ms per sample. Data workers share the pages of a kept one. The tar
remains the authority: a table is used only while the size and modification time of its shard are the same, and the
reader compares the tar header of each member that it reads.

For shards on a server, the file that the writer of the set left beside them is copied, and its tables are used if they
fill the tar without a gap; the reader then compares the names of members too. Tables of other shards are built once,
from whole copies, and kept in the cache.

The file `.members.safetensors` holds the columns of the shards in order, and in its metadata, as JSON, `extensions`
(M), `kinds` (shape and dtype), `shards` (name, bytes, modification time in ns, number of samples), and `crc32` of all
that. A wrong key or extension would be a wrong caption, which the tar headers do not tell.
"""

from __future__ import annotations

import json
import logging
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch

from ldm.checkpoint import open_checkpoint, save_state_dict
from ldm.checkpoint.writing import InParts
from ldm.files import MOST_IN_MEMBER
from ldm.identity import Identity
from ldm.remote.copies import cache_folder, local_copy, state_of
from ldm.remote.path import RemotePath, ShardPath
from ldm.remote.retries import NotServed
from ldm.shards.sample import SIZES
from ldm.shards.spans import beside_shards, identity_of_shard
from ldm.shards.table import MOST_MEMBERS, Columns, ShardTable, build_table, fills
from ldm.shards.table_spool import COLUMNS, JoinedTables, StoredTable, TableSpool
from ldm.util import UserError

logger = logging.getLogger(__name__)

TABLES = ".members.safetensors"
LEAST_SAMPLES = 256  # of a shard whose table is kept; smaller ones are built in 50 ms
_VERSION = "2"
_DESCRIBED = ("version", "extensions", "kinds", "shards")  # keys of the metadata
_TYPES = ("uint8", "int64", "int64", "int32", "uint32", "int32", "uint8")  # of the columns, in order


def open_tables(paths: Sequence[ShardPath]) -> Iterator[ShardTable]:
    """Yield the tables of `paths`, in order. They are built where none is kept, and kept for the next time.

    Raises:
        UserError: a shard is missing or damaged; see `index_tar`.
    """
    kept = {folder: _kept_tables(folder) for folder in dict.fromkeys(path.parent for path in paths)}
    with closing(_NewTables()) as built:
        for path in paths:
            identity = identity_of_shard(path)
            table = kept[path.parent].get(path.name)
            if table is None or not _is_of(table, path, identity):
                is_remote = isinstance(path, RemotePath)
                table = _build_from_copy(path, identity) if is_remote else build_table(path)
                if len(table) >= LEAST_SAMPLES or is_remote:
                    built.add(table)
            yield ShardTable(path, identity, table.extensions, table.kinds, table.columns)
        for folder in kept:
            built.write(folder, kept[folder])


def keep_tables(paths: Sequence[Path]) -> None:
    """Keep the tables of newly written shards, so that the first start is as quick as the next ones."""
    for _ in open_tables(paths):
        pass


def _is_current(table: ShardTable) -> bool:
    # Of a shard on a server, this is asked when the table is used.
    return isinstance(table.path, RemotePath) or identity_of_shard(table.path)[:2] == table.identity[:2]


def _is_of(table: ShardTable, path: ShardPath, identity: Identity) -> bool:
    """Return True if a kept table may be used for the shard at `path`.

    A server does not keep modification times. Of a table that another machine left there, the size must be equal, and
    the content of the tar must be what it lists.
    """
    if table.identity[:2] == identity[:2]:
        return True
    return isinstance(path, RemotePath) and table.identity[0] == identity[0] and fills(table, state_of(path).head)


def _build_from_copy(path: RemotePath, identity: Identity) -> ShardTable:
    """Return the table of a shard on a server, from a whole copy."""
    logger.info("%s: is read completely once, for the places of its samples", path)
    copy = local_copy(path, identity)
    try:
        return replace(build_table(copy), path=path, identity=identity)
    except UserError as error:
        raise UserError(str(error).replace(str(copy), str(path))) from error


def _place(folder: ShardPath) -> Path:
    """Return the path of the file with the kept tables of the shards in `folder`."""
    return (cache_folder() / f"{folder.digest}-tables" if isinstance(folder, RemotePath) else folder) / TABLES


def tables_of(path: ShardPath) -> str:
    """Return the file with the table of a shard for messages; for one on a server, both places of such a file."""
    beside = str(path.parent / TABLES)
    return f"{beside}, or {_place(path.parent)}," if isinstance(path, RemotePath) else beside


def _kept_tables(folder: ShardPath) -> dict[str, ShardTable]:
    """Return the tables kept for the shards in `folder`, by the name of the shard."""
    tables = _read_tables(_place(folder), folder)
    if isinstance(folder, RemotePath):
        with suppress(NotServed):
            tables = {**_read_tables(beside_shards(folder / TABLES), folder), **tables}
    return tables


class _NewTables:
    """Tables to keep, by folder. Memory does not hold them. A folder that cannot be written to keeps none."""

    def __init__(self) -> None:
        self._spools: dict[ShardPath, TableSpool | None] = {}

    def add(self, table: ShardTable) -> None:
        """Add a table that was built."""
        folder = table.path.parent
        try:
            if folder not in self._spools:
                self._spools[folder] = TableSpool(_place(folder).parent)
            if self._spools[folder] is not None:
                self._spools[folder].add(table)
        except OSError:
            self._forget(folder)

    def write(self, folder: ShardPath, kept: Mapping[str, ShardTable]) -> None:
        """Write the tables of the shards in `folder` to their file, after those of `kept` that are still valid."""
        spool = self._spools.get(folder)
        if spool is None:
            return
        names = {table.path.name for table in spool.tables}
        lasting = [table for name, table in kept.items() if name not in names and _is_current(table)]
        with suppress(OSError):
            _write_tables(folder, [*map(StoredTable.of, lasting), *spool.finish()])
        self._forget(folder)

    def _forget(self, folder: ShardPath) -> None:
        """Keep no further tables of `folder`."""
        spool, self._spools[folder] = self._spools.get(folder), None
        if spool is not None:
            spool.close()

    def close(self) -> None:
        """Remove the temporary files."""
        for folder in self._spools:
            self._forget(folder)


def _write_tables(folder: ShardPath, tables: Sequence[StoredTable]) -> None:
    """Keep `tables` in their folder."""
    joined = JoinedTables.of(tables)
    if len(joined.extensions) > MOST_MEMBERS:  # shards of several sets
        return
    shards = [[table.path.name, *table.identity[:2], table.samples] for table in tables]
    described = {"version": _VERSION, "extensions": joined.extensions, "kinds": joined.kinds, "shards": shards}
    metadata = {key: json.dumps(value) for key, value in described.items()}
    metadata["crc32"] = str(_checksum(joined.parts, metadata))
    tensors = {
        name: InParts(joined.shape(name), getattr(torch, dtype), partial(_tensors, joined, name))
        for name, dtype in zip(COLUMNS, _TYPES, strict=True)
    }
    place = _place(folder)
    save_state_dict(tensors, place, metadata=metadata)
    logger.info("wrote %s: the places of %d samples, for a quick start", place, sum(table.samples for table in tables))


def _tensors(joined: JoinedTables, name: str) -> Iterator[torch.Tensor]:
    return map(torch.from_numpy, joined.parts(name))


def _read_tables(path: Path, folder: ShardPath) -> dict[str, ShardTable]:
    """Return the tables in the file `path`, by the name of the shard in `folder`. A damaged file counts as none."""
    if not path.is_file():
        return {}
    try:
        opened = open_checkpoint(path)
        return _tables_in(folder, opened.content["state_dict"], opened.metadata)
    except (UserError, OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        logger.warning("%s: damaged; it is made again", path)
        return {}


def _tables_in(
    folder: ShardPath, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]
) -> dict[str, ShardTable]:
    about = {key: json.loads(metadata[key]) for key in _DESCRIBED}
    if about["version"] != _VERSION:
        return {}
    if str(checksum_of({name: tensor.numpy() for name, tensor in tensors.items()}, metadata)) != metadata["crc32"]:
        raise ValueError("its checksum differs")
    extensions = [str(extension) for extension in about["extensions"]]
    kinds = [(tuple(map(int, shape)), str(dtype)) for shape, dtype in about["kinds"]]
    whole = Columns(*(tensors[name].numpy() for name in COLUMNS))
    shards = [(str(name), int(size), int(time), int(count)) for name, size, time, count in about["shards"]]
    _check_columns(whole, sum(count for *_, count in shards), len(extensions), len(kinds))
    tables, first = {}, 0
    for name, size, time, count in shards:
        rows = slice(first, first + count)
        start = int(whole.key_ends[first - 1]) if first else 0
        stop = int(whole.key_ends[first + count - 1]) if count else start
        parts = {name: getattr(whole, name)[rows] for name in COLUMNS}
        parts |= {"keys": whole.keys[start:stop], "key_ends": parts["key_ends"] - start}
        tables[name] = ShardTable(folder / name, (size, time, 0), extensions, kinds, Columns(**parts))
        first += count
    return tables


def checksum_of(arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> int:
    """Return the CRC-32 of the columns and their description."""
    return _checksum(lambda name: [arrays[name]], metadata)


def _checksum(parts: Callable[[str], Iterable[np.ndarray]], metadata: Mapping[str, str]) -> int:
    """Return `checksum_of` columns of which `parts` returns the parts by name."""
    checksum = 0
    for key in _DESCRIBED:
        checksum = zlib.crc32(metadata[key].encode(), checksum)
    for name in COLUMNS:
        for part in parts(name):
            checksum = zlib.crc32(np.ascontiguousarray(part).reshape(-1).view(np.uint8), checksum)
    return checksum


def _check_columns(whole: Columns, samples: int, members: int, kinds: int) -> None:
    """Raise `ValueError` unless the columns have their types and shapes, and refer to what exists."""
    shapes = [(len(whole.keys),), (samples,), *[(samples, members)] * 4, (samples, len(SIZES))]
    for name, dtype, shape in zip(COLUMNS, _TYPES, shapes, strict=True):
        values = getattr(whole, name)
        if (values.dtype.name, values.shape) != (dtype, shape):
            raise ValueError(f"{name} is {values.dtype} {values.shape} instead of {dtype} {shape}")
    ends = whole.key_ends
    is_whole = not samples or (ends[0] >= 0 and ends[-1] == len(whole.keys) and (np.diff(ends) >= 0).all())
    in_range = not samples or (whole.arrays.max() < kinds and whole.sizes.max() <= MOST_IN_MEMBER)
    if not (is_whole and in_range):
        raise ValueError("its entries contradict each other")
