"""Options of the UNet that have no effect here, or that do not exist."""

from __future__ import annotations

import logging

import pytest

from ldm.modules.diffusionmodules.openaimodel import EncoderUNetModel, UNetModel
from ldm.modules.diffusionmodules.unet_options import check_kernels
from ldm.util import UserError
from tests.ldm.modules.diffusionmodules.test_openaimodel import TINY


@pytest.mark.parametrize("name", ["use_fp16", "use_bf16"])
def test_note_precision(name: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        model = UNetModel(**TINY, **{name: True})
    assert f"{name}: true has no effect; --precision sets the type" in caplog.text
    assert {str(parameter.dtype) for parameter in model.parameters()} == {"torch.float32"}
    caplog.clear()
    UNetModel(**TINY, **{name: False})
    assert not caplog.text


def test_note_precision_of_the_encoder(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        EncoderUNetModel(8, 3, 32, 5, 1, [1], channel_mult=[1], use_fp16=True)
    assert "use_fp16: true has no effect" in caplog.text


def test_check_kernels() -> None:
    check_kernels("softmax-xformers", False, None, channels_last=False, dims=2)
    with pytest.raises(UserError, match="spatial_transformer_attn_type 'linear' is unknown; "):
        check_kernels("linear", False, None, channels_last=False, dims=2)
