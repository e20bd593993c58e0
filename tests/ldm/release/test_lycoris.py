"""Tests of LyCORIS' formats, from its key lists, against the formulas of the papers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from ldm.checkpoint import load_state_dict, save_state_dict
from ldm.release.lora_merging import Lora, add_lora_files
from ldm.release.lora_reading import read_lora

LINEAR, CONV = "input_blocks.1.1.transformer_blocks.0.attn1.to_q", "input_blocks.1.0.in_layers.2"
UNET = "model.diffusion_model."


def tensor(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def tucker(core: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """The composition of the convolutions 1×1, k×k and 1×1, with kernels bᵀ, the core and aᵀ, as a kernel."""
    return torch.einsum("xykl,xo,yi->oikl", core, a, b).contiguous()


def cases() -> dict[str, tuple[dict[str, Tensor], Tensor]]:
    """Names of a layer's tensors, and the change that they mean."""
    a, b, c, d = tensor(8, 2), tensor(2, 6), tensor(8, 2) + 1, tensor(2, 6) - 1
    small, square = tensor(2, 3), tensor(4, 2)
    low, high = tensor(4, 2), tensor(2, 2)
    kernel = tensor(2, 54)  # 6 · 3 · 3
    core, w1, w2 = tensor(2, 2, 3, 3), tensor(2, 8), tensor(2, 6)
    whole = tensor(8, 6, 3, 3)
    loha = {"hada_w1_a": a, "hada_w1_b": b, "hada_w2_a": c, "hada_w2_b": d}
    return {
        "LoHa": ({**loha, "alpha": torch.tensor(1.0)}, 0.5 * (a @ b) * (c @ d)),
        "LoHa, 3x3": ({**loha, "hada_w1_b": kernel, "hada_w2_b": kernel + 1}, (a @ kernel) * (c @ (kernel + 1))),
        "LoHa, core": (
            {"hada_w1_a": w1, "hada_w1_b": w2, "hada_t1": core, "hada_w2_a": w1 + 1, "hada_w2_b": w2, "hada_t2": core},
            tucker(core, w1, w2) * tucker(core, w1 + 1, w2),
        ),
        "LoKr": ({"lokr_w1": small, "lokr_w2": square, "alpha": torch.tensor(9.0)}, torch.kron(small, square)),
        "LoKr, low rank": (
            {"lokr_w1": small, "lokr_w2_a": low, "lokr_w2_b": high, "alpha": torch.tensor(1.0)},
            0.5 * torch.kron(small, low @ high),
        ),
        "LoKr, 3x3": (
            {"lokr_w1": small, "lokr_w2": tensor(4, 2, 3, 3)},
            torch.kron(small[:, :, None, None], tensor(4, 2, 3, 3)),
        ),
        "LoKr, core": (
            {"lokr_w1": small, "lokr_w2_a": tensor(2, 4), "lokr_w2_b": tensor(2, 2), "lokr_t2": core},
            torch.kron(small[:, :, None, None], tucker(core, tensor(2, 4), tensor(2, 2))),
        ),
        "difference": ({"diff": whole}, whole),
    }


@pytest.mark.parametrize("prefix", ["lora_unet_", "lycoris_"])
@pytest.mark.parametrize("kind", cases())
def test_lycoris_changes_follow_the_formulas(kind: str, prefix: str, tmp_path: Path) -> None:
    tensors, expected = cases()[kind]
    layer = CONV if expected[0].numel() == 54 else LINEAR
    key = f"{UNET}{layer}.weight"
    start = {key: tensor(8, 6, *((3, 3) if layer == CONV else ()))}
    save_state_dict(start, tmp_path / "release.safetensors")
    name = prefix + layer.replace(".", "_")
    save_state_dict({f"{name}.{part}": value for part, value in tensors.items()}, tmp_path / "style.safetensors")
    lora = Lora(tmp_path / "style.safetensors", 0.5)
    add_lora_files(tmp_path / "release.safetensors", tmp_path / "out.safetensors", [lora])
    found = load_state_dict(tmp_path / "out.safetensors")[key]
    torch.testing.assert_close(found - start[key], 0.5 * expected.reshape(start[key].shape), rtol=1e-4, atol=1e-5)


def test_lycoris_with_a_magnitude_is_dora(tmp_path: Path) -> None:
    tensors, expected = cases()["LoHa"]
    weights = {f"lora_unet_x.{part}": value for part, value in tensors.items()}
    save_state_dict({**weights, "lora_unet_x.dora_scale": torch.ones(8, 1)}, tmp_path / "dora.safetensors")
    (change,) = read_lora(tmp_path / "dora.safetensors").values()
    assert change.shape == tuple(expected.shape) and tuple(change.magnitude.shape) == (8, 1)
