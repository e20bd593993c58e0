"""Transforms between PIL images and tensors."""

import numpy as np
import pytest
import torch
from PIL import Image

from ldm.images.tensors import ConvertImageDtype, Normalize, PILToTensor, ToPILImage, ToTensor
from ldm.util import UserError
from tests.ldm.image_files import gradient


def test_to_tensor_scales_bytes_and_nothing_else():
    values = gradient(4, 6)
    expected = torch.from_numpy(values).permute(2, 0, 1).float() / 255
    assert torch.equal(ToTensor()(Image.fromarray(values)), expected)
    assert torch.equal(ToTensor()(values), expected)
    assert torch.equal(ToTensor()(values.astype(np.float32)), expected * 255)
    assert ToTensor()(values[..., 0]).shape == (1, 4, 6)


def test_pil_to_tensor_and_back():
    pil = Image.fromarray(gradient(4, 6))
    tensor = PILToTensor()(pil)
    assert tensor.dtype == torch.uint8
    for x in (tensor, ToTensor()(pil)):
        assert np.array_equal(np.asarray(ToPILImage()(x)), gradient(4, 6))
    assert ToPILImage("L")(tensor).mode == "L"
    assert PILToTensor()(Image.new("1", (3, 2), 1)).tolist() == [[[255] * 3] * 2]


def test_convert_image_dtype_scales_both_ways():
    tensor = PILToTensor()(Image.fromarray(gradient(4, 6)))
    scaled = ConvertImageDtype("torch.float32")(tensor)
    assert scaled.max() == 1.0
    assert torch.equal(ConvertImageDtype(torch.uint8)(scaled), tensor)
    with pytest.raises(UserError, match="dtype 'int3'"):
        ConvertImageDtype("int3")


def test_normalize():
    x = torch.rand(3, 4, 4)
    mean, std = [0.1, 0.2, 0.3], [0.5, 0.6, 0.7]
    done = Normalize(mean, std)(x)
    for channel in range(3):
        assert torch.allclose(done[channel], (x[channel] - mean[channel]) / std[channel])
    assert not torch.equal(done, x)
    assert Normalize(mean, std, inplace=True)(x) is x
    with pytest.raises(UserError, match="std"):
        Normalize(mean, [0.5, 0.0, 0.5])
    with pytest.raises(UserError, match="put ToTensor before it"):
        Normalize(mean, std)(Image.new("RGB", (2, 2)))
