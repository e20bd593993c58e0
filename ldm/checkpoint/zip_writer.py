"""Writer of zip archives for `torch.save`'s format.

Python's `zipfile` writes 64-bit fields from 2 GiB on. For such an entry, the readers of torch 1.13 to 2.5 compute
0xFFFFFFFF + the record's size, and refuse it if this is after the end of the file. Here, as in torch's writer, a field
has 64 bits only if its value needs them.

The layout follows the zip specification (PKWARE APPNOTE 6.3.9, sections 4.3 and 4.5.3).
"""

from __future__ import annotations

import struct
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import BinaryIO

_ALIGNMENT = 64  # bytes, as torch.save aligns storages
_WIDE = 0xFFFFFFFF  # marks a 32-bit field whose value is in the ZIP64 extra field
_MANY = 0xFFFF  # the same mark for the number of records
_LARGE = 1 << 20  # bytes from which a record's checksum is computed while its bytes are written
_CHECKSUM = 14  # bytes before the checksum in a record's header
_DATE = 0x21  # 1 January 1980, so that equal content gives equal files
_UTF8 = 0x800  # flag: names are UTF-8


@dataclass(frozen=True)
class _Record:
    name: bytes
    crc: int
    size: int
    offset: int

    def fields(self) -> tuple[int, ...]:
        """Return the fields of both headers: version, flags, method, time, date, checksum, sizes."""
        size = min(self.size, _WIDE)
        return (45 if size == _WIDE or self.offset >= _WIDE else 20), _UTF8, 0, 0, _DATE, self.crc, size, size


class ZipWriter:
    """Writer of uncompressed records to `file`. `finish` writes the directory."""

    def __init__(self, file: BinaryIO, root: str = "archive") -> None:
        self.file = file
        self.root = root
        self._records: list[_Record] = []
        self._summing = ThreadPoolExecutor(1)

    def add(self, name: str, data: bytes | memoryview) -> None:
        """Write the record `name`, with its bytes at a multiple of 64."""
        if len(data) < _LARGE:
            self._add(name, data, zlib.crc32(data))
            return
        checksum = self._summing.submit(zlib.crc32, data)  # it and `write` release the interpreter's lock
        start = self.file.tell()
        self._add(name, data, 0)
        self._records[-1] = replace(self._records[-1], crc=checksum.result())
        end = self.file.tell()
        self.file.seek(start + _CHECKSUM)
        self.file.write(struct.pack("<I", checksum.result()))
        self.file.seek(end)

    def _add(self, name: str, data: bytes | memoryview, crc: int) -> None:
        encoded = f"{self.root}/{name}".encode()
        record = _Record(encoded, crc, len(data), self.file.tell())
        extra = struct.pack("<HHQQ", 1, 16, len(data), len(data)) if len(data) >= _WIDE else b""
        padding = -(record.offset + 30 + len(encoded) + len(extra) + 4) % _ALIGNMENT
        extra += struct.pack("<2sH", b"FB", padding) + b"Z" * padding
        header = struct.pack("<4s5H3I2H", b"PK\3\4", *record.fields(), len(encoded), len(extra))
        self.file.write(header + encoded + extra)
        self.file.write(data)
        self._records.append(record)

    def finish(self) -> None:
        """Write the directory of the records. No record can be added afterwards."""
        self._summing.shutdown()
        start = self.file.tell()
        for record in self._records:
            wide = [value for value in (record.size, record.size, record.offset) if value >= _WIDE]
            extra = struct.pack(f"<HH{len(wide)}Q", 1, 8 * len(wide), *wide) if wide else b""
            version, *fields = record.fields()
            rest = (len(record.name), len(extra), 0, 0, 0, 0, min(record.offset, _WIDE))
            header = struct.pack("<4s6H3I5H2I", b"PK\1\2", version, version, *fields, *rest)
            self.file.write(header + record.name + extra)
        end = self.file.tell()
        count, size = len(self._records), end - start
        if count >= _MANY or size >= _WIDE or start >= _WIDE:
            self.file.write(struct.pack("<4sQ2H2I4Q", b"PK\6\6", 44, 45, 45, 0, 0, count, count, size, start))
            self.file.write(struct.pack("<4sIQI", b"PK\6\7", 0, end, 1))
        short = min(count, _MANY)
        self.file.write(struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, short, short, min(size, _WIDE), min(start, _WIDE), 0))
