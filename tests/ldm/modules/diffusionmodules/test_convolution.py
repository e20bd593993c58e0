"""`Conv2d` is torch's, whichever way it goes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from ldm.modules.cpu import as_on_cuda
from ldm.modules.diffusionmodules import convolution
from ldm.modules.diffusionmodules.convolution import Conv2d


def results(module: nn.Module, forward, x: Tensor) -> list[Tensor]:
    module.zero_grad()
    x = x.clone().requires_grad_()
    out = forward(x)
    out.square().sum().backward()
    return [out, x.grad, *(parameter.grad for parameter in module.parameters())]


@pytest.mark.parametrize("kernel, padding", [(1, 0), (3, 1), (3, 0), ((3, 1), (2, 0))])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("dilation, bias", [(1, True), (2, False)])
def test_the_product_is_the_convolution(kernel, padding, stride, dilation, bias):
    torch.manual_seed(0)
    module = Conv2d(3, 5, kernel, stride, padding, dilation, bias=bias).double()
    x = torch.randn(2, 3, 7, 6, dtype=torch.float64)
    torchs = results(module, super(Conv2d, module).forward, x)
    for ours, expected in zip(results(module, module._as_product, x), torchs, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)


@pytest.fixture
def products(monkeypatch):
    """Count the convolutions that run as matrix products, from 100 weights per pixel."""
    calls = []
    product = Conv2d._as_product
    monkeypatch.setattr(convolution, "_MANY_WEIGHTS", 100)
    monkeypatch.setattr(Conv2d, "_as_product", lambda self, x: calls.append(x.shape) or product(self, x))
    return calls


def test_few_pixels_with_many_weights_are_a_product(products):
    module = Conv2d(40, 40, 3, padding=1)  # 1600 weights a position of the kernel
    module(torch.randn(1, 40, 4, 4))
    assert len(products) == 1
    module(torch.randn(2, 40, 4, 4))
    assert len(products) == 1
    Conv2d(40, 40, 3, stride=2, padding=1)(torch.randn(2, 40, 4, 4))
    assert len(products) == 2


def test_a_pointwise_convolution_of_one_image_with_few_pixels_is_a_product(products, monkeypatch):
    monkeypatch.setattr(convolution, "_FEW_PIXELS", 16)
    module = Conv2d(2, 2, 1)
    module(torch.randn(1, 2, 4, 4))
    assert len(products) == 1
    module(torch.randn(2, 2, 2, 2))
    module(torch.randn(1, 2, 4, 5))
    Conv2d(2, 2, 1, stride=2)(torch.randn(1, 2, 4, 4))
    Conv2d(2, 2, 1, padding=1)(torch.randn(1, 2, 2, 2))
    assert len(products) == 1


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("kernel", [1, 3])
def test_the_product_of_frozen_weights_is_that_of_trained_ones(batch, kernel):
    torch.manual_seed(0)
    module, x = Conv2d(32, 64, kernel, padding=kernel // 2), torch.randn(batch, 32, 8, 8)
    trained = module._as_product(x)
    assert trained.is_contiguous()
    with torch.no_grad():
        assert module.requires_grad_(False)._as_product(x).equal(trained)


def test_a_forecast_for_cuda_has_no_products(products):
    with as_on_cuda():
        Conv2d(40, 40, 3, padding=1)(torch.randn(1, 40, 4, 4))
    assert not products


@pytest.mark.parametrize("options", [{"groups": 2}, {"padding_mode": "reflect"}, {"padding": "same"}])
def test_what_the_product_cannot_is_left_to_torch(products, options):
    module = Conv2d(40, 40, 3, **{"padding": 1, **options})
    assert module(torch.randn(1, 40, 4, 4)).shape == (1, 40, 4, 4)
    assert not products
