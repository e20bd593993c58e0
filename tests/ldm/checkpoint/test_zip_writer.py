"""Archives of our writer have the bytes that readers since torch 1.13 take."""

import mmap
import pickletools
import re
import struct
import zipfile
import zlib
from dataclasses import dataclass

import pytest
import torch

from ldm.checkpoint import load_state_dict, save_checkpoint
from ldm.checkpoint.writing import PickledCheckpoint
from ldm.checkpoint.zip_writer import ZipWriter

GIB = 1 << 30
WIDE = 0xFFFFFFFF


@dataclass
class Entry:
    """Fields of an entry of a zip directory, as they stand in the file."""

    name: str
    size: int
    offset: int
    extra: dict[int, bytes]


def directory(path):
    """Return the entries and the end record of the archive at `path`, and its ZIP64 end record if it has one."""
    size = path.stat().st_size
    with path.open("rb") as file:
        file.seek(max(0, size - (1 << 16)))
        tail = file.read()
    (end,) = struct.iter_unpack("<4s4H2IH", tail[-22:])
    wide = None
    if tail[-42:-38] == b"PK\6\7":
        _, disk, place, disks = struct.unpack("<4sIQI", tail[-42:-22])
        assert (disk, disks) == (0, 1)
        wide = struct.unpack("<4sQ2H2I4Q", tail[place - size :][:56])
        assert wide[0] == b"PK\6\6" and wide[1] == 44 and wide[4:6] == (0, 0) and wide[6] == wide[7]
    start, count = (wide[9], wide[7]) if wide else (end[6], end[4])
    at, entries = start - size + len(tail), []
    for _ in range(count):
        found = struct.unpack("<4s6H3I5H2I", tail[at : at + 46])
        assert found[0] == b"PK\1\2" and found[8] == found[9]
        name = tail[at + 46 : at + 46 + found[10]].decode()
        extra, fields, position = tail[at + 46 + found[10] :][: found[11]], {}, 0
        while position < len(extra):
            kind, length = struct.unpack("<HH", extra[position : position + 4])
            fields[kind] = extra[position + 4 : position + 4 + length]
            position += 4 + length
        entries.append(Entry(name, found[8], found[16], fields))
        at += 46 + found[10] + found[11] + found[12]
    return entries, end, wide


def check_as_old_readers_do(path):
    """Check what miniz in torch 1.13 to 2.5 checks, and that no field is wide without need."""
    size = path.stat().st_size
    entries, end, wide = directory(path)
    with zipfile.ZipFile(path) as archive:
        true = {record.filename: record for record in archive.infolist()}
    for entry in entries:
        if entry.size != WIDE:
            # The value that stands in the field, not the one that the extra field gives.
            assert entry.offset + 30 + entry.size <= size, f"{entry.name}: refused as behind the end of the file"
        record = true[entry.name]
        assert (entry.offset == WIDE) == (record.header_offset >= WIDE)
        assert (entry.size == WIDE) == (record.file_size >= WIDE)
        assert (1 in entry.extra) == (WIDE in (entry.offset, entry.size))
    assert (wide is None) == (end[6] != WIDE and end[4] != 0xFFFF)
    return {entry.name: entry for entry in entries}


@pytest.fixture
def save_with_hole(tmp_path, monkeypatch):
    """Return a function that saves content with a hole before its last records: a large file that takes no room."""

    def save(content, hole, records=1):
        saved = PickledCheckpoint.of(content).tensors
        names = [f"data/{key}" for key in range(len(saved))][-records:]
        add = ZipWriter.add

        def add_behind_hole(self, name, data):
            if name == names[0]:
                self.file.seek(hole)
            add(self, name, data)

        monkeypatch.setattr(ZipWriter, "add", add_behind_hole)
        save_checkpoint(content, tmp_path / "large.ckpt")
        return tmp_path / "large.ckpt"

    return save


CONTENT = {"a": torch.arange(3.0), "b": torch.arange(5), "c": torch.ones(1000)}


@pytest.mark.parametrize(
    "hole", [1000, 2 * GIB - 100, 2 * GIB, 3 * GIB, int(3.97 * GIB), 4 * GIB - 8500, 4 * GIB - 1, 4 * GIB, 5 * GIB]
)
@pytest.mark.parametrize("mmap", [False, True])
def test_ZipWriter_widens_fields_from_4_gib_on(hole, mmap, save_with_hole):
    path = save_with_hole({"state_dict": CONTENT}, hole)
    entries = check_as_old_readers_do(path)
    assert entries["archive/data/2"].offset == min(hole, WIDE)
    for weights in (torch.load(path, weights_only=True, mmap=mmap)["state_dict"], load_state_dict(path)):
        assert all(torch.equal(weights[key], value) for key, value in CONTENT.items())


