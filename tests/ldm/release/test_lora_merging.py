"""Tests of LoRA added to releases and to models."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from ldm.checkpoint import ema_key, in_memory, load_state_dict, open_checkpoint, save_state_dict
from ldm.checkpoint.formats import as_bytes
from ldm.release.lora_merging import Lora, add_lora_files, with_loras
from ldm.util import UserError

UNET = "model.diffusion_model."
LINEAR, CONV = (
    f"{UNET}input_blocks.1.1.transformer_blocks.0.attn1.to_q.weight",
    f"{UNET}input_blocks.1.0.in_layers.2.weight",
)
SMALL = f"{UNET}input_blocks.1.1.proj_in.weight"  # a convolution of 1×1
FUSED = "cond_stage_model.model.transformer.resblocks.0.attn.in_proj_weight"
NAMES = {
    LINEAR: "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q",
    CONV: "lora_unet_down_blocks_0_resnets_0_conv1",
    SMALL: "lora_unet_down_blocks_0_attentions_0_proj_in",
}


def release(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {LINEAR: (4, 3), CONV: (4, 3, 3, 3), SMALL: (4, 3, 1, 1), FUSED: (12, 4)}
    weights = {key: torch.randn(shape, generator=generator).to(dtype) for key, shape in shapes.items()}
    return {**weights, "betas": torch.ones(3), ema_key(LINEAR): 2 * weights[LINEAR]}


def factors(key: str, rank: int = 2, **more: Tensor) -> dict[str, Tensor]:
    shape = release()[key].shape
    one = (1, 1) if len(shape) == 4 else ()
    down, up = torch.randn(rank, *shape[1:]), torch.randn(shape[0], rank, *one)
    return {
        f"{NAMES[key]}.{name}": value
        for name, value in {"lora_down.weight": down, "lora_up.weight": up, **more}.items()
    }


def change(weights: dict[str, Tensor], key: str) -> Tensor:
    down, up = (weights[f"{NAMES[key]}.lora_{name}.weight"].flatten(1) for name in ("down", "up"))
    return (up @ down).reshape(release()[key].shape)


def added(
    folder: Path, *loras: tuple[dict[str, Tensor], float], start: dict[str, Tensor] | None = None
) -> dict[str, Tensor]:
    entries = []
    for number, (weights, strength) in enumerate(loras):
        entries.append(Lora(folder / f"{number}.safetensors", strength))
        save_state_dict(weights, entries[-1].path)
    found = with_loras(start or release(), entries, "release.ckpt")
    return {key: value if isinstance(value, Tensor) else value.compute() for key, value in found.items()}


@pytest.mark.parametrize("key", [LINEAR, CONV, SMALL])
def test_with_loras_adds_the_change_and_keeps_the_rest_bit_for_bit(tmp_path: Path, key: str) -> None:
    weights = factors(key)
    found = added(tmp_path, (weights, 0.5))
    torch.testing.assert_close(found[key], release()[key] + 0.5 * change(weights, key))
    others = [other for other in release() if other not in (key, ema_key(key))]
    assert all(torch.equal(as_bytes(found[other]), as_bytes(release()[other])) for other in others)


def test_with_loras_at_strength_0_is_the_release_bit_for_bit(tmp_path: Path) -> None:
    start = {**release(), LINEAR: torch.full((4, 3), -0.0)}
    found = added(tmp_path, (factors(LINEAR), 0.0), start=start)
    assert all(torch.equal(as_bytes(found[key]), as_bytes(start[key])) for key in start)


def test_with_loras_changes_ema_weights_too(tmp_path: Path) -> None:
    """Sampling takes those, so a LoRA on the weights alone would have no effect."""
    weights = factors(LINEAR)
    torch.testing.assert_close(
        added(tmp_path, (weights, 1.0))[ema_key(LINEAR)], 2 * release()[LINEAR] + change(weights, LINEAR)
    )


def test_with_loras_adds_several_in_float32_and_rounds_once_per_file(tmp_path: Path) -> None:
    one, two = factors(LINEAR), factors(LINEAR)
    start = release(torch.float16)
    found = added(tmp_path, (one, 0.5), (two, -1.0), start=start)[LINEAR]
    expected = start[LINEAR].float() + 0.5 * change(one, LINEAR) - change(two, LINEAR)
    assert torch.equal(found, expected.half())


def test_with_loras_changes_rows_of_a_fused_weight(tmp_path: Path) -> None:
    name = "lora_te_text_model_encoder_layers_0_self_attn_k_proj"
    down, up = torch.randn(2, 4), torch.randn(4, 2)
    found = added(tmp_path, ({f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}, 1.0))[FUSED]
    start = release()[FUSED]
    torch.testing.assert_close(found[4:8], start[4:8] + up @ down)
    assert torch.equal(found[:4], start[:4]) and torch.equal(found[8:], start[8:])


def test_with_loras_takes_a_linear_change_for_a_convolution_of_1x1(tmp_path: Path) -> None:
    weights = {key: value.flatten(1) for key, value in factors(SMALL).items()}
    torch.testing.assert_close(added(tmp_path, (weights, 1.0))[SMALL], release()[SMALL] + change(weights, SMALL))


@pytest.mark.parametrize("key", [LINEAR, CONV])
@pytest.mark.parametrize("suffix", ["dora_scale", "lora_magnitude_vector"])
def test_with_loras_of_dora_gives_rows_the_stored_norm(tmp_path: Path, key: str, suffix: str) -> None:
    shape = (4, *[1] * (len(release()[key].shape) - 1))
    magnitude = torch.rand(shape) + 0.5
    if suffix == "lora_magnitude_vector":  # PEFT: (out,), or (1, out, 1, 1)
        magnitude = magnitude.reshape(4) if key == LINEAR else magnitude.transpose(0, 1)
    weights = factors(key, **{suffix: magnitude})
    found = added(tmp_path, (weights, 1.0))[key]
    torch.testing.assert_close(found.flatten(1).norm(dim=1), magnitude.flatten())
    whole = release()[key] + change(weights, key)
    cosine = torch.cosine_similarity(found.flatten(1), whole.flatten(1))
    torch.testing.assert_close(cosine, torch.ones(4))
    half = added(tmp_path, (weights, 0.5))[key]
    torch.testing.assert_close(half, (release()[key] + found) / 2)


def test_with_loras_of_dora_by_input(tmp_path: Path) -> None:
    magnitude = torch.rand(1, 3, 1, 1) + 0.5
    found = added(tmp_path, (factors(CONV, dora_scale=magnitude), 1.0))[CONV]
    torch.testing.assert_close(found.transpose(0, 1).flatten(1).norm(dim=1), magnitude.flatten())


def test_with_loras_names_the_first_layer_that_matches_nothing_and_counts_them(tmp_path: Path) -> None:
    other = {f"lora_te2_x{n}.lora_{name}.weight": torch.ones(1, 1) for n in (1, 2) for name in ("down", "up")}
    with pytest.raises(UserError) as caught:
        added(tmp_path, ({**factors(LINEAR), **other}, 1.0))
    assert "0.safetensors: 2 of 3 layers match nothing in release.ckpt, the first is x1 of the text_encoder_2" in str(
        caught.value
    )
    assert "\n" not in str(caught.value)


def test_with_loras_refuses_other_shapes(tmp_path: Path) -> None:
    name = NAMES[LINEAR]
    wide = {f"{name}.lora_down.weight": torch.ones(2, 5), f"{name}.lora_up.weight": torch.ones(4, 2)}
    with pytest.raises(UserError, match=f"to_q: changes 4×5 values, but {LINEAR} of release.ckpt has 4×3"):
        added(tmp_path, (wide, 1.0))
    with pytest.raises(UserError, match=r"to_q: has a magnitude of shape \(7, 1\), which does not fit"):
        added(tmp_path, (factors(LINEAR, dora_scale=torch.ones(7, 1)), 1.0))
    with pytest.raises(UserError, match=r"to_q: has a magnitude of shape \(1, 1\), which does not fit"):
        added(tmp_path, (factors(LINEAR, dora_scale=torch.tensor(1.0)), 1.0))
    with pytest.raises(UserError, match=r"has only EMA weights"):
        added(tmp_path, (factors(LINEAR), 1.0), start={ema_key(LINEAR): torch.ones(4, 3)})


def test_with_loras_refuses_a_kernel_with_its_values_in_another_order(tmp_path: Path) -> None:
    channels, *sides = release()[CONV].shape[1:]
    part = factors(CONV)
    (name,) = (key for key in part if "lora_down" in key)
    for shape in ((sides[0] * sides[1], channels, 1), (channels, sides[0] * sides[1], 1)):
        with pytest.raises(UserError, match=r"has a kernel of shape \(.*, but .* has "):
            added(tmp_path, ({**part, name: part[name].reshape(-1, *shape)}, 1.0))


def test_with_loras_refuses_results_that_are_not_finite(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has values too large for torch.float16"):
        added(tmp_path, (factors(LINEAR), 1e6), start=release(torch.float16))


@pytest.mark.parametrize("suffix", [".ckpt", ".safetensors"])
def test_add_lora_files(tmp_path: Path, suffix: str) -> None:
    weights = factors(LINEAR)
    start, out = tmp_path / f"r{suffix}", tmp_path / f"out{suffix}"
    save_state_dict(release(), start, metadata={"modelspec.title": "Cats", "sshs_model_hash": "0"})
    save_state_dict(weights, tmp_path / "l.safetensors")
    add_lora_files(start, out, [Lora(tmp_path / "l.safetensors", 2.0)], half=True)
    found = load_state_dict(out)
    assert list(found) == list(load_state_dict(start))
    assert torch.equal(in_memory(found[LINEAR]), (release()[LINEAR] + 2 * change(weights, LINEAR)).half())
    assert found[CONV].dtype == torch.float16 and found["betas"].dtype == torch.float32
    assert open_checkpoint(out).metadata["modelspec.title"] == "Cats"
    with pytest.raises(UserError, match="would replace one of the files"):
        add_lora_files(start, tmp_path / "l.safetensors", [Lora(tmp_path / "l.safetensors")])


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float64])
def test_with_loras_adds_in_float32_or_wider(tmp_path: Path, dtype: torch.dtype) -> None:
    weights, start = factors(LINEAR), {key: value.to(dtype) for key, value in release().items()}
    found = added(tmp_path, (weights, 1.0), start=start)[LINEAR]
    wide = torch.float64 if dtype == torch.float64 else torch.float32  # the sum is as exact as the weights
    expected = (start[LINEAR].to(wide) + change({key: value.to(wide) for key, value in weights.items()}, LINEAR)).to(
        dtype
    )
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), expected.double())


def test_with_loras_refuses_quantised_weights(tmp_path: Path) -> None:
    start = {**release(), LINEAR: torch.ones(4, 3, dtype=torch.int8)}
    with pytest.raises(UserError, match=f"{LINEAR} is torch.int8; dequantise it and save it as floating-point"):
        added(tmp_path, (factors(LINEAR), 1.0), start=start)
