import io

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ldm.shards import npy
from ldm.util import UserError


def raw(header: bytes, payload: bytes = b"", version: bytes = b"\x01\x00") -> bytearray:
    width = 2 if version == b"\x01\x00" else 4
    return bytearray(b"\x93NUMPY" + version + len(header).to_bytes(width, "little") + header + payload)


@pytest.mark.parametrize("dtype", ["<f2", ">f2", "<f4", ">f4"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_arrays_come_back_as_they_were(dtype, order):
    array = np.asarray(np.arange(24).reshape(2, 3, 4), dtype=dtype, order=order)
    file = io.BytesIO()
    np.save(file, array)
    decoded = npy.decode(bytearray(file.getvalue()), "x")
    assert decoded.dtype == np.dtype(dtype).newbyteorder("=")
    assert decoded.flags["C_CONTIGUOUS"] and decoded.flags.writeable
    np.testing.assert_array_equal(decoded, array)


def test_float64_is_read_as_float32():
    assert npy.decode(bytearray(npy.encode(np.ones((2, 2)))), "x").dtype == np.float32


@pytest.mark.parametrize("dtype", ["<i4", ">i4", "<i8"])
def test_whole_numbers_are_read_where_they_are_asked_for(dtype):
    data = bytearray(npy.encode(np.array([3, 999, -1], dtype)))
    decoded = npy.decode(data, "x", npy.INTEGERS)
    assert decoded.dtype == np.dtype(dtype).newbyteorder("=") and decoded.tolist() == [3, 999, -1]
    with pytest.raises(UserError, match="not one of float16"):
        npy.decode(data, "x")
    with pytest.raises(UserError, match="type is float16, not one of int32, int64"):
        npy.decode(bytearray(npy.encode(np.ones(2, np.float16))), "x", npy.INTEGERS)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (bytearray(), "not a .npy"),
        (bytearray(b"PK\x03\x04" + bytes(100)), "not a .npy"),
        (raw(b"{'descr': '|O', 'fortran_order': False, 'shape': (1,), }\n", b"cos\nsystem\n."), "type is object"),
        (raw(b"{'descr': '<i8', 'fortran_order': False, 'shape': (1,), }\n", bytes(8)), "type is int64"),
        (raw(b"{'descr': '<f2', 'fortran_order': False, 'shape': (1099511627776,), }\n", bytes(8)), "takes 2199023255"),
        (raw(b"{'descr': '<f2', 'fortran_order': False, 'shape': (-4, -1), }\n", bytes(8)), "is empty"),
        (raw(b"{'descr': '<f2', 'fortran_order': False, 'shape': (0,), }\n"), "is empty"),
        (raw(b"{'descr': '<f2', 'fortran_order': False, 'shape': (True, 4), }\n", bytes(8)), "not made of whole"),
        (raw(b"{'descr': '<f2', 'fortran_order': False, 'shape': (4, False), }\n", bytes(8)), "not made of whole"),
        (raw(b"{'descr': '<f2', 'fortran_order': False, 'shape': (), }\n", bytes(2)), "a single number"),
        (raw(b"{'descr': '<f2', 'fortran_order': False, 'shape': 4, }\n", bytes(8)), "not a .npy"),
        (raw(b"{'descr': '<f2', 'fortran_order': 1, 'shape': (4,), }\n", bytes(8)), "not a .npy"),
        (raw(b"{'descr': '<f2', 'fortran_order': False, 'shape': (4.0,), }\n", bytes(8)), "not a .npy"),
        (raw(b"{'descr': '<f2', 'fortran_order': False, 'shape': (-2, -2), }\n", bytes(8)), "is empty"),
        (raw(b"{'descr': '<f2', 'fortran_order': False, 'shape': (4294967296, 4294967296), }\n", bytes(8)), "takes"),
        (raw(b"{'descr': '<f2', 'fortran_order': False, 'shape': (4, 9223372036854775808), }\n", bytes(8)), "takes"),
        (raw(b"__import__('os').system('true')\n", bytes(8)), "not a .npy"),
        (raw(b"(" * 400, bytes(8)), "not a .npy"),
        (raw(b"{'descr': '<f2', 'fortran_order': False, 'shape': (4,), }\n", bytes(8), b"\x03\x00"), "version"),
        (raw(b"{'descr': '<f2', 'fortran_order': False, 'shape': (4,), }\n", bytes(7)), "takes"),
    ],
)
def test_hostile_headers_are_refused_in_one_line(data, message):
    with pytest.raises(UserError, match=message) as caught:
        npy.decode(data, "shard.tar: a.f8.npy")
    assert str(caught.value).startswith("shard.tar: a.f8.npy: ") and "\n" not in str(caught.value)


def test_decode_gives_what_numpy_gives():
    for array in (np.ones((1, 1, 1), ">f4"), np.arange(6.0).reshape(2, 3).T, np.arange(4, dtype="<f2")):
        data = bytearray(npy.encode(array))
        np.testing.assert_array_equal(npy.decode(data, "x"), np.load(io.BytesIO(data), allow_pickle=False))


def test_every_truncation_is_refused():
    data = npy.encode(np.zeros((2, 3), np.float16))
    for length in range(len(data)):
        with pytest.raises(UserError):
            npy.decode(bytearray(data[:length]), "x")


@given(st.integers(0, 127), st.integers(1, 255))
def test_a_flipped_header_byte_gives_an_array_or_an_error(position, flip):
    data = bytearray(npy.encode(np.zeros((2, 3), np.float16)))
    data[position] ^= flip
    try:
        assert npy.decode(data, "x").size * 2 <= len(data)
    except UserError as error:
        assert "\n" not in str(error)