def test_ZipWriter_writes_a_record_beyond_4_gib(tmp_path, monkeypatch):
    """Its bytes are those of a file with a hole, so neither memory nor disk is taken, and they are not summed up."""
    monkeypatch.setattr("zlib.crc32", lambda data, crc32=zlib.crc32: 0 if len(data) > GIB else crc32(data))
    hole = tmp_path / "hole"
    with hole.open("wb") as file:
        file.truncate(4 * GIB + 64)

    class Sparse:
        """A file that leaves a hole where only zeros are written."""

        def __init__(self, file):
            self.file, self.tell, self.seek = file, file.tell, file.seek

        def write(self, data):
            self.file.seek(len(data), 1) if len(data) > GIB else self.file.write(data)

    path = tmp_path / "large.ckpt"
    content = {"w": torch.empty(GIB + 16, device="meta"), "v": torch.empty(2, device="meta")}
    pickled = PickledCheckpoint.of(content).pickled
    with (
        hole.open("rb") as zeros,
        path.open("wb") as file,
        mmap.mmap(zeros.fileno(), 0, access=mmap.ACCESS_READ) as data,
        memoryview(data) as view,
    ):
        archive = ZipWriter(Sparse(file))
        archive.add("data.pkl", pickled)
        archive.add("data/0", view)
        archive.add("data/1", torch.ones(2).numpy().tobytes())
        archive.add("version", b"3\n")
        archive.finish()
    entries = check_as_old_readers_do(path)
    assert entries["archive/data/0"].extra[1] == struct.pack("<2Q", 4 * GIB + 64, 4 * GIB + 64)
    assert entries["archive/data/1"].extra[1] == struct.pack("<Q", entry_offset(path, "archive/data/1"))
    weights = torch.load(path, weights_only=True, mmap=True)
    assert weights["w"].shape == (GIB + 16,) and weights["w"].data_ptr() % 64 == 0
    assert weights["w"][-1] == 0 and torch.equal(weights["v"], torch.ones(2))


def entry_offset(path, name):
    with zipfile.ZipFile(path) as archive:
        return archive.getinfo(name).header_offset


def test_ZipWriter_writes_more_records_than_16_bits_count(tmp_path):
    path = tmp_path / "many.zip"
    with path.open("wb") as file:
        archive = ZipWriter(file)
        for number in range(70_000):
            archive.add(f"data/{number}", b"")
        archive.finish()
    with zipfile.ZipFile(path) as archive:
        assert len(archive.infolist()) == 70_000


def test_save_checkpoint_writes_only_records_that_every_reader_knows(tmp_path):
    """The web UIs of 2022 to 2024 hold each name against such a list, and refuse the file otherwise."""
    save_checkpoint({"state_dict": CONTENT}, tmp_path / "model.ckpt")
    with zipfile.ZipFile(tmp_path / "model.ckpt") as archive:
        names = archive.namelist()
        assert archive.testzip() is None
    assert all(re.fullmatch(r"[^/]+/(data/\d+|version|data\.pkl)", name) for name in names)
    assert torch.equal(torch.load(tmp_path / "model.ckpt", weights_only=True)["state_dict"]["a"], torch.arange(3.0))


def test_save_checkpoint_names_only_globals_of_old_torch(tmp_path):
    """Readers with a list of their own take these; `weights_only` of torch 1.13 does too."""
    save_checkpoint({"state_dict": CONTENT, "epoch": 1}, tmp_path / "model.ckpt")
    with zipfile.ZipFile(tmp_path / "model.ckpt") as archive:
        pickled = archive.read("archive/data.pkl")
    named = {argument for opcode, argument, _ in pickletools.genops(pickled) if opcode.name == "GLOBAL"}
    assert named == {
        "torch._utils _rebuild_tensor_v2",
        "torch FloatStorage",
        "torch LongStorage",
        "collections OrderedDict",
    }


def test_equal_content_makes_equal_files(tmp_path):
    for name in ("a.ckpt", "b.ckpt"):
        save_checkpoint({"state_dict": CONTENT}, tmp_path / name)
    assert (tmp_path / "a.ckpt").read_bytes() == (tmp_path / "b.ckpt").read_bytes()
