"""Tests of the extraction of a LoRA from two releases."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from ldm.checkpoint import ema_key, load_state_dict, open_checkpoint, save_state_dict
from ldm.release.layer_names import kohya_names, layers_of
from ldm.release.lora_extraction import Extraction, Target, extract_files, factors_of
from ldm.release.lora_merging import Lora, add_lora_files
from ldm.release.recognition import shapes_of
from ldm.util import UserError
from tests.golden_data import seeded_tensor
from tests.tiny_families import write_tiny

UNET = "model.diffusion_model."
LINEAR, CONV = f"{UNET}input_blocks.1.1.proj_in.weight", f"{UNET}input_blocks.1.0.in_layers.2.weight"
OUTSIDE, BIAS, VAE = f"{UNET}out.2.weight", f"{UNET}out.2.bias", "first_stage_model.decoder.conv_out.weight"
FUSED = "cond_stage_model.model.transformer.resblocks.0.attn.in_proj_weight"


def base() -> dict[str, Tensor]:
    shapes = {LINEAR: (24, 20), CONV: (12, 8, 3, 3), OUTSIDE: (4, 8, 3, 3), BIAS: (4,), VAE: (3, 4), FUSED: (24, 8)}
    return {key: seeded_tensor(key, shape) for key, shape in shapes.items()} | {"betas": torch.ones(3)}


def tuned(*keys: str) -> dict[str, Tensor]:
    return {
        key: value + seeded_tensor(f"to {key}", tuple(value.shape)) if key in keys else value
        for key, value in base().items()
    }


def extracted(
    folder: Path, after: dict[str, Tensor], target: Target, **options
) -> tuple[Extraction, dict[str, Tensor]]:
    """Extract to `lora.safetensors`, and return the record and the base with the LoRA."""
    save_state_dict(base(), folder / "base.ckpt")
    save_state_dict(after, folder / "tuned.safetensors")
    found = extract_files(
        folder / "base.ckpt", folder / "tuned.safetensors", folder / "lora.safetensors", target, **options
    )
    add_lora_files(folder / "base.ckpt", folder / "again.ckpt", [Lora(folder / "lora.safetensors")])
    return found, load_state_dict(folder / "again.ckpt")


def test_extract_files_at_full_rank_gives_the_tuned_weights(tmp_path: Path) -> None:
    after = tuned(LINEAR, CONV, FUSED)
    found, again = extracted(tmp_path, after, Target(rank=1000))
    assert [each.rank for each in found.layers] == [20, 12, 8, 8, 8] and found.left_out() == []
    for key, value in after.items():
        torch.testing.assert_close(again[key], value)
    assert found.table().splitlines()[-1].split() == ["all", "5", "8-20", "1.0000"]


def test_extract_files_leaves_out_layers_that_are_equal(tmp_path: Path) -> None:
    extracted(tmp_path, tuned(CONV), Target(rank=4))
    weights = load_state_dict(tmp_path / "lora.safetensors")
    name = "lora_unet_down_blocks_0_resnets_0_conv1"
    assert {key: tuple(value.shape) for key, value in weights.items()} == {
        f"{name}.lora_down.weight": (4, 8, 3, 3),
        f"{name}.lora_up.weight": (12, 4, 1, 1),
        f"{name}.alpha": (),
    }
    assert weights[f"{name}.alpha"] == 4


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_extract_files_takes_no_rounding_for_a_change(tmp_path: Path, dtype: torch.dtype) -> None:
    """Such as a float32 base, and a tuned release of `merge_release.py --half`: its text encoder was not trained."""
    for before, after in ((base(), {key: value.to(dtype) for key, value in tuned(LINEAR).items()}),
                          ({key: value.to(dtype) for key, value in base().items()}, tuned(LINEAR))):  # fmt: skip
        for name, weights in (("base.ckpt", before), ("tuned.safetensors", after)):
            save_state_dict(weights, tmp_path / name)
        paths = tmp_path / "base.ckpt", tmp_path / "tuned.safetensors", tmp_path / "lora.safetensors"
        found = extract_files(*paths, Target(rank=4))
        assert [each.layer.key for each in found.layers] == [LINEAR] and found.left_out() == []


def test_extract_files_keeps_the_energy_that_it_tells(tmp_path: Path) -> None:
    after = tuned(LINEAR, CONV)
    found, again = extracted(tmp_path, after, Target(energy=0.6), half=True)
    for each in found.layers:
        change = (after[each.layer.key] - base()[each.layer.key]).square().sum()
        lost = (after[each.layer.key] - again[each.layer.key]).square().sum()
        assert each.energy == pytest.approx(change.item(), rel=1e-4)
        assert each.lost == pytest.approx(lost.item(), rel=1e-3)
        assert lost <= 0.401 * change
        singular = torch.linalg.svdvals((after[each.layer.key] - base()[each.layer.key]).flatten(1)).square()
        assert singular[: each.rank - 1].sum() < 0.6 * singular.sum()  # the least rank
    assert (
        load_state_dict(tmp_path / "lora.safetensors")["lora_unet_down_blocks_0_resnets_0_conv1.alpha"].dtype
        == torch.float16
    )


def test_extract_files_tells_what_the_lora_does_not_hold(tmp_path: Path) -> None:
    found, again = extracted(tmp_path, tuned(LINEAR, OUTSIDE, BIAS, VAE), Target(rank=1000))
    assert list(found.others) == [OUTSIDE, BIAS] and found.autoencoder
    line, vae = found.left_out()
    assert line.startswith("2 changed weights are not in the LoRA, ") and OUTSIDE in line and "--vae" in vae
    assert torch.equal(again[OUTSIDE], base()[OUTSIDE])
    found, again = extracted(tmp_path, tuned(LINEAR, OUTSIDE, BIAS, VAE), Target(rank=1000), all_layers=True)
    assert list(found.others) == [BIAS]
    torch.testing.assert_close(again[OUTSIDE], tuned(OUTSIDE)[OUTSIDE])


def test_extract_files_refuses_in_one_line(tmp_path: Path) -> None:
    broken = tuned(LINEAR)
    broken[CONV] = broken[CONV] * float("nan")
    lacking = {key: value for key, value in base().items() if key != CONV}
    for after, message in [
        (base(), "tuned.safetensors: has the weights of .*base.ckpt in all layers"),
        (tuned(BIAS), "in all layers that a LoRA holds"),
        (broken, f"{CONV}: differs by values that are not finite"),
        (lacking, f"tuned.safetensors: lacks {CONV}, which .*base.ckpt has"),
    ]:
        with pytest.raises(UserError, match=message) as caught:
            extracted(tmp_path, after, Target(rank=4))
        assert "\n" not in str(caught.value) and not (tmp_path / "lora.safetensors").exists()
    shadows = {ema_key(key): value for key, value in base().items() if key.startswith("model.")}
    save_state_dict(shadows, tmp_path / "ema.ckpt")
    with pytest.raises(UserError, match=r"ema.ckpt: has only EMA weights; a LoRA needs the weights themselves"):
        extract_files(tmp_path / "ema.ckpt", tmp_path / "ema.ckpt", tmp_path / "lora.safetensors", Target(rank=4))
    with pytest.raises(UserError, match=r"must end in .safetensors"):
        extract_files(tmp_path / "base.ckpt", tmp_path / "base.ckpt", tmp_path / "lora.ckpt", Target(rank=4))


@pytest.mark.parametrize("target", [Target(rank=24), Target(energy=0.9)])
def test_factors_of_a_large_matrix_are_nearly_the_best_and_the_same_each_time(target: Target) -> None:
    generator = torch.Generator().manual_seed(0)
    change = (
        torch.randn(500, 300, generator=generator)
        @ torch.diag(0.9 ** torch.arange(300.0))
        @ torch.randn(300, 700, generator=generator)
    )
    down, up = factors_of(change, target)
    values = torch.linalg.svdvals(change).square()
    lost = (change - up @ down).square().sum()
    assert lost <= 1.01 * values[len(down) :].sum()
    torch.testing.assert_close(down.norm(), up.norm())
    assert target.energy is None or lost <= 0.1 * values.sum()
    random = torch.random.get_rng_state()
    assert all(torch.equal(*pair) for pair in zip(factors_of(change, target), (down, up), strict=True))
    assert torch.equal(random, torch.random.get_rng_state())


@pytest.mark.parametrize(
    ("family", "version", "architecture"),
    [
        ("sd1", "sd_v1", "stable-diffusion-v1"),
        ("sd2_768_v", "sd_v2_v", "stable-diffusion-v2-768-v"),
        ("sdxl", "sdxl_base_v1-0", "stable-diffusion-xl-v1-base"),
    ],
)
def test_extract_files_names_the_model_in_the_metadata_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str, version: str, architecture: str
) -> None:
    from ldm.release import lora_extraction
    from ldm.release.families import FAMILIES

    monkeypatch.setattr(
        lora_extraction, "find_family", lambda shapes, **_: FAMILIES[family]
    )  # small widths are of no family
    extracted(tmp_path, tuned(LINEAR), Target(rank=4))
    metadata = open_checkpoint(tmp_path / "lora.safetensors").metadata
    assert {key: text for key, text in metadata.items() if not key.startswith("modelspec.")} == {
        "format": "pt",
        "ss_network_module": "networks.lora",
        "ss_network_dim": "4",
        "ss_network_alpha": "4",
        "ss_v2": str(family == "sd2_768_v"),
        "ss_base_model_version": version,
    }
    assert metadata["modelspec.architecture"] == f"{architecture}/lora"
    assert metadata["modelspec.title"] == "lora"
    assert str(tmp_path) not in str(metadata)


@pytest.mark.parametrize("family", ["sd2_base", "sdxl"])
def test_extract_files_of_every_layer_of_a_family(tmp_path: Path, family: str) -> None:
    """Each layer of UNet and text towers goes out under kohya's name and comes back, those of fused weights too."""
    path, _ = write_tiny(family, tmp_path)
    plain = load_state_dict(path)
    layers = layers_of(shapes_of(plain))
    moved = {layer.key: plain[layer.key] * 1.5 for layer in layers}
    save_state_dict({**plain, **moved}, tmp_path / "tuned.safetensors")
    lora, again = tmp_path / "lora.safetensors", tmp_path / "again.safetensors"
    extract_files(path, tmp_path / "tuned.safetensors", lora, Target(rank=10_000), all_layers=True)
    names = {key.rpartition(".lora_down.weight")[0] for key in load_state_dict(lora) if "lora_down" in key}
    assert names == set(kohya_names(layers, plain).values())
    add_lora_files(path, again, [Lora(lora)])
    found = load_state_dict(again)
    for key, value in plain.items():
        torch.testing.assert_close(found[key], moved.get(key, value), rtol=1e-4, atol=1e-5)
    for big in (lora, again, path, tmp_path / "tuned.safetensors"):
        big.unlink()
