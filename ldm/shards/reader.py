"""Reader of pre-encoded samples in tar shards, with random access by offset.

The headers of each shard are read once. This has three effects: an epoch is a permutation of all samples for any number
of workers, a set may have fewer samples than workers, and wrong samples are found before training starts.
"""

from __future__ import annotations

import logging
import zlib
from collections.abc import Iterator, Sequence
from tarfile import BLOCKSIZE
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from ldm.identity import read_with_retries
from ldm.remote.path import RemotePath, ShardPath, as_path
from ldm.shards import npy
from ldm.shards.kept_tables import open_tables, tables_of
from ldm.shards.members import ABSENT, check_map, check_shape, decode_member, find_member, numbered_keys
from ldm.shards.sample import (
    CAPTION,
    CONTEXT,
    LATENT,
    OF_LATENT_SIZE,
    SIZE_ENTRIES,
    SIZES,
    TEXT_KEYS,
    caption_count,
    is_array,
    member_extension,
    number_types,
    one_caption,
    one_variant,
    plain,
    with_caption,
    with_variant,
)
from ldm.shards.spans import Read, open_spans
from ldm.shards.table import MemberPlace, ShardTable
from ldm.shards.tar import names_sample
from ldm.util import UserError

logger = logging.getLogger(__name__)


