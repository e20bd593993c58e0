"""MiDaS: released keys, a round trip through them, and depth of the right shape."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from ldm.modules.midas import api
from ldm.modules.midas.api import MiDaSInference
from ldm.util import UserError

SMALL = {
    "num_hidden_layers": 4,
    "backbone_out_indices": [0, 1, 2, 3],
    "intermediate_size": 64,
    "neck_hidden_sizes": [256, 512, 8, 8],
}


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> Iterator[MiDaSInference]:
    """Return a network with fewer and narrower layers."""
    monkeypatch.setattr(api, "_DPT_HYBRID", api._DPT_HYBRID | SMALL)
    return MiDaSInference("dpt_hybrid")


def test_released_midas_keys() -> None:
    with torch.device("meta"):
        state = MiDaSInference(model_type="dpt_hybrid").state_dict()
    anchors = {
        "model.pretrained.model.cls_token": (1, 1, 768),
        "model.pretrained.model.pos_embed": (1, 577, 768),
        "model.pretrained.model.patch_embed.backbone.stem.conv.weight": (64, 3, 7, 7),
        "model.pretrained.model.patch_embed.backbone.stages.2.blocks.8.conv3.weight": (1024, 256, 1, 1),
        "model.pretrained.model.patch_embed.backbone.stages.1.blocks.0.downsample.norm.bias": (512,),
        "model.pretrained.model.patch_embed.proj.weight": (768, 1024, 1, 1),
        "model.pretrained.model.blocks.11.attn.qkv.weight": (2304, 768),
        "model.pretrained.model.blocks.0.attn.qkv.bias": (2304,),
        "model.pretrained.model.blocks.0.attn.proj.weight": (768, 768),
        "model.pretrained.model.blocks.0.mlp.fc1.weight": (3072, 768),
        "model.pretrained.model.blocks.0.mlp.fc2.weight": (768, 3072),
        "model.pretrained.model.blocks.0.norm2.bias": (768,),
        "model.pretrained.model.norm.weight": (768,),
        "model.pretrained.model.head.weight": (1000, 768),
        "model.pretrained.act_postprocess3.0.project.0.weight": (768, 1536),
        "model.pretrained.act_postprocess3.3.weight": (768, 768, 1, 1),
        "model.pretrained.act_postprocess4.4.weight": (768, 768, 3, 3),
        "model.scratch.layer1_rn.weight": (256, 256, 3, 3),
        "model.scratch.layer4_rn.weight": (256, 768, 3, 3),
        "model.scratch.refinenet4.resConfUnit1.conv2.weight": (256, 256, 3, 3),
        "model.scratch.refinenet1.out_conv.bias": (256,),
        "model.scratch.output_conv.0.weight": (128, 256, 3, 3),
        "model.scratch.output_conv.4.bias": (1,),
    }
    assert {key: tuple(state[key].shape) for key in anchors} == anchors
    assert {key.split(".")[1] for key in state} == {"pretrained", "scratch"}


def test_midas_weights_go_in_as_they_come_out(small: MiDaSInference) -> None:
    state = {key: torch.randn_like(value) for key, value in small.state_dict().items()}
    assert not any(small.load_state_dict(state))  # nothing missing, nothing unexpected
    assert all(torch.equal(value, state[key]) for key, value in small.state_dict().items())
    key = "model.pretrained.model.blocks.1.attn.qkv.weight"
    small.load_state_dict({key: torch.ones_like(state[key])}, strict=False)
    attention = small.model.net.dpt.encoder.layer[1].attention.attention
    assert attention.query.weight.eq(1).all() and attention.value.weight.eq(1).all()
    with pytest.raises(RuntimeError, match=r"Missing key.*blocks\.0|Missing key"):
        small.load_state_dict({})


def test_midas_gives_the_depth_of_each_pixel(small: MiDaSInference) -> None:
    x = torch.rand(2, 3, 64, 96) * 2 - 1
    depth = small(x)
    assert depth.shape == (2, 1, 64, 96)
    assert not depth.requires_grad and not small.train().training
    assert not any(parameter.requires_grad for parameter in small.parameters())


@pytest.mark.slow
def test_midas_is_the_network_of_transformers(small: MiDaSInference) -> None:
    net = small.model.net
    x = torch.rand(1, 3, 384, 384) * 2 - 1
    ours = small(x)
    with torch.no_grad():
        torch.testing.assert_close(ours, net(pixel_values=x).predicted_depth[:, None])


def test_other_midas_networks_are_named() -> None:
    with pytest.raises(UserError, match="model_type 'dpt_large' is unknown"):
        MiDaSInference("dpt_large")
