"""Tests of the set-up of a fit."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from ldm.training.fit import use_tensor_cores


@pytest.fixture(name="precision")
def fixture_precision() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(before)


def test_matrix_products_use_tensor_cores_on_a_gpu_only(precision: None) -> None:
    use_tensor_cores(torch.device("cpu"))
    assert torch.get_float32_matmul_precision() == "highest"
    use_tensor_cores(torch.device("cuda", 1))
    assert torch.get_float32_matmul_precision() == "high"
