"""Tensors of every kind that checkpoints hold."""

import torch

from ldm.checkpoint.formats import SAFETENSORS_NAMES, as_bytes

# Dtypes that torch.save writes, except for those of quantised tensors.
DTYPES = [
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16),
    *(torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.float8_e5m2, torch.float8_e5m2fnuz, torch.float8_e8m0fnu),
    *(torch.complex32, torch.complex64, torch.complex128, torch.bool),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint64, torch.uint32, torch.uint16, torch.uint8),
]
PACKED = [torch.float4_e2m1fn_x2, torch.bits8, torch.bits16, torch.bits1x8, torch.bits2x4, torch.bits4x2]


def tensors():
    """Return one or more of each kind, by name."""
    generator = torch.Generator().manual_seed(0)
    shared = torch.arange(24.0)
    packed = torch.randint(256, (4, 6), generator=generator, dtype=torch.uint8)
    return {
        **{str(dtype): torch.randn(3, 5, generator=generator).abs().to(dtype) for dtype in DTYPES},
        **{str(dtype): packed.view(dtype) for dtype in PACKED},
        "scalar": torch.tensor(3),
        "empty": torch.empty(0, 4),
        "shared": shared,
        "transposed view": shared[4:].view(4, 5).t(),
        "parameter": torch.nn.Parameter(torch.ones(2)),
        "conjugate": torch.tensor([1 + 2j]).conj(),
        "negative": torch.tensor([1 + 2j]).conj().imag,
    }


def safetensors_holds(tensor):
    return tensor.dtype in SAFETENSORS_NAMES


def same(a, b):
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(as_bytes(a), as_bytes(b))
