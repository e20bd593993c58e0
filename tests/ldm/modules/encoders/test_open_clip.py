"""OpenCLIP's text towers: golden states, released keys, and what they do with bad input."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ldm.modules.encoders.open_clip import FrozenOpenCLIPEmbedder, FrozenOpenCLIPEmbedder2
from ldm.util import UserError
from tests.golden_data import case, reference, relative_error, released_keys, seeded_weight

PREFIX = "cond_stage_model."
CASE = case("openclip_text")
TINY = CASE["text_config"]


def filled(kind: type[FrozenOpenCLIPEmbedder], **options: Any) -> FrozenOpenCLIPEmbedder:
    model = kind(arch=CASE["arch"], text_config=TINY, **options).eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if parameter.ndim:
                parameter.copy_(seeded_weight(PREFIX + key, tuple(parameter.shape)))
    return model


@pytest.mark.parametrize("layer", ["last", "penultimate"])
def test_golden_openclip_states(layer: str) -> None:
    prompts = CASE["prompts"]
    with torch.no_grad():
        for kind in (FrozenOpenCLIPEmbedder, FrozenOpenCLIPEmbedder2):
            assert relative_error(filled(kind, layer=layer).encode(prompts), reference("openclip_text", layer)) < 1e-5
        raw = reference("openclip_text", f"raw_{layer}")
        assert relative_error(filled(FrozenOpenCLIPEmbedder2, layer=layer, legacy=False)(prompts), raw) < 1e-5
        z, pooled = filled(FrozenOpenCLIPEmbedder2, layer=layer, legacy=False, always_return_pooled=True)(prompts)
    assert relative_error(z, raw) < 1e-5
    assert relative_error(pooled, reference("openclip_text", "pooled")) < 1e-5


def test_golden_openclip_ids_and_keys() -> None:
    model = filled(FrozenOpenCLIPEmbedder)
    assert model.tokenize(CASE["prompts"]).tolist() == CASE["token_ids"]
    assert {PREFIX + key: list(value.shape) for key, value in model.state_dict().items()} == CASE["keys"]


@pytest.mark.parametrize(
    ("build", "file", "prefix", "count"),
    [
        (FrozenOpenCLIPEmbedder, "sd_v2_keys", "cond_stage_model.", 354_032_641),
        (
            lambda: FrozenOpenCLIPEmbedder2(arch="ViT-bigG-14", legacy=False, always_return_pooled=True),
            "sdxl_base_keys",
            "conditioner.embedders.1.",
            694_659_841,
        ),
    ],
    ids=["SD 2", "SDXL"],
)
def test_released_openclip_keys(build: Any, file: str, prefix: str, count: int) -> None:
    with torch.device("meta"):
        model = build()
    state = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    assert state == released_keys(prefix, file)
    assert sum(parameter.numel() for parameter in model.parameters()) == count


def test_openclip_built_on_meta_and_assigned() -> None:
    model = filled(FrozenOpenCLIPEmbedder)
    with torch.device("meta"):
        other = FrozenOpenCLIPEmbedder(arch=CASE["arch"], text_config=TINY)
    other.load_state_dict({**model.state_dict(), "model.attn_mask": torch.zeros(77, 77)}, assign=True)
    assert torch.equal(other.eval()("a cat"), model(["a cat"]))


def test_openclip_is_frozen_unless_asked() -> None:
    assert not any(parameter.requires_grad for parameter in filled(FrozenOpenCLIPEmbedder).parameters())
    model = filled(FrozenOpenCLIPEmbedder, freeze=False)
    model("a cat").sum().backward()
    assert model.model.token_embedding.weight.grad is not None


def test_openai_versions_have_the_quick_activation() -> None:
    exact, quick, named = (
        FrozenOpenCLIPEmbedder(arch=arch, version=version, text_config=TINY)
        for arch, version in (("ViT-L-14", "laion2b_s32b_b82k"), ("ViT-L-14", "openai"), ("ViT-L-14-quickgelu", None))
    )
    for other in (quick, named):
        other.load_state_dict(exact.state_dict())
    assert torch.equal(quick("a cat"), named("a cat"))
    assert not torch.allclose(quick("a cat"), exact("a cat"))


def test_a_shorter_openclip_context() -> None:
    model = filled(FrozenOpenCLIPEmbedder)
    short = filled(FrozenOpenCLIPEmbedder, max_length=20)
    # Causal attention: what follows a position does not change it.
    torch.testing.assert_close(short(["a cat"]), model(["a cat"])[:, :20])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"arch": "ViT-H-16"}, "arch 'ViT-H-16' is unknown; did you mean"),
        ({"layer": "hidden"}, "layer 'hidden' is unknown; valid: last, penultimate"),
        ({"text_config": {"widht": 32}}, "unknown key 'widht' in text_config; did you mean 'width'"),
        ({"text_config": {"width": 30, "heads": 4}}, "width 30 is not a multiple of heads 4"),
        ({"text_config": {"layers": 0}}, "text_config: layers 0: give a whole number of at least 1"),
        ({"text_config": TINY | {"vocab_size": 100}}, "vocab_size 100 must be at least 49408"),
        ({"text_config": TINY, "max_length": 78}, "max_length 78 exceeds context_length 77"),
    ],
)
def test_openclip_refuses(options: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        FrozenOpenCLIPEmbedder(**options)


def test_openclip_pooled_needs_the_raw_states() -> None:
    with pytest.raises(UserError, match="always_return_pooled: true needs legacy: false"):
        FrozenOpenCLIPEmbedder2(text_config=TINY, always_return_pooled=True)
