"""The perceptual distance: its weights from files, and its numbers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ldm.checkpoint import save_state_dict
from ldm.models.autoencoder import AutoencoderKL
from ldm.models.lpips_weights import fill_lpips
from ldm.modules.losses.lpips import LPIPS
from ldm.util import UserError
from tests.golden_data import seeded_tensor
from tests.ldm.models.test_autoencoder import DDCONFIG, gan

# The layers of VGG16 as torchvision numbers them, and their channels.
LAYERS = {0: (3, 64), 2: (64, 64), 5: (64, 128), 7: (128, 128), 10: (128, 256), 12: (256, 256), 14: (256, 256),
          17: (256, 512), 19: (512, 512), 21: (512, 512), 24: (512, 512), 26: (512, 512), 28: (512, 512)}  # fmt: skip


@pytest.fixture(scope="module")
def vgg(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a file with the keys and shapes of torchvision's VGG16, without the classifier's large layers."""
    weights = {}
    for number, (inputs, outputs) in LAYERS.items():
        weights[f"features.{number}.weight"] = seeded_tensor(
            f"vgg/{number}", (outputs, inputs, 3, 3), (2 / 9 / inputs) ** 0.5
        )
        weights[f"features.{number}.bias"] = torch.zeros(outputs)
    weights["classifier.6.bias"] = torch.zeros(1000)
    path = tmp_path_factory.mktemp("vgg") / "vgg16.safetensors"
    save_state_dict(weights, path)
    return path


def test_fill_lpips_measures_as_torchmetrics_does(vgg: Path) -> None:
    """The oracle is torchmetrics' LPIPS, whose trunk is given to it instead of torchvision's."""
    from torchmetrics.functional.image.lpips import _normalize_tensor, _spatial_average

    model = LPIPS()
    fill_lpips(model, str(vgg))
    a, b = (seeded_tensor(name, (2, 3, 32, 32), 0.5).clamp(-1, 1) for name in ("lpips/a", "lpips/b"))
    features = [model.net(model.scaling_layer(images)) for images in (a, b)]
    expected = sum(
        _spatial_average(
            model.get_submodule(f"lin{i}").model((_normalize_tensor(x) - _normalize_tensor(y)) ** 2), keep_dim=True
        )
        for i, (x, y) in enumerate(zip(*features, strict=True))
    )
    torch.testing.assert_close(model(a, b), expected)
    assert model(a, b).shape == (2, 1, 1, 1) and (model(a, b) > 0).all()
    assert model(a, a).abs().max() == 0


def test_vgg16_is_that_of_the_paper(vgg: Path) -> None:
    """The last slice gives what thirteen convolutions with four poolings give."""
    model = LPIPS()
    fill_lpips(model, str(vgg))
    from ldm.checkpoint import load_state_dict

    weights, x = load_state_dict(vgg), seeded_tensor("lpips/x", (1, 3, 32, 32))
    expected = x
    for number in LAYERS:
        if number in (5, 10, 17, 24):
            expected = torch.nn.functional.max_pool2d(expected, 2)
        weight, bias = weights[f"features.{number}.weight"], weights[f"features.{number}.bias"]
        expected = torch.nn.functional.conv2d(expected, weight, bias, padding=1).relu()
    torch.testing.assert_close(model.net(x)[-1], expected)


def test_perceptual_ckpt_of_an_autoencoder_in_training(vgg: Path, tmp_path: Path) -> None:
    """The checkpoint of one is a file for the next; the gradient reaches the reconstruction only."""
    loss = gan(perceptual_weight=1.0, perceptual_ckpt=str(vgg))
    first = AutoencoderKL(DDCONFIG, loss, 4)
    assert "loss.perceptual_loss.net.slice5.28.weight" in first.state_dict()
    save_state_dict(first.state_dict(), tmp_path / "first.ckpt")
    model = AutoencoderKL(DDCONFIG, gan(perceptual_weight=1.0, perceptual_ckpt=str(tmp_path / "first.ckpt")), 4)
    model.setup("fit")
    images = seeded_tensor("lpips/a", (2, 3, 32, 32), 0.5).clamp(-1, 1)
    reconstructions, posterior = model(images)
    value, log = model.loss(images, reconstructions, posterior, 0, 0)
    value.backward()
    assert log["train/p_loss"] > 0
    assert all(parameter.grad is None for parameter in model.loss.perceptual_loss.parameters())


def test_perceptual_weights_that_are_missing(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"perceptual_weight 1.0 needs"):
        AutoencoderKL(DDCONFIG, gan(perceptual_weight=1.0), 4).setup("fit")
    save_state_dict({"features.0.bias": torch.zeros(64)}, tmp_path / "half.safetensors")
    with pytest.raises(UserError, match=r"half.safetensors: lacks net.slice1.0.weight \(25 of 33"):
        fill_lpips(LPIPS(), str(tmp_path / "half.safetensors"))
