"""CLIP's image towers, against another implementation, and their released keys."""

from __future__ import annotations

import pytest
import torch

from ldm.modules.encoders.clip_image import (
    FaceClipEncoder,
    FrozenCLIPImageEmbedder,
    FrozenClipImageEmbedder,
    FrozenOpenCLIPImageEmbedder,
    VisionTower,
)
from ldm.util import UserError
from tests.golden_data import fill_seeded, seeded_tensor

SMALL = {"width": 32, "heads": 2, "layers": 2, "patch": 14, "mlp_width": 64, "embed_dim": 16}


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
def test_vision_tower_is_the_one_of_transformers(activation: str) -> None:
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    ours = fill_seeded(VisionTower(**SMALL, side=28, quick_gelu=activation == "quick_gelu")).eval()
    theirs = CLIPVisionModelWithProjection(
        CLIPVisionConfig(
            hidden_size=32,
            intermediate_size=64,
            projection_dim=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=28,
            patch_size=14,
            hidden_act=activation,
        )
    ).eval()
    own = ours.state_dict()
    state = {
        "vision_model.embeddings.class_embedding": own["class_embedding"],
        "vision_model.embeddings.position_embedding.weight": own["positional_embedding"],
        "vision_model.embeddings.patch_embedding.weight": own["conv1.weight"],
        "visual_projection.weight": own["proj"].T,
    }
    names = {"ln_pre": "vision_model.pre_layrnorm", "ln_post": "vision_model.post_layernorm"}
    for i in range(2):
        block, layer = f"transformer.resblocks.{i}", f"vision_model.encoder.layers.{i}"
        names |= {
            f"{block}.ln_1": f"{layer}.layer_norm1",
            f"{block}.ln_2": f"{layer}.layer_norm2",
            f"{block}.attn.out_proj": f"{layer}.self_attn.out_proj",
            f"{block}.mlp.c_fc": f"{layer}.mlp.fc1",
            f"{block}.mlp.c_proj": f"{layer}.mlp.fc2",
        }
        for kind in ("weight", "bias"):
            for part, value in zip("qkv", own[f"{block}.attn.in_proj_{kind}"].chunk(3), strict=True):
                state[f"{layer}.self_attn.{part}_proj.{kind}"] = value
    for mine, other in names.items():
        state |= {f"{other}.{kind}": own[f"{mine}.{kind}"] for kind in ("weight", "bias")}
    missing, unexpected = theirs.load_state_dict(state, strict=False)
    assert not unexpected and all("position_ids" in key for key in missing)
    x = seeded_tensor("vision/x", (2, 3, 28, 28))
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x).image_embeds, atol=1e-5, rtol=1e-5)


def test_released_image_embedder_keys() -> None:
    with torch.device("meta"):
        whole = {key: tuple(value.shape) for key, value in FrozenClipImageEmbedder().state_dict().items()}
        image = {key: tuple(value.shape) for key, value in FrozenCLIPImageEmbedder().state_dict().items()}
        unclip = {key: tuple(value.shape) for key, value in FrozenOpenCLIPImageEmbedder().state_dict().items()}
    assert image == {key: shape for key, shape in whole.items() if not key.startswith("model.transformer.")}
    assert sum(torch.Size(shape).numel() for shape in whole.values()) == 427_616_513  # all of CLIP ViT-L/14
    assert sum(torch.Size(shape).numel() for key, shape in unclip.items() if "visual" in key) == 632_076_800
    anchors = {
        "model.visual.class_embedding": (1024,),
        "model.visual.positional_embedding": (257, 1024),
        "model.visual.proj": (1024, 768),
        "model.visual.conv1.weight": (1024, 3, 14, 14),
        "model.visual.ln_pre.weight": (1024,),
        "model.visual.transformer.resblocks.23.attn.in_proj_weight": (3072, 1024),
        "model.text_projection": (768, 768),
        "model.logit_scale": (),
    }
    assert {key: image[key] for key in anchors} == anchors


def test_image_embedders_see_images_of_any_size() -> None:
    with torch.device("meta"):
        built = FrozenClipImageEmbedder, FrozenCLIPImageEmbedder
        pooled, context = (kind(model="ViT-B/32") for kind in built)
    for model in (pooled, context):
        model.model.visual = fill_seeded(VisionTower(**SMALL))
        model.mean, model.std = torch.tensor([0.5] * 3), torch.tensor([0.5] * 3)
    x = seeded_tensor("image/x", (2, 3, 40, 56)).clamp(-1, 1)
    assert pooled(x).shape == (2, 16)
    assert torch.equal(context.encode(x), pooled(x)[:, None])
    assert torch.equal(context.encode([""]), torch.zeros(1, 1, 16))


def test_image_embedder_normalises_as_clip_does() -> None:
    model = with_small_model()
    grey = torch.zeros(1, 3, 8, 8)  # 0.5 in [0, 1]
    mean, std = model.mean[:, None, None], model.std[:, None, None]
    torch.testing.assert_close(model.preprocess(grey), ((0.5 - mean) / std).expand(1, 3, 224, 224))
    x = seeded_tensor("image/x", (1, 3, 224, 224))
    torch.testing.assert_close(
        model.preprocess(x), ((x + 1) / 2 - model.mean[:, None, None]) / model.std[:, None, None]
    )


def test_antialiasing_smooths_what_is_made_smaller() -> None:
    model = with_small_model()
    noise = torch.rand(1, 3, 896, 896) * 2 - 1
    rough = model.preprocess(noise).std()
    model.antialias = True
    assert model.preprocess(noise).std() < 0.5 * rough


def with_small_model() -> FrozenClipImageEmbedder:
    return FrozenClipImageEmbedder(model="ViT-B/32")


def test_face_clip_encoder_tells_the_face_from_the_rest() -> None:
    with torch.device("meta"):
        model = FaceClipEncoder(augment=False)
    encoder = model.encoder
    encoder.model.visual = fill_seeded(VisionTower(**SMALL))
    encoder.mean, encoder.std = torch.tensor([0.5] * 3), torch.tensor([0.5] * 3)
    x = seeded_tensor("face/x", (1, 3, 512, 512)).clamp(-1, 1)
    changed = x.clone()
    changed[..., 250:300, 200:300] = 0
    face, rest = model.encode(x).unbind(1)
    other_face, other_rest = model.encode(changed).unbind(1)
    assert face.shape == (1, 16)
    assert torch.equal(rest, other_rest) and not torch.equal(face, other_face)
    assert torch.equal(model.encode([""]), torch.zeros(1, 2, 16))


@pytest.mark.parametrize(
    ("build", "said"),
    [
        (lambda: FrozenClipImageEmbedder(model="ViT-L/15"), "model 'ViT-L-15' is unknown; did you mean 'ViT-L-14'"),
        (lambda: FrozenClipImageEmbedder(jit=True), "jit: true would load a compiled file"),
        (lambda: FrozenOpenCLIPImageEmbedder(arch="ViT"), "arch 'ViT' is unknown"),
        (lambda: FrozenOpenCLIPImageEmbedder(layer="last"), "layer 'last' is unknown; valid: pooled"),
    ],
)
def test_image_embedders_refuse(build, said: str) -> None:
    with pytest.raises(UserError, match=said):
        build()
