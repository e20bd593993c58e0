"""Tests of the kept tables of shards: equal to what the tars hold, and never trusted more than those."""

from __future__ import annotations

import json
import os
import tracemalloc
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from ldm.checkpoint import load_checkpoint, save_state_dict
from ldm.shards import kept_tables, npy, table_spool
from ldm.shards.kept_tables import TABLES, checksum_of, open_tables
from ldm.shards.reader import ShardDataset
from ldm.shards.table import Columns, ShardTable, build_table
from ldm.shards.table_spool import COLUMNS
from ldm.util import UserError
from tests.ldm.shard_files import sample_members, write_set, write_tar


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Keep tables of shards of any size, and return the list that each built table adds its path to."""
    paths: list[Path] = []

    def build(path: Path) -> ShardTable:
        paths.append(path)
        return build_table(path)

    monkeypatch.setattr(kept_tables, "LEAST_SAMPLES", 1)
    monkeypatch.setattr(kept_tables, "build_table", build)
    return paths


def shards_of(folder: Path, shards: int = 3) -> list[Path]:
    write_set(folder, 7, shards)
    return [folder / f"set-{number:03d}.tar" for number in range(shards)]


def content(dataset: ShardDataset) -> list[str]:
    return [repr(dataset[number]) for number in range(len(dataset))]


def test_a_kept_table_gives_the_same_samples_keys_and_groups(tmp_path: Path, built: list[Path]) -> None:
    paths = shards_of(tmp_path)
    wide = [member for number in (8, 9) for member in sample_members(number, f8_shape=(8, 2, 8))]
    paths.append(write_tar(tmp_path / "wide.tar", [("é/x" + name, data) for name, data in wide]))
    first = ShardDataset(paths, extra=["json"])
    assert built == paths and (tmp_path / TABLES).exists()
    second = ShardDataset(paths, extra=["json"])
    assert built == paths
    assert content(first) == content(second) and list(first.sample_keys) == list(second.sample_keys)
    assert [second.sample_keys[number] for number in range(9)] == list(second.sample_keys)
    assert second.sample_keys[-1] == "é/x000009" and first.shapes == second.shapes
    for one, other in zip(first.groups(), second.groups(), strict=True):
        assert np.array_equal(one, other)
    assert [list(group) for group in second.groups()] == [list(range(7)), [7, 8]]


def test_only_changed_shards_are_read_again(tmp_path: Path, built: list[Path]) -> None:
    paths = shards_of(tmp_path)
    ShardDataset(paths[:2])
    ShardDataset(paths[1:])
    assert built == paths
    write_tar(paths[1], sample_members(70))
    assert list(ShardDataset(paths).sample_keys) == ["000000", "000001", "000070", "000004", "000005", "000006"]
    paths[2].unlink()
    ShardDataset(paths[:2])
    assert built == [*paths, paths[1]]


def test_small_shards_have_no_file(tmp_path: Path) -> None:
    ShardDataset(shards_of(tmp_path))
    assert not (tmp_path / TABLES).exists()


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("offsets", lambda values: values + 512),
        ("offsets", lambda values: values * 0),
        ("sizes", lambda values: values - 1),
        ("checksums", lambda values: values.int() + 1),
    ],
)
def test_a_table_that_differs_from_its_tar_is_refused(tmp_path: Path, built: list[Path], name: str, change) -> None:
    paths = shards_of(tmp_path, 1)
    ShardDataset(paths)
    saved = load_checkpoint(tmp_path / TABLES, mmap=False)
    weights = saved["state_dict"]
    weights[name] = change(weights[name]).to(weights[name].dtype)
    checksum = checksum_of({key: values.numpy() for key, values in weights.items()}, saved["metadata"])
    save_state_dict(weights, tmp_path / TABLES, metadata={**saved["metadata"], "crc32": str(checksum)})
    with pytest.raises(
        UserError, match=rf"set-000.tar: 000000.f8.npy.*({TABLES} describes it; remove|takes|not a .npy)"
    ):
        ShardDataset(paths)[0]


def test_a_tar_of_the_same_size_and_time_is_noticed(tmp_path: Path, built: list[Path]) -> None:
    path = write_tar(tmp_path / "a.tar", sample_members(1))
    before = path.stat()
    ShardDataset([path])
    for members, fault in (
        (sample_members(2), "000001.f8.npy: is not as"),
        ([("000001.f8.npy", npy.encode(np.zeros((8, 2, 8), np.float16))), *sample_members(1)[1:]], "f8.npy: is not as"),
    ):
        write_tar(path, members)
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
        assert path.stat().st_size == before.st_size
        with pytest.raises(UserError, match=fault):
            ShardDataset([path])[0]


@pytest.mark.parametrize("fault", ["cut", "text", "kinds", "version", "count", "extensions", "keys"])
def test_a_damaged_file_of_tables_is_made_again(tmp_path: Path, built: list[Path], fault: str) -> None:
    paths = shards_of(tmp_path)
    expected = content(ShardDataset(paths))
    file = tmp_path / TABLES
    saved = load_checkpoint(file, mmap=False)
    metadata = dict(saved["metadata"])
    if fault == "cut":
        file.write_bytes(file.read_bytes()[:-40])
    elif fault == "text":
        file.write_text("no table")
    else:
        shards = json.loads(metadata["shards"])
        shards[0][3] += 1
        metadata |= {
            "kinds": {"kinds": "[]"},
            "version": {"version": '"0"'},
            "count": {"shards": json.dumps(shards)},
            "extensions": {"extensions": metadata["extensions"].replace("txt", "text")},  # else captions would be empty
        }.get(fault, {})
        if fault == "keys":
            saved["state_dict"]["keys"][0] += 1
        save_state_dict(saved["state_dict"], file, metadata=metadata)
    assert content(ShardDataset(paths)) == expected
    assert built == paths * 2


def test_a_folder_that_cannot_be_written_keeps_nothing(tmp_path: Path, built: list[Path], monkeypatch) -> None:
    paths = shards_of(tmp_path)

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError

    monkeypatch.setattr(kept_tables, "save_state_dict", refuse)
    assert len(ShardDataset(paths)) == 7 and not (tmp_path / TABLES).exists()


def test_tables_with_other_members_and_kinds_are_written_as_one(tmp_path: Path, built: list[Path]) -> None:
    """The columns of the file are those of all tables, with the members and kinds of each in their places."""
    paths = shards_of(tmp_path, 2)
    wide = [member for number in (8, 9) for member in sample_members(number, f8_shape=(8, 2, 8))]
    paths.append(write_tar(tmp_path / "wide.tar", [*wide, ("000008.extra.npy", npy.encode(np.zeros(3)))]))
    first = {table.path: table for table in open_tables(paths[1:])}
    second = {table.path: table for table in open_tables(paths)}  # the kept ones, and a new one after them
    third = {table.path: table for table in open_tables(paths)}
    assert built == [*paths[1:], paths[0]]
    for path, table in second.items():
        expected, found = first.get(path, table), third[path]
        assert list(expected.keys()) == list(found.keys()) and len(expected) == len(found)
        for row in range(len(expected)):
            assert expected.sample(row) == found.sample(row)
            for column, extension in enumerate(expected.extensions):
                ours, theirs = found.members(row)[found.column(extension)], expected.members(row)[column]
                assert ours[:3] == theirs[:3] and (ours.kind < 0) == (theirs.kind < 0)
                assert ours.kind < 0 or found.kinds[ours.kind] == expected.kinds[theirs.kind]
        assert np.array_equal(expected.columns.has_sizes, found.columns.has_sizes)


def peak_of_keeping(folder: Path, shards: int, monkeypatch: pytest.MonkeyPatch) -> int:
    """Return the peak of memory in bytes while the tables of shards of 20,000 samples are kept."""
    first, rows = build_table(write_tar(folder / "0.tar", sample_members(1))), 20_000
    columns = Columns(*(np.repeat(getattr(first.columns, name), rows, axis=0) for name in COLUMNS))
    columns.key_ends[:] = np.arange(1, rows + 1) * len(first.columns.keys)
    monkeypatch.setattr(kept_tables, "build_table", lambda path: replace(first, path=path, columns=columns))
    paths = [folder / f"{number}.tar" for number in range(1, shards + 1)]
    for path in paths:
        path.hardlink_to(folder / "0.tar")
    tracemalloc.start()
    try:
        kept_tables.keep_tables(paths)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_the_memory_to_keep_tables_does_not_grow_with_their_number(tmp_path: Path, monkeypatch) -> None:
    few, many = (peak_of_keeping(tmp_path / str(count), count, monkeypatch) for count in (4, 32))
    assert many < 1.5 * few


@pytest.mark.parametrize("buffering", [0, -1])
def test_a_full_disk_keeps_nothing(tmp_path: Path, built: list[Path], monkeypatch, buffering: int) -> None:
    paths = shards_of(tmp_path)
    before = set(tmp_path.iterdir())
    full = partial(open, "/dev/full", "w+b", buffering)
    monkeypatch.setattr(table_spool.tempfile, "TemporaryFile", lambda dir: full())
    assert len(ShardDataset(paths)) == 7 and set(tmp_path.iterdir()) == before


def test_tables_of_many_kinds_of_members_are_bounded(tmp_path: Path) -> None:
    many = [("a.f8.npy", b""), *((f"a.{number}", b"") for number in range(100))]
    with pytest.raises(UserError, match=r"a\.tar: sample 'a' has 101 members; no set has so many"):
        list(open_tables([write_tar(tmp_path / "a.tar", many)]))
    odd = [*sample_members(1), *((f"{number}.x{number}", b"") for number in range(2, 200))]
    (built,) = open_tables([write_tar(tmp_path / "b.tar", odd)])
    assert built.extensions == ["f8.npy", "t5.npy", "txt", "json"] and len(built) == 199
