"""A likely cause goes by what the file and the model hold."""

import pytest
import torch

from ldm.checkpoint.causes import NO_UNET, likely_cause, other_kind

RELEASE = ("model.diffusion_model.out.0.weight", "first_stage_model.encoder.x", "cond_stage_model.x")
XL = (*RELEASE[:2], "model.diffusion_model.label_emb.0.0.weight", "conditioner.embedders.0.x")
VAE = ("encoder.conv_in.weight", "decoder.conv_in.weight")
DIFFUSERS = ("encoder.down_blocks.0.x", "decoder.up_blocks.0.x")

CASES = [
    (VAE, RELEASE, "autoencoder alone"),
    (VAE, VAE, "default"),  # of other sizes
    (DIFFUSERS, VAE, "layout of diffusers"),
    (("text_model.x",), RELEASE, "text encoder alone"),
    (("control_model.x",), RELEASE, "ControlNet"),
    (("x",), RELEASE, NO_UNET),
    (RELEASE, RELEASE, "default"),
    (RELEASE[:1], RELEASE, "UNet alone"),
    (RELEASE[:2], RELEASE, "no text encoder"),
    (RELEASE[::2], RELEASE, "--vae FILE"),
    (RELEASE[:1], RELEASE[:1], "default"),
    *(
        ((*RELEASE, f"model.diffusion_model.out.0.{name}"), RELEASE, "weights are quantised")
        for name in ("scale_weight", "weight_scale", "weight.absmax", "weight.quant_map", "scaled_fp8", "qweight")
    ),
    ((*RELEASE, "model_ema.diffusion_modelattn1to_qweight"), RELEASE, "default"),  # the EMA of `to_q.weight`
    (XL, RELEASE, "layout of SDXL"),
    (XL, RELEASE[:2], "layout of SDXL"),
    (XL, XL[:3], "default"),  # a training without text encoders, such as of another SDXL
    (XL[:3], XL, "no text encoder"),
]


@pytest.mark.parametrize(("file", "model", "expected"), CASES)
def test_likely_cause(file, model, expected):
    weights, own = ({key: torch.ones(1) for key in keys} for keys in (file, model))
    assert expected in likely_cause(weights, own, "default")


def test_other_kind_knows_no_other_kind_of_a_release():
    assert other_kind({key: torch.ones(1) for key in RELEASE}) is None
