"""Attention, by whichever kernel."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ldm.modules.attention import attend
from tests.golden_data import relative_error, seeded_tensor

FUSED = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default


class Fused(TorchDispatchMode):
    """Counts uses of the fused kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        self.count += func is FUSED
        return func(*args, **(kwargs or {}))


def tensors(queries: int, keys: int, dtype: torch.dtype) -> list[torch.Tensor]:
    shapes = {"q": (2, 3, queries, 16), "k": (2, 3, keys, 16), "v": (2, 3, keys, 16)}
    return [seeded_tensor(f"attend/{name}", shape).to(dtype).requires_grad_() for name, shape in shapes.items()]


@pytest.mark.parametrize(("queries", "keys"), [(16, 16), (16, 77), (256, 77)])
@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
def test_results_and_gradients_are_those_of_the_formula(
    queries: int, keys: int, dtype: torch.dtype, error: float
) -> None:
    given = tensors(queries, keys, dtype)
    out = attend(*given)
    gradients = torch.autograd.grad(out.float().square().sum(), given)
    q, k, v = exact = [tensor.detach().double().requires_grad_() for tensor in given]
    expected = (q @ k.transpose(-1, -2) / 4).softmax(-1) @ v
    assert out.dtype == dtype and relative_error(out, expected) < error
    for gradient, correct in zip(gradients, torch.autograd.grad(expected.square().sum(), exact), strict=True):
        assert relative_error(gradient, correct) < 2 * error


@pytest.mark.parametrize(
    ("queries", "dtype", "gradients", "fused"),
    [
        (128, torch.bfloat16, True, False),
        (129, torch.bfloat16, True, True),
        (128, torch.bfloat16, False, True),
        (128, torch.float32, True, True),
    ],
    ids=["few scores", "many", "no backward", "float32"],
)
def test_training_on_a_cpu_in_bf16_does_without_the_fused_kernel_for_few_scores(
    queries: int, dtype: torch.dtype, gradients: bool, fused: bool
) -> None:
    given = tensors(queries, 128, dtype)
    with torch.set_grad_enabled(gradients), Fused() as counter:
        attend(*given)
    assert counter.count == fused