class ShardDataset(Dataset):
    """Data set of shards, local or on a server.

    A sample is a dict with the `keys`, `"txt"` (the caption) and `"__key__"`.

    Arrays are numpy arrays, float16 or float32 as stored: `first_stage_key` (channels, h, w), and `cond_stage_key`,
    such as (77, 768), unless it is None. Of several captions, a sample has the first, or all if `keeps_captions` is
    set, and of several variants of the image the first, or all if `keeps_variants` is set. `extra` names further
    members, such as `TEACHER_KEYS`, `MAPS`, `SIZE_ENTRIES`, or `"json"`, which is None for a sample without it. Of the
    `NUMBERED` members, those of the first sample are read.

    Raises:
        UserError: a shard is damaged, a sample lacks a key, or the shapes of samples differ.
    """

    def __init__(
        self,
        paths: Sequence[str | ShardPath],
        first_stage_key: str = LATENT,
        cond_stage_key: str | None = CONTEXT,
        extra: Sequence[str] = (),
    ) -> None:
        self.paths = [as_path(path) for path in paths]
        self.first_stage_key = first_stage_key
        keys = [first_stage_key, cond_stage_key, CAPTION, *extra]
        self.keys = [key for key in dict.fromkeys(keys) if key is not None]
        self.reads_encodings = cond_stage_key is not None and cond_stage_key not in TEXT_KEYS  # of captions
        self.keeps_captions = self.keeps_variants = False
        self.has_several_variants = False
        self.has_several_captions = False  # `open_shards` also reads it in the index
        self.optional = ABSENT.keys() - {first_stage_key, cond_stage_key}
        self.shapes: dict[str, dict[tuple[int, ...], str]] = {
            key: {} for key in self.keys
        }  # shape → dtype, in the order of the samples
        self._tables: list[ShardTable] = []  # of the shards that hold samples
        groups: list[np.ndarray] = []
        for table in open_tables(self.paths):
            if not len(table):
                logger.warning("%s holds no samples", table.path)
                continue
            if not self._tables:
                self.keys = numbered_keys(self.keys, table.sample(0).spans)
                self.shapes = {key: {} for key in self.keys}
            groups.append(self._check(table))
            self._tables.append(table)
        if not self._tables:
            count = "1 shard," if len(self.paths) == 1 else f"{len(self.paths)} shards, such as"
            raise UserError(f"no samples in {count} {self.paths[0]}")
        self.sample_keys = SampleKeys(self._tables)
        self._places = [[(key, table.column(member_extension(key))) for key in self.keys] for table in self._tables]
        # Arrays, not lists: reference counting would copy a list into each forked worker.
        self._ends = np.cumsum([len(table) for table in self._tables])
        self._groups = np.concatenate(groups)

    def _check(self, table: ShardTable) -> np.ndarray:
        """Check the members of all samples of a shard; return the numbers of their latents' shapes among all."""
        if not self._is_plain(table):
            self._check_one_by_one(table)
        if not self.reads_encodings:  # their shape says whether the text has several captions
            self.has_several_captions |= any(caption_count(CONTEXT, shape) for shape in _shapes(table, CONTEXT))
        maps = [key for key in self.keys if plain(key) in OF_LATENT_SIZE]
        places = {key: table.column(member_extension(key)) for key in self.keys if is_array(key)}
        for key, column in places.items():
            numbers, firsts = np.unique(table.columns.arrays[:, column], return_index=True)
            for number, row in sorted(zip(numbers.tolist(), firsts.tolist(), strict=True), key=lambda pair: pair[1]):
                stored, dtype = table.kinds[number]
                image = key == self.first_stage_key or key in maps
                known, shape = self.shapes[key], one_variant(stored) if image else one_caption(key, stored)
                self.has_several_captions |= not image and shape != stored
                self.has_several_variants |= image and shape != stored
                if shape not in known:
                    check_shape(key, shape, next(iter(known), shape), image, self._name(table, row, key))
                    known[shape] = dtype
        latents = table.columns.arrays[:, places[self.first_stage_key]]
        for key in maps:
            pairs = np.stack([table.columns.arrays[:, places[key]], latents])
            for (number, latent), row in zip(*_unique_columns(pairs), strict=True):
                check_map(key, table.kinds[number][0], table.kinds[latent][0], self._name(table, row, key))
        order = list(self.shapes[self.first_stage_key])
        shapes = [one_variant(shape) for shape, _ in table.kinds]
        numbers = [order.index(shape) if shape in order else -1 for shape in shapes]
        return np.asarray(numbers, np.int32)[latents]

    def _is_plain(self, table: ShardTable) -> bool:
        """Return True if all samples of a shard have the keys, with arrays of numbers and valid sizes."""
        columns = table.columns
        for key in self.keys:
            place = table.column(member_extension(key))
            if key in self.optional and key in TEXT_KEYS:
                continue
            if place is None or (columns.sizes[:, place] < 0).any():
                return False
            if is_array(key) and (columns.arrays[:, place] < 0).any():
                return False
            if key in SIZE_ENTRIES and not columns.has_sizes[:, SIZES.index(SIZE_ENTRIES[key])].all():
                return False
        return True

    def _check_one_by_one(self, table: ShardTable) -> None:
        """Raise `UserError` for the first sample that lacks a key, or has a wrong array or size."""
        with open_spans(table.path, table.identity) as read:
            for row in range(len(table)):
                sample = table.sample(row)
                for key in self.keys:
                    span = find_member(key, sample.spans, self.optional, sample.key, str(table.path))
                    if span is None or key in TEXT_KEYS:
                        continue
                    name, (offset, size) = self._name(table, row, key), span
                    if is_array(key):
                        start = read(offset, min(size, npy.HEADER_BYTES), name)
                        npy.read_header(start, size, name, number_types(key))
                        if table.columns.arrays[row, table.column(member_extension(key))] < 0:
                            raise _not_as_kept(table, name)
                    else:
                        decode_member(key, read(offset, size, name), name)

    def _name(self, table: ShardTable, row: int, key: str) -> str:
        return f"{table.path}: {table.key(row)}.{member_extension(key)}"

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> dict[str, Any]:
        number, row = _locate(self._ends, index)
        table, places = self._tables[number], self._places[number]
        return read_with_retries(lambda: self._read(table, row, places), table.path)

    def _read(self, table: ShardTable, row: int, places: Sequence[tuple[str, int | None]]) -> dict[str, Any]:
        sample: dict[str, Any] = {"__key__": table.key(row)}
        members = table.members(row)
        # Opened for each sample, because a set may have more shards than a process may open. Opening takes 10 µs.
        parts = None
        if isinstance(table.path, RemotePath):
            parts = [members[column].part for _, column in places if column is not None and members[column].size >= 0]
        with open_spans(table.path, table.identity, parts) as read:
            for key, column in places:
                member = None if column is None else members[column]
                if member is None or member.size < 0:
                    sample[key] = ABSENT[key]
                    continue
                name, data = _read_member(read, table, member, sample["__key__"], member_extension(key))
                sample[key] = value = decode_member(key, data, name)
                if is_array(key) and value.shape != table.kinds[member.kind][0]:
                    raise _not_as_kept(table, name)
        name = f"{table.path}: {sample['__key__']}"
        if self.has_several_variants and not self.keeps_variants:
            sample = with_variant(sample, self.first_stage_key, lambda count: 0, name)
        if self.has_several_captions and not self.keeps_captions:
            sample = with_caption(sample, lambda count: 0, name)
        return sample

    @property
    def is_remote(self) -> bool:
        """True if a shard is on a server."""
        return any(isinstance(path, RemotePath) for path in self.paths)

    @property
    def shard_sizes(self) -> list[tuple[ShardPath, int]]:
        """Shards that hold samples, in order, with their number."""
        return [(table.path, len(table)) for table in self._tables]

    def groups(self) -> list[np.ndarray]:
        """Return the sample numbers, one array per image shape. The samples of an array may share a batch."""
        return [np.flatnonzero(self._groups == group) for group in range(len(self.shapes[self.first_stage_key]))]


