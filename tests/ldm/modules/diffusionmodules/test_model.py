"""The networks of the first stage; their numbers are held by the golden cases of the autoencoder."""

from __future__ import annotations

import pytest
import torch

from ldm.modules.diffusionmodules.model import AttnBlock, Decoder, Downsample, Encoder, Upsample
from ldm.util import UserError

DDCONFIG = {
    "double_z": True,
    "z_channels": 4,
    "resolution": 32,
    "in_channels": 3,
    "out_ch": 3,
    "ch": 32,
    "ch_mult": [1, 2, 2],
    "num_res_blocks": 1,
    "attn_resolutions": [16],
    "dropout": 0.0,
}


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize(("double_z", "channels"), [(True, 8), (False, 4)])
def test_encoder_shape(double_z: bool, channels: int) -> None:
    encoder = Encoder(**DDCONFIG | {"double_z": double_z})
    assert encoder(torch.randn(2, 3, 24, 40)).shape == (2, channels, 6, 10)


def test_decoder_shape() -> None:
    assert Decoder(**DDCONFIG)(torch.randn(2, 4, 6, 10)).shape == (2, 3, 24, 40)


def test_attention_stands_at_the_named_resolution_only() -> None:
    keys = {*Encoder(**DDCONFIG).state_dict(), *Decoder(**DDCONFIG).state_dict()}
    assert {key.split(".")[1] for key in keys if ".attn." in key} == {"1"}
    assert "mid.attn_1.q.weight" in keys


def test_no_attention() -> None:
    options = DDCONFIG | {"attn_type": "none"}
    assert not any("attn" in key for cls in (Encoder, Decoder) for key in cls(**options).state_dict())
    assert Encoder(**options)(torch.randn(1, 3, 32, 32)).shape == (1, 8, 8, 8)


def test_the_attention_of_xformers_is_the_same_network() -> None:
    theirs, ours = (Encoder(**DDCONFIG | {"attn_type": name}) for name in ("vanilla-xformers", "vanilla"))
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(1, 3, 32, 32)
    assert torch.equal(theirs(x), ours(x))


def test_resampling_without_convolutions() -> None:
    options = DDCONFIG | {"resamp_with_conv": False}
    encoder, decoder = Encoder(**options), Decoder(**options)
    assert not any("sample" in key for module in (encoder, decoder) for key in module.state_dict())
    assert decoder(encoder(torch.randn(1, 3, 32, 32))[:, :4]).shape == (1, 3, 32, 32)


def test_decoder_ends() -> None:
    z = 100 * torch.randn(1, 4, 8, 8)
    plain, squashed, open_ended = (
        Decoder(**DDCONFIG | extra) for extra in ({}, {"tanh_out": True}, {"give_pre_end": True})
    )
    squashed.load_state_dict(plain.state_dict())
    torch.testing.assert_close(squashed(z), plain(z).tanh())
    assert open_ended(z).shape == (1, 32, 32, 32)


def test_downsample_pads_right_and_bottom() -> None:
    layer = Downsample(1)
    torch.nn.init.ones_(layer.conv.weight)
    torch.nn.init.zeros_(layer.conv.bias)
    x = torch.arange(16.0).reshape(1, 1, 4, 4)
    expected = [[x[..., :3, :3].sum(), x[..., :3, 2:].sum()], [x[..., 2:, :3].sum(), x[..., 2:, 2:].sum()]]
    torch.testing.assert_close(layer(x), torch.tensor(expected)[None, None])


def test_upsample_repeats_pixels() -> None:
    x = torch.arange(4.0).reshape(1, 1, 2, 2)
    expected = x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
    torch.testing.assert_close(Upsample(1, with_conv=False)(x), expected)


def test_attention_is_softmax_attention_over_positions() -> None:
    block = AttnBlock(32).double()
    x = torch.randn(2, 32, 3, 5, dtype=torch.double)
    q, k, v = (project(block.norm(x)).flatten(2) for project in (block.q, block.k, block.v))  # (B, C, N)
    weights = (torch.einsum("bcn,bcm->bnm", q, k) / 32**0.5).softmax(dim=-1)
    expected = x + block.proj_out(torch.einsum("bnm,bcm->bcn", weights, v).reshape(x.shape))
    torch.testing.assert_close(block(x), expected)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"ch": 20}, "channels do not divide into 32 groups"),
        ({"attn_type": "linear"}, "'linear'"),
        ({"use_linear_attn": True}, "use_linear_attn"),
    ],
)
def test_bad_options(change: dict[str, object], said: str) -> None:
    for cls in (Encoder, Decoder):
        with pytest.raises(UserError, match=said):
            cls(**DDCONFIG | change)
