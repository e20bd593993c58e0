"""The downward half of the UNet, pooled."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ldm.modules.diffusionmodules.encoder_unet import AttentionPool
from ldm.modules.diffusionmodules.openaimodel import EncoderUNetModel
from ldm.util import UserError
from tests.golden_data import fill_seeded, seeded_tensor

PARAMS = {
    "image_size": 8,
    "in_channels": 3,
    "model_channels": 32,
    "out_channels": 5,
    "num_res_blocks": 1,
    "attention_resolutions": [2],
    "channel_mult": [1, 2],
    "num_head_channels": 16,
}


@pytest.mark.parametrize(
    ("pool", "keys"),
    [
        ("adaptive", {"0.weight", "0.bias", "3.weight", "3.bias"}),
        (
            "attention",
            {"0.weight", "0.bias", "2.positional_embedding"}
            | {f"2.{part}.{name}" for part in ("qkv_proj", "c_proj") for name in ("weight", "bias")},
        ),
        ("spatial", {"0.weight", "0.bias", "2.weight", "2.bias"}),
        ("spatial_v2", {f"{i}.{name}" for i in (0, 1, 3) for name in ("weight", "bias")}),
    ],
)
def test_encoder_unet_pools(pool: str, keys: set[str]) -> None:
    model = fill_seeded(EncoderUNetModel(**PARAMS, pool=pool)).eval()
    assert {key.removeprefix("out.") for key in model.state_dict() if key.startswith("out.")} == keys
    x = seeded_tensor("encoder/x", (2, 3, 8, 8))
    out = model(x, torch.tensor([3, 700]))
    assert out.shape == (2, 5)
    assert not torch.equal(out, model(x, torch.tensor([3, 701])))
    out.sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_attention_pool_by_hand() -> None:
    pool = fill_seeded(AttentionPool(side=2, channels=8, head_channels=4, out_channels=3))
    x = seeded_tensor("pool/x", (1, 8, 2, 2))
    tokens = torch.cat([x.mean(dim=(2, 3))[..., None], x.flatten(2)], dim=2) + pool.positional_embedding
    q, k, v = pool.qkv_proj(tokens)[0].chunk(3)  # (8, 5) each
    pooled = torch.cat([v[part] @ ((q[part, 0] @ k[part]) / 2).softmax(-1) for part in (slice(4), slice(4, 8))])
    torch.testing.assert_close(pool(x), pool.c_proj(pooled[None, :, None])[..., 0])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"pool": "max"}, "pool 'max' is unknown; valid: adaptive, attention, spatial, spatial_v2"),
        ({"pool": "attention", "num_head_channels": -1}, "pool 'attention' needs num_head_channels"),
    ],
)
def test_encoder_unet_refuses(change: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        EncoderUNetModel(**PARAMS | change)