class SampleKeys(Sequence[str]):
    """Keys of all samples of a set, read from the tables of its shards."""

    def __init__(self, tables: Sequence[ShardTable]) -> None:
        self._tables = tables
        self._ends = np.cumsum([len(table) for table in tables])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> str:
        number, row = _locate(self._ends, index)
        return self._tables[number].key(row)

    def __iter__(self) -> Iterator[str]:
        for table in self._tables:
            yield from table.keys()


def _shapes(table: ShardTable, key: str) -> list[tuple[int, ...]]:
    """Return the shapes of the arrays `key` in a shard, even if the data set does not read them."""
    column = table.column(member_extension(key))
    kinds = [] if column is None else np.unique(table.columns.arrays[:, column]).tolist()
    return [table.kinds[kind][0] for kind in kinds if kind >= 0]


def _locate(ends: np.ndarray, index: int) -> tuple[int, int]:
    """Return the number of the table and the row of sample `index`, counted from 0, or from the end if negative."""
    count = int(ends[-1])
    if not -count <= index < count:
        raise IndexError(f"sample {index} of {count}")
    index %= count
    number = int(ends.searchsorted(index, side="right"))
    return number, index - (int(ends[number - 1]) if number else 0)


def _read_member(
    read: Read, table: ShardTable, member: MemberPlace, sample: str, extension: str
) -> tuple[str, bytearray]:
    """Return the name of a member for messages, and its content, after a check of the tar header before it."""
    name = f"{table.path}: {sample}.{extension}"
    if member.offset < BLOCKSIZE:
        raise _not_as_kept(table, name)
    data = read(member.offset - BLOCKSIZE, member.size + BLOCKSIZE, name)
    header = data[:BLOCKSIZE]
    is_named = not isinstance(table.path, RemotePath) or names_sample(header, sample, extension)
    if zlib.crc32(header) != member.checksum or not is_named:
        raise _not_as_kept(table, name)
    del data[:BLOCKSIZE]
    return name, data


def _not_as_kept(table: ShardTable, name: str) -> UserError:
    return UserError(f"{name}: is not as {tables_of(table.path)} describes it; remove that file, and start again")


def _unique_columns(pairs: np.ndarray) -> tuple[list[list[int]], list[int]]:
    """Return the different columns of `pairs` (2, N), and the position of the first of each."""
    found, firsts = np.unique(pairs, axis=1, return_index=True)
    return found.T.tolist(), firsts.tolist()
