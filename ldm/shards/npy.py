"""Reader of `.npy` arrays from untrusted files: numpy's own, without pickles, behind a check of type and size."""

from __future__ import annotations

import io
import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from ldm.util import UserError

# Enough of a member to hold the header of any plain array of numbers (numpy pads it to a multiple of 64 bytes).
HEADER_BYTES = 512
FLOATS = ("float16", "float32", "float64")
INTEGERS = ("int32", "int64")


@dataclass(frozen=True)
class NpyHeader:
    """Header of a `.npy`: where the data starts, their shape and type."""

    start: int
    shape: tuple[int, ...]
    dtype: np.dtype


@lru_cache(maxsize=256)  # the arrays of a set share one header
def _parse(header: bytes, types: tuple[str, ...]) -> NpyHeader:
    """Parse a whole header of an array of one of `types`."""
    file = io.BytesIO(header)
    version = np.lib.format.read_magic(file)
    readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    if version not in readers:
        raise ValueError(f"npy format version {version} is not read")
    shape, _, dtype = readers[version](file)
    if dtype.newbyteorder("=").name not in types:
        raise ValueError(f"its type is {dtype}, not one of {', '.join(types)}")
    if not all(type(side) is int for side in shape):  # numpy takes True for 1
        raise ValueError(f"its shape {shape} is not made of whole numbers")
    if not shape:
        raise ValueError("it is a single number, not an array")
    if any(side < 1 for side in shape):
        raise ValueError(f"its shape {shape} is empty")
    return NpyHeader(file.tell(), shape, dtype)


def read_header(start: bytes, size: int, name: str, types: tuple[str, ...] = FLOATS) -> NpyHeader:
    """Return the header of a `.npy` of `size` bytes that begins with `start` (`HEADER_BYTES` of it are enough).

    Raises:
        UserError: it is no `.npy`, has none of `types`, is no array, or its shape does not account for `size`; names
            `name`.
    """
    width = 2 if start[6:7] == b"\x01" else 4  # bytes of the field that gives the header's length
    length = 8 + width + int.from_bytes(start[8 : 8 + width], "little")
    try:
        header = _parse(bytes(start[: min(length, HEADER_BYTES)]), types)
    except Exception as error:  # a broken header makes numpy raise ValueError, TokenError, RecursionError, ...
        raise UserError(f"{name}: not a .npy array that can be read: {' '.join(str(error).split())}") from error
    expected = header.start + math.prod(header.shape) * header.dtype.itemsize
    if expected != size:
        raise UserError(f"{name}: shape {header.shape} {header.dtype} takes {expected} bytes, the file has {size}")
    return header


def decode(data: bytearray, name: str, types: tuple[str, ...] = FLOATS) -> np.ndarray:
    """Return the array in `data`, in row order; float64 becomes float32, since nothing here computes in it.

    Raises:
        UserError: as `read_header`.
    """
    header = read_header(data[:HEADER_BYTES], len(data), name, types)
    array = np.lib.format.read_array(io.BytesIO(data), allow_pickle=False)
    dtype = header.dtype.newbyteorder("=")
    dtype = np.dtype("float32") if dtype == np.float64 else dtype
    return np.ascontiguousarray(array, dtype=dtype)


def encode(array: np.ndarray) -> bytes:
    """Return `array` as the bytes of a `.npy` file."""
    file = io.BytesIO()
    np.lib.format.write_array(file, np.ascontiguousarray(array), allow_pickle=False)
    return file.getvalue()
