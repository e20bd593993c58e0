"""Reductions and conversions work in every dtype that weights have."""

import pytest
import torch

from ldm.callbacks.faults import _all_finite
from ldm.checkpoint.formats import as_bytes, converted, is_finite, reducible, same_values
from ldm.util import UserError
from tests.ldm.checkpoint.sample_tensors import DTYPES, PACKED, tensors

INFINITE = [
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e5m2),
    *(torch.complex32, torch.complex64, torch.complex128),
]
ONLY_NAN = [torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz, torch.float8_e8m0fnu]


@pytest.mark.parametrize("name", tensors())
def test_is_finite_takes_every_tensor(name):
    tensor = tensors()[name].detach()
    assert is_finite(tensor)
    assert _all_finite(iter([tensor]))
    assert same_values(tensor, tensor.resolve_conj().clone() if tensor.dtype not in PACKED else tensor)


@pytest.mark.parametrize("dtype", [*INFINITE, *ONLY_NAN])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_is_finite_finds_one_value_that_is_not(dtype, value):
    if dtype in ONLY_NAN:
        value = float("nan")
    tensor = torch.tensor([1.0, value, 2.0]).to(dtype)
    assert not is_finite(tensor)
    assert not _all_finite(iter([torch.ones(2), tensor]))
    assert _all_finite(iter([torch.ones(2), tensor[:1]]))


@pytest.mark.parametrize("dtype", [*DTYPES, *PACKED])
def test_same_values_compares_values_and_shapes(dtype):
    values = torch.arange(1, 9, dtype=torch.uint8)
    first = values.view(dtype) if dtype in PACKED else values.to(dtype)
    second = values.flip(0).view(dtype) if dtype in PACKED else torch.zeros(8).to(dtype)
    assert same_values(first, first)
    assert not same_values(first, second)
    assert not same_values(first, first[:2])


def test_converted_refuses_what_would_lose_the_imaginary_parts():
    assert converted(torch.ones(2), torch.complex64).dtype == torch.complex64
    with pytest.raises(UserError, match=r"complex64, which torch\.float32 cannot hold"):
        converted(torch.ones(2, dtype=torch.complex64), torch.float32)
    with pytest.raises(UserError, match="torch cannot convert"):
        converted(torch.zeros(2, dtype=torch.uint8).view(torch.bits8), torch.float32)


def test_reducible_leaves_what_torch_reduces():
    tensor = torch.ones(3)
    assert reducible(tensor) is tensor
    assert reducible(torch.ones(3, dtype=torch.int32)) is None


def test_as_bytes_takes_a_single_element_of_any_stride():
    assert as_bytes(torch.arange(4.0)[::2][1:]).tolist() == [0, 0, 0, 64]
