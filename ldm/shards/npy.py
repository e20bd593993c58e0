"""Reader of `.npy` arrays from untrusted files. It checks type and size, then lets numpy decode without pickles."""

from __future__ import annotations

import io
import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np

from ldm.util import UserError, refuse_if

# Bytes that hold the header of any plain array of numbers (numpy pads it to a multiple of 64 bytes).
HEADER_BYTES = 512
FLOATS = ("float16", "float32", "float64")
INTEGERS = ("int32", "int64")


@dataclass(frozen=True)
class NpyHeader:
    """Header of a `.npy` file: start, shape, type and order of the data; "F" is Fortran's, with columns first."""

    start: int
    shape: tuple[int, ...]
    dtype: np.dtype
    order: Literal["C", "F"]


@lru_cache(maxsize=256)  # arrays of equal shape have equal headers
def _parse(header: bytes, types: tuple[str, ...]) -> NpyHeader:
    """Parse a complete header of an array of one of `types`. Raise `ValueError` for any other header."""
    file = io.BytesIO(header)
    version = np.lib.format.read_magic(file)
    readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    if version not in readers:
        raise ValueError(f"npy format version {version} is not supported")
    shape, is_fortran, dtype = readers[version](file)
    refuse_if(dtype.newbyteorder("=").name not in types, f"its type is {dtype}, not one of {', '.join(types)}")
    # A bool passes as an int in numpy.
    refuse_if(not all(type(side) is int for side in shape), f"its shape {shape} is not made of whole numbers")
    refuse_if(not shape, "it is a single number, not an array")
    refuse_if(any(side < 1 for side in shape), f"its shape {shape} is empty")
    return NpyHeader(file.tell(), shape, dtype, "F" if is_fortran else "C")


def read_header(start: bytes, size: int, name: str, types: tuple[str, ...] = FLOATS) -> NpyHeader:
    """Return the header of a `.npy` file of `size` bytes. `start` is its first `HEADER_BYTES`.

    Raises:
        UserError: it is not a `.npy` file with an array of one of `types`, or its shape does not match `size`. The
            message names `name`.
    """
    width = 2 if start[6:7] == b"\x01" else 4  # bytes of the field with the header's length
    length = 8 + width + int.from_bytes(start[8 : 8 + width], "little")
    try:
        header = _parse(bytes(start[: min(length, HEADER_BYTES)]), types)
    except Exception as error:  # on a damaged header, numpy raises ValueError, TokenError, RecursionError, ...
        raise UserError(f"{name}: not a .npy array: {' '.join(str(error).split())}") from error
    expected = header.start + math.prod(header.shape) * header.dtype.itemsize
    if expected != size:
        raise UserError(
            f"{name}: shape {header.shape} {header.dtype} takes {expected} bytes, but the file has {size}; "
            "encode it again"
        )
    return header


def decode(data: bytearray, name: str, types: tuple[str, ...] = FLOATS) -> np.ndarray:
    """Return the array in `data`, in row order. float64 becomes float32, because no computation uses float64.

    Raises:
        UserError: as `read_header`.
    """
    header = read_header(data[:HEADER_BYTES], len(data), name, types)
    # `np.lib.format.read_array` would parse the header again, which takes most of the time of a small array.
    array = np.frombuffer(data, header.dtype, offset=header.start).reshape(header.shape, order=header.order)
    dtype = header.dtype.newbyteorder("=")
    dtype = np.dtype("float32") if dtype == np.float64 else dtype
    return np.ascontiguousarray(array, dtype=dtype)


def encode(array: np.ndarray) -> bytes:
    """Return the bytes of a `.npy` file that holds `array`."""
    file = io.BytesIO()
    np.lib.format.write_array(file, np.ascontiguousarray(array), allow_pickle=False)
    return file.getvalue()
