"""The UNet against the golden cases, its key lists, and its own invariants."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from ldm.modules.diffusionmodules.layers import timestep_embedding
from ldm.modules.diffusionmodules.openaimodel import AttentionBlock, UNetModel
from ldm.util import UserError
from tests.golden_data import (
    case,
    cases,
    fill_seeded,
    reference,
    relative_error,
    released_keys,
    seeded_tensor,
    tensors,
)

UNETS = [*cases("unet"), *cases("unet", edition=2)]

SD_V1 = {
    "image_size": 32,
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 320,
    "attention_resolutions": [4, 2, 1],
    "num_res_blocks": 2,
    "channel_mult": [1, 2, 4, 4],
    "num_heads": 8,
    "use_spatial_transformer": True,
    "transformer_depth": 1,
    "use_checkpoint": True,
    "context_dim": 768,
    "legacy": False,
}
TINY = case("unet_sd_tiny")["params"]


def as_tensor(labels: list | None) -> torch.Tensor | None:
    return None if labels is None else torch.tensor(labels)


def inputs(name: str) -> dict[str, torch.Tensor | None]:
    spec = case(name)
    context, labels = spec["context_shape"], spec["y"]
    return {
        "x": seeded_tensor(f"{name}/x", spec["x_shape"]),
        "timesteps": torch.tensor(spec["timesteps"]),
        "context": None if context is None else seeded_tensor(f"{name}/context", context),
        "y": seeded_tensor(f"{name}/y", labels["shape"]) if isinstance(labels, dict) else as_tensor(labels),
    }


@pytest.mark.parametrize("name", UNETS)
def test_golden_forward_and_keys(name: str) -> None:
    model = fill_seeded(UNetModel(**case(name)["params"])).eval()
    assert {key: list(value.shape) for key, value in model.state_dict().items()} == case(name)["keys"]
    with torch.no_grad():
        out = model(**inputs(name))
    assert relative_error(out, reference(name, "out")) < 1e-5


@pytest.mark.parametrize("name", UNETS)
def test_golden_gradients(name: str) -> None:
    spec = case(name)
    model = fill_seeded(UNetModel(**spec["params"]))
    out = model(**inputs(name))
    (out * seeded_tensor(f"{name}/probe", tuple(out.shape))).sum().backward()
    # Some gradients are zero but for rounding, such as those of a bias before a norm of single channels.
    rounding = 1e-6 * max(spec["grad_norm"].values())
    for key, norm in spec["grad_norm"].items():
        assert model.get_parameter(key).grad.norm().item() == pytest.approx(norm, rel=1e-4, abs=rounding), key


def test_sd_v1_keys() -> None:
    with torch.device("meta"):
        model = UNetModel(**SD_V1)
    shapes = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    assert shapes == released_keys("model.diffusion_model.")
    assert sum(parameter.numel() for parameter in model.parameters()) == 859_520_964
    # Anchors that hold even if the list were regenerated.
    assert model.get_parameter("input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight").shape == (320, 768)
    assert model.get_parameter("output_blocks.2.1.conv.weight").shape == (1280, 1280, 3, 3)


SD_V2 = SD_V1 | {"num_head_channels": 64, "num_heads": -1, "context_dim": 1024, "use_linear_in_transformer": True}
SDXL = SD_V2 | {
    "attention_resolutions": [4, 2],
    "channel_mult": [1, 2, 4],
    "transformer_depth": [1, 2, 10],
    "context_dim": 2048,
    "num_classes": "sequential",
    "adm_in_channels": 2816,
}


@pytest.mark.parametrize(
    ("params", "file", "count"),
    [
        (SD_V2, "sd_v2_keys", 865_910_724),
        (SDXL, "sdxl_base_keys", 2_567_463_684),
        (SD_V1 | {"in_channels": 9}, "sd_v1_inpainting_keys", 859_535_364),
        (SD_V1 | {"in_channels": 8}, "instruct_pix2pix_keys", 859_532_484),
    ],
    ids=["SD 2", "SDXL", "inpainting", "InstructPix2Pix"],
)
def test_unet_keys_of_every_family(params: dict, file: str, count: int) -> None:
    with torch.device("meta"):
        model = UNetModel(**params)
    shapes = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    assert shapes == released_keys("model.diffusion_model.", file)
    assert sum(parameter.numel() for parameter in model.parameters()) == count


@pytest.mark.slow
def test_sd_v1_forward() -> None:
    model = fill_seeded(UNetModel(**SD_V1), prefix="model.diffusion_model.").eval()
    with torch.no_grad():
        out = model(
            seeded_tensor("sd_v1/x", (1, 4, 16, 16)),
            torch.tensor([321]),
            context=seeded_tensor("sd_v1/context", (1, 77, 768)),
        )
    assert relative_error(out, tensors("sd_v1_full")["sd_v1/unet_out"]) < 1e-5


@pytest.mark.slow
def test_checkpointing_changes_no_gradient() -> None:
    gradients = []
    for use_checkpoint in (False, True, "selective"):
        model = fill_seeded(UNetModel(**{**TINY, "use_checkpoint": use_checkpoint}))
        model(**inputs("unet_sd_tiny")).square().sum().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for plain, *recomputed in zip(*gradients, strict=True):
        assert all(torch.equal(plain, other) for other in recomputed)


@pytest.mark.slow
def test_selective_checkpointing_repeats_nothing_costly() -> None:
    flops = {}
    for use_checkpoint in (False, True, "selective"):
        model = fill_seeded(UNetModel(**{**TINY, "use_checkpoint": use_checkpoint}))
        with FlopCounterMode(display=False) as counter:
            model(**inputs("unet_sd_tiny")).sum().backward()
        flops[use_checkpoint] = counter.get_total_flops()
    assert flops["selective"] == flops[False] < 0.85 * flops[True]


def test_channels_last_is_a_matter_of_layout() -> None:
    results = []
    for channels_last in (False, True):
        model = fill_seeded(UNetModel(**TINY, channels_last=channels_last))
        out = model(**inputs("unet_sd_tiny"))
        out.square().mean().backward()
        assert out.is_contiguous(memory_format=model.memory_format)
        assert all(parameter.is_contiguous() for parameter in model.parameters())
        results.append([out, *(parameter.grad for parameter in model.parameters())])
    largest = max(float(value.norm()) for value in results[0])
    for plain, other in zip(*results, strict=True):
        torch.testing.assert_close(other, plain, atol=1e-5 * largest, rtol=1e-4)


@pytest.mark.parametrize(
    "change",
    [
        {"context_dim": None},
        {"num_heads": -1},
        {"num_res_blocks": [1, 1]},
        {"model_channels": 48},
        {"context_dim": [64, 32]},
        {"num_head_channels": 256},
        {"use_checkpoint": "some"},
        {"channels_last": True, "dims": 1},
        {"compile_mode": "fastest"},
    ],
    ids=[
        *("context without dim", "no heads", "short list", "no multiple of 32", "two contexts", "wide heads"),
        *("no such checkpointing", "channels last in 1-D", "no such mode"),
    ],
)
def test_contradicting_arguments(change: dict) -> None:
    with pytest.raises(UserError):
        UNetModel(**{**TINY, **change})


def test_labels_must_fit() -> None:
    with pytest.raises(ValueError, match="num_classes"):
        UNetModel(**TINY)(**{**inputs("unet_sd_tiny"), "y": torch.tensor([1, 2])})


def plain(**changes: object) -> UNetModel:
    """Return a small UNet with plain attention blocks."""
    params = {
        "image_size": 8,
        "in_channels": 3,
        "out_channels": 3,
        "model_channels": 32,
        "attention_resolutions": [1],
        "num_res_blocks": 1,
        "channel_mult": [1, 2],
        "num_heads": 2,
    }
    return UNetModel(**params | changes)


@pytest.mark.parametrize("new_order", [False, True])
def test_attention_block_by_hand(new_order: bool) -> None:
    block = fill_seeded(AttentionBlock(32, num_heads=2, use_new_attention_order=new_order))
    x = seeded_tensor("attention/x", (1, 32, 2, 3))
    tokens = x.flatten(2)
    qkv = block.qkv(block.norm(tokens))[0]  # (96, 6)
    heads = []
    for head in range(2):
        if new_order:  # all of q, then all of k, then all of v
            q, k, v = (qkv[32 * part + 16 * head :][:16] for part in range(3))
        else:  # q, k and v of one head after the other
            q, k, v = (qkv[48 * head + 16 * part :][:16] for part in range(3))
        weights = ((q.T @ k) / 4).softmax(-1)
        heads.append(v @ weights.T)
    expected = tokens + block.proj_out(torch.cat(heads)[None])
    torch.testing.assert_close(block(x), expected.view_as(x), atol=1e-5, rtol=1e-4)


def test_heads_on_the_way_up() -> None:
    def heads(model: UNetModel) -> tuple[set[int], set[int]]:
        down, up = (
            {m.num_heads for block in blocks for m in block.modules() if isinstance(m, AttentionBlock)}
            for blocks in (model.input_blocks, model.output_blocks)
        )
        return down, up

    assert heads(plain(num_heads_upsample=4)) == ({2}, {4})
    assert heads(plain()) == ({2}, {2})
    assert heads(plain(num_head_channels=8)) == ({4}, {4})


def test_resampling_without_convolutions() -> None:
    model = plain(conv_resample=False)
    assert not any("op." in key for key in model.state_dict())
    x = seeded_tensor("unet/x", (1, 32, 4, 4))
    down, up = model.input_blocks[2][0], model.output_blocks[1][-1]
    torch.testing.assert_close(down(x), torch.nn.functional.avg_pool2d(x, 2))
    assert torch.equal(up(x), x.repeat_interleave(2, -1).repeat_interleave(2, -2))


@pytest.mark.parametrize(("dims", "shape"), [(1, (8,)), (3, (3, 8, 8))])
def test_other_dimensions_keep_their_shape(dims: int, shape: tuple[int, ...]) -> None:
    x = torch.randn(1, 3, *shape)
    out = plain(dims=dims)(x, torch.tensor([5]))
    assert out.shape == x.shape


def test_dropout_is_for_training_only() -> None:
    model = fill_seeded(plain(dropout=0.5))
    x, t = seeded_tensor("unet/image", (1, 3, 8, 8)), torch.tensor([5])
    model.eval()
    assert torch.equal(model(x, t), model(x, t))
    model.train()
    assert not torch.equal(model(x, t), model(x, t))


def test_blocks_by_level() -> None:
    model = plain(num_res_blocks=[1, 3])
    assert len(model.input_blocks) == 1 + 1 + 1 + 3
    assert len(model.output_blocks) == 2 + 4


def test_fractional_timesteps() -> None:
    model = fill_seeded(plain()).eval()
    x = seeded_tensor("unet/image", (1, 3, 8, 8))
    whole, half, next_ = (model(x, torch.tensor([t])) for t in (5.0, 5.5, 6.0))
    assert torch.equal(whole, model(x, torch.tensor([5])))
    assert relative_error(half, (whole + next_) / 2) < 0.05
    assert not torch.equal(half, whole)


def test_timesteps_are_embedded_in_float32_whatever_the_default_type() -> None:
    timesteps = torch.tensor([1, 500, 999])
    expected = timestep_embedding(timesteps, 320)
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert torch.equal(timestep_embedding(timesteps, 320), expected)
    finally:
        torch.set_default_dtype(torch.float32)
