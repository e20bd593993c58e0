"""The network of faces: its released keys, and the tokens of the cond stages with it."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch

from ldm.modules.encoders import face
from ldm.modules.encoders.modules import FaceIdClipEncoder, FrozenFaceEncoder
from ldm.util import UserError, instantiate_from_config


def test_face_network_has_the_released_keys() -> None:
    with torch.device("meta"):
        shapes = {key: tuple(value.shape) for key, value in face.FaceNetwork().state_dict().items()}
    assert len({key.split(".")[1] for key in shapes if key.startswith("body.")}) == 24
    assert shapes["input_layer.0.weight"] == (64, 3, 3, 3)
    assert shapes["body.3.shortcut_layer.0.weight"] == (128, 64, 1, 1)
    assert shapes["body.23.res_layer.5.fc1.weight"] == (32, 512, 1, 1)
    assert shapes["output_layer.3.weight"] == (512, 512 * 7 * 7)
    assert not any(key.startswith("body.0.shortcut_layer") for key in shapes)


@pytest.fixture
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(face, "_STAGES", ((16, 1), (16, 1), (32, 1), (32, 1)))


def test_frozen_face_encoder_gives_one_token_and_trains_its_layer_alone(narrow: None, tmp_path: Path) -> None:
    torch.save(face.FaceNetwork().state_dict(), tmp_path / "faces.pth")
    encoder = FrozenFaceEncoder(str(tmp_path / "faces.pth"), augment=True).train()
    portraits = torch.rand(2, 3, 300, 300) * 2 - 1
    assert not encoder.loss_fn.facenet.training
    torch.testing.assert_close(encoder.loss_fn(portraits).norm(dim=1), torch.ones(2))
    token = encoder.encode(portraits)
    assert token.shape == (2, 1, 768)
    token.sum().backward()
    assert {name for name, part in encoder.named_parameters() if part.grad is not None} == {
        "mapper.weight",
        "mapper.bias",
    }
    assert not encoder.encode([""] * 3).any() and encoder.encode([""] * 3).shape == (3, 1, 768)


def test_missing_weights_of_faces_are_told(narrow: None, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        FrozenFaceEncoder("nowhere.pth")
    assert "model_path nowhere.pth: no such file" in caplog.text
    torch.save({"a": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(UserError, match=r"model_path .*other\.pth.*: not the weights of IR-SE50"):
        FrozenFaceEncoder(str(tmp_path / "other.pth"))


def test_face_id_clip_encoder_builds_as_in_its_config() -> None:
    with torch.device("meta"):
        stage = instantiate_from_config({"target": "ldm.modules.encoders.modules.FaceIdClipEncoder"})
        assert isinstance(stage, FaceIdClipEncoder)
        assert stage(torch.zeros(2, 3, 512, 512)).shape == (2, 2, 768)
