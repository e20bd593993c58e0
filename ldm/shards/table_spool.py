"""Tables of shards on their way to a file: memory holds one column of one table at a time.

New tables wait in a temporary file, because the kinds of members of all tables are known at the end alone.
"""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np

from ldm.identity import Identity
from ldm.remote.path import ShardPath
from ldm.shards.sample import SIZES
from ldm.shards.table import Columns, Kind, ShardTable

COLUMNS = tuple(field.name for field in fields(Columns))
_MISSING = {"offsets": -1, "sizes": -1, "checksums": 0, "arrays": -1}  # value of a missing member


@dataclass(frozen=True)
class StoredTable:
    """Table of a shard, of which `column` reads a column by its name."""

    path: ShardPath
    identity: Identity
    extensions: Sequence[str]
    kinds: Sequence[Kind]
    samples: int
    key_bytes: int
    column: Callable[[str], np.ndarray]

    @classmethod
    def of(cls, table: ShardTable) -> StoredTable:
        """Return a `table` whose columns are memory-mapped."""
        columns = table.columns
        described = table.path, table.identity, table.extensions, table.kinds
        return cls(*described, len(table), len(columns.keys), lambda name: np.asarray(getattr(columns, name)))


class TableSpool:
    """Temporary file of tables, in `folder`. It has no name, so nothing remains of a killed process.

    Raises:
        OSError: the folder cannot be written to.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115
        self._known: dict[object, object] = {}  # descriptions of tables, one object for equal ones
        self.tables: list[StoredTable] = []

    def add(self, table: ShardTable) -> None:
        """Write the columns of `table`.

        Raises:
            OSError: the disk is full.
        """
        places: dict[str, tuple[int, np.dtype, tuple[int, ...]]] = {}
        for name in COLUMNS:
            values = np.ascontiguousarray(getattr(table.columns, name))
            places[name] = self._file.tell(), values.dtype, values.shape
            self._file.write(values.reshape(-1).view(np.uint8).data)
        described = (tuple(values) for values in (table.extensions, table.kinds))
        extensions, kinds = (self._known.setdefault(values, values) for values in described)
        self.tables.append(
            StoredTable(
                table.path, table.identity, extensions, kinds, len(table), len(table.columns.keys),
                lambda name: self._read(*places[name]),
            )
        )  # fmt: skip

    def _read(self, place: int, dtype: np.dtype, shape: tuple[int, ...]) -> np.ndarray:
        values = np.empty(math.prod(shape), dtype)
        rest = memoryview(values.view(np.uint8))
        while rest:
            count = os.preadv(self._file.fileno(), [rest], place)
            if not count:
                raise OSError("a temporary file was truncated")
            rest, place = rest[count:], place + count
        return values.reshape(shape)

    def finish(self) -> list[StoredTable]:
        """Return the tables. Those of this object can be read until `close`.

        Raises:
            OSError: the disk is full.
        """
        self._file.flush()
        return self.tables

    def close(self) -> None:
        """Remove the temporary file."""
        with suppress(OSError):  # of a full disk, once more
            self._file.close()


@dataclass(frozen=True)
class JoinedTables:
    """Columns of all `tables`, in the order of all their `extensions` and with the numbers of all their `kinds`."""

    tables: Sequence[StoredTable]
    extensions: Sequence[str]
    kinds: Sequence[Kind]

    @classmethod
    def of(cls, tables: Sequence[StoredTable]) -> JoinedTables:
        extensions = dict.fromkeys(extension for table in tables for extension in table.extensions)
        return cls(tables, list(extensions), list(dict.fromkeys(kind for table in tables for kind in table.kinds)))

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a column."""
        if name == "keys":
            return (sum(table.key_bytes for table in self.tables),)
        further = {"key_ends": (), "has_sizes": (len(SIZES),)}.get(name, (len(self.extensions),))
        return sum(table.samples for table in self.tables), *further

    def parts(self, name: str) -> Iterator[np.ndarray]:
        """Yield a column, one table after the other."""
        start = 0
        for table in self.tables:
            values = table.column(name)
            if name in _MISSING:
                values = self._aligned(table, values, _MISSING[name])
            if name == "arrays":
                values = self._numbers(table)[values]
            yield values + start if name == "key_ends" else values
            start += table.key_bytes

    def _numbers(self, table: StoredTable) -> np.ndarray:
        """Return the numbers of the kinds of `table` among all, and -1 at the end."""
        return np.array([*map(self.kinds.index, table.kinds), -1], np.int32)

    def _aligned(self, table: StoredTable, values: np.ndarray, missing: int) -> np.ndarray:
        if list(table.extensions) == self.extensions:
            return values
        result = np.full((table.samples, len(self.extensions)), missing, values.dtype)
        for old, extension in enumerate(table.extensions):
            result[:, self.extensions.index(extension)] = values[:, old]
        return result
