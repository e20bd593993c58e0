"""Holding a checkpoint against its own checksums, so that a flipped bit is not trained on."""

from __future__ import annotations

import zipfile
import zlib
from pathlib import Path

from ldm.util import UserError

_CHUNK = 1 << 24  # bytes read at a time


def verify_checkpoint(path: str | Path) -> None:
    """Read all of the `torch.save` zip at `path`, and hold each record against the CRC-32 that was written with it.

    It costs one reading of the file; nothing in it is run or kept. A file of another format, which has no checksums, is
    taken as it is.

    Raises:
        UserError: the file cannot be read as a zip archive to its end, or a record is not what was written.
    """
    path = Path(path)
    with path.open("rb") as file:
        if file.read(4) != b"PK\x03\x04":
            return
    try:
        with zipfile.ZipFile(path) as archive:
            for record in archive.infolist():
                _verify_record(archive, record)
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
        raise UserError(f"{path}: cut short or damaged ({error})") from error


def _verify_record(archive: zipfile.ZipFile, record: zipfile.ZipInfo) -> None:
    with archive.open(record) as file:
        while file.read(_CHUNK):  # at the end it compares the checksum
            pass
