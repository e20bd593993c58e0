"""Names of torch's dtypes in file formats, and comparisons for dtypes without reductions in torch."""

from __future__ import annotations

import torch

from ldm.util import UserError, refuse_if

# Typed storages of torch.save. Other dtypes are saved as an UntypedStorage of bytes.
STORAGE_NAMES = {
    torch.float64: "DoubleStorage",
    torch.float32: "FloatStorage",
    torch.float16: "HalfStorage",
    torch.bfloat16: "BFloat16Storage",
    torch.int64: "LongStorage",
    torch.int32: "IntStorage",
    torch.int16: "ShortStorage",
    torch.int8: "CharStorage",
    torch.uint8: "ByteStorage",
    torch.bool: "BoolStorage",
    torch.complex128: "ComplexDoubleStorage",
    torch.complex64: "ComplexFloatStorage",
}
_SAFETENSORS = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e4m3fnuz": "F8_E4M3FNUZ",
    "float8_e5m2": "F8_E5M2",
    "float8_e5m2fnuz": "F8_E5M2FNUZ",
    "float8_e8m0fnu": "F8_E8M0",
    "complex64": "C64",
    "int64": "I64",
    "int32": "I32",
    "int16": "I16",
    "int8": "I8",
    "uint64": "U64",
    "uint32": "U32",
    "uint16": "U16",
    "uint8": "U8",
    "bool": "BOOL",
}
SAFETENSORS_NAMES = {getattr(torch, dtype): name for dtype, name in _SAFETENSORS.items() if hasattr(torch, dtype)}
# Dtypes with several values per byte. torch stores them without arithmetic.
_PACKED = tuple(
    getattr(torch, name)
    for name in ("float4_e2m1fn_x2", "bits1x8", "bits2x4", "bits4x2", "bits8", "bits16")
    if hasattr(torch, name)
)


def reducible(tensor: torch.Tensor) -> torch.Tensor | None:
    """Return `tensor` in a dtype that torch can reduce, or None if its dtype has no infinity and no NaN.

    float8 becomes float32, and a complex number becomes a pair of real numbers.
    """
    if tensor.dtype in _PACKED or not (tensor.is_floating_point() or tensor.is_complex()):
        return None
    if tensor.is_complex():
        return torch.view_as_real(tensor.resolve_conj())
    return tensor.to(torch.float32) if tensor.dtype.itemsize == 1 else tensor


def is_finite(tensor: torch.Tensor) -> bool:
    """Return True if all values are finite, for any dtype."""
    numbers = reducible(tensor)
    return numbers is None or bool(torch.isfinite(numbers).all())


def same_values(first: torch.Tensor, second: torch.Tensor) -> bool:
    """Return True if two tensors of equal dtype have the same shape and values. NaN differs from NaN."""
    if first.dtype in _PACKED:
        return first.shape == second.shape and torch.equal(as_bytes(first), as_bytes(second))
    if first.dtype == torch.complex32:
        first, second = first.to(torch.complex64), second.to(torch.complex64)
    elif first.is_floating_point() and first.dtype.itemsize == 1:
        first, second = first.to(torch.float32), second.to(torch.float32)
    return torch.equal(first, second)


def precise_dtype(*dtypes: torch.dtype) -> torch.dtype:
    """Return float32, or a wider dtype that holds the values of `dtypes`. torch promotes none of 8 bits or less."""
    wide = torch.float32
    for dtype in dtypes:
        if not (dtype.is_floating_point and dtype.itemsize == 1):
            wide = torch.promote_types(wide, dtype)
    return wide


def can_hold(own: torch.dtype, given: torch.dtype) -> bool:
    """Return True if values of dtype `given` keep their meaning in `own`. Integers may be quantised weights."""
    if own.is_complex or not (own.is_floating_point or given.is_complex):
        return True
    return given.is_floating_point


def converted(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return `tensor` converted to `dtype`.

    Raises:
        UserError: torch has no such conversion, or imaginary parts would be lost.
    """
    if tensor.dtype == dtype:
        return tensor
    refuse_if(
        tensor.is_complex() and not dtype.is_complex,
        f"a weight is {tensor.dtype}, which {dtype} cannot hold; save it in another dtype",
    )
    try:
        return tensor.to(dtype)
    except RuntimeError as error:
        raise UserError(
            f"torch cannot convert {tensor.dtype} weights to {dtype}; save them in another dtype"
        ) from error


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """Return the bytes of `tensor` in row order, uint8 (n,), on the CPU."""
    tensor = tensor.detach().cpu().resolve_conj().resolve_neg()
    if tensor.dtype in _PACKED and not tensor.is_contiguous():  # torch can only copy the bytes of such values
        integers = {1: torch.uint8, 2: torch.int16}[tensor.dtype.itemsize]
        tensor = tensor.view(integers)
    tensor = tensor.contiguous()
    # One element is contiguous with any stride, but `view` refuses some strides.
    return tensor.as_strided((tensor.numel(),), (1,)).view(torch.uint8)
