"""The labels that a UNet takes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ldm.modules.diffusionmodules.labels import check_labels, label_embedding, label_features
from ldm.modules.diffusionmodules.openaimodel import UNetModel
from ldm.util import UserError
from tests.ldm.modules.diffusionmodules.test_openaimodel import TINY, inputs


@pytest.mark.parametrize(
    ("num_classes", "adm_in_channels", "keys"),
    [
        (10, None, {"weight"}),
        ("continuous", None, {"weight", "bias"}),
        ("timestep", None, {"1.0.weight", "1.0.bias", "1.2.weight", "1.2.bias"}),
        ("sequential", 7, {"0.0.weight", "0.0.bias", "0.2.weight", "0.2.bias"}),
    ],
)
def test_label_embedding(num_classes: int | str, adm_in_channels: int | None, keys: set[str]) -> None:
    embedding = label_embedding(num_classes, 32, adm_in_channels)
    assert set(embedding.state_dict()) == keys
    y = {"continuous": torch.ones(3, 1), "sequential": torch.ones(3, 7)}.get(num_classes, torch.tensor([0, 1, 2]))
    features = label_features(y, num_classes, 32, torch.float32)
    assert embedding(features).shape == (3, 128)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("sequental", 32, 7), "num_classes 'sequental' is unknown; give a number of classes, or one of continuous"),
        (("sequential", 32, None), "adm_in_channels None: give a whole number of features of y of at least 1"),
        ((0, 32, None), "num_classes 0 is unknown"),
        ((True, 32, None), "num_classes True is unknown"),
    ],
)
def test_label_embedding_names_what_does_not_fit(arguments: tuple[Any, ...], said: str) -> None:
    with pytest.raises(UserError, match=said):
        label_embedding(*arguments)


def test_check_labels() -> None:
    check_labels(None, 2, None, None)
    check_labels(torch.ones(2, 7), 2, "sequential", 7)
    for y, num_classes, said in (
        (None, 10, "num_classes=10"),
        (torch.ones(2), None, "num_classes=None"),
        (torch.ones(1, 7), "sequential", "for a batch of 2"),
        (torch.ones(2, 8), "sequential", r"shape \(2, 8\); adm_in_channels requires \(B, 7\)"),
    ):
        with pytest.raises(ValueError, match=said):
            check_labels(y, 2, num_classes, 7 if num_classes == "sequential" else None)


@pytest.mark.parametrize("num_classes", ["continuous", "timestep", "sequential"])
def test_labels_of_a_half_precision_unet(num_classes: str) -> None:
    model = UNetModel(**TINY, num_classes=num_classes, adm_in_channels=5).bfloat16()
    y = {"continuous": torch.ones(2, 1), "timestep": torch.tensor([3, 900])}.get(num_classes, torch.ones(2, 5))
    assert model(**inputs("unet_sd_tiny") | {"y": y}).dtype == torch.bfloat16
