"""Tensors of every kind that checkpoints hold."""

import torch

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.uint8, torch.bool]


def tensors():
    """One or more of each kind, by name."""
    generator = torch.Generator().manual_seed(0)
    shared = torch.arange(24.0)
    return {
        **{str(dtype): torch.randn(3, 5, generator=generator).to(dtype) for dtype in DTYPES},
        "scalar": torch.tensor(3),
        "empty": torch.empty(0, 4),
        "shared": shared,
        "transposed view": shared[4:].view(4, 5).t(),
        "parameter": torch.nn.Parameter(torch.ones(2)),
        "float8": torch.ones(3).to(torch.float8_e4m3fn),
        "complex": torch.ones(2, dtype=torch.complex64),
    }


def same(a, b):
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.to(torch.complex128), b.to(torch.complex128))
