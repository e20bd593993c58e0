"""Files in object stores, `s3:` and `gs:`, through the packages that fsspec takes for them.

Their parts come without a version, which is therefore asked for after each part.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO

import fsspec

from ldm.identity import Identity
from ldm.remote.file_server import HEAD, State, identity_from
from ldm.remote.path import RemotePath
from ldm.remote.retries import Momentary, NotServed, is_of_disk
from ldm.util import UserError

_PACKAGES = {"s3": "s3fs", "gs": "gcsfs"}
_VERSIONS = ("ETag", "etag", "generation", "LastModified", "updated", "mtime", "created")  # in the order of preference


class StoreServer:
    """Server of the file at an `s3:` or `gs:` URL.

    Raises:
        UserError: the package for these URLs is not installed.
    """

    def __init__(self, path: RemotePath) -> None:
        self.path = path
        try:
            self.files = fsspec.filesystem(path.scheme)
        except (ImportError, ValueError) as error:
            package = _PACKAGES[path.scheme]
            raise UserError(f"{path}: needs the package {package}; install it: pip install {package}") from error

    def state(self) -> State:
        identity = self._identity()
        return State(identity, True, self._read(0, HEAD))

    def read(self, offset: int, size: int) -> tuple[Identity, bytes] | None:
        data = self._read(offset, size)
        return self._identity(), data

    def save(self, file: BinaryIO) -> Identity:
        file.seek(0)
        file.truncate()
        with self._one_line(), self.open() as source:
            shutil.copyfileobj(source, file, 1 << 20)
        return self._identity()

    def open(self) -> BinaryIO:
        """Open the whole file, to be read from front to back."""
        return self.files.open(self.path.url, "rb")

    def _read(self, offset: int, size: int) -> bytes:
        with self._one_line():
            return self.files.cat_file(self.path.url, start=offset, end=offset + size)

    def _identity(self) -> Identity:
        with self._one_line():
            self.files.invalidate_cache(self.path.parent.url)
            found: dict[str, Any] = self.files.info(self.path.url)
        version = next((str(found[key]) for key in _VERSIONS if found.get(key) is not None), "")
        return identity_from(int(found["size"] or 0), version)

    @contextmanager
    def _one_line(self) -> Iterator[None]:
        """Translate the errors of the packages, which are many kinds."""
        try:
            yield
        except (FileNotFoundError, PermissionError) as error:
            what = "no such file" if isinstance(error, FileNotFoundError) else "no right to read it"
            raise NotServed(f"{self.path}: {what}; check the URL and the credentials") from error
        except OSError as error:
            if is_of_disk(error):
                raise
            raise Momentary(f"{type(error).__name__}: {' '.join(str(error).split())[:200]}") from None
        except Exception as error:
            raise UserError(f"{self.path}: cannot be read: {' '.join(str(error).split())[:200]}") from error
