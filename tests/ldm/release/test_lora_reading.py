"""Tests of reading LoRA files, from key lists of each program."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ldm.checkpoint import save_state_dict
from ldm.release.lora_reading import read_lora
from ldm.util import UserError

DOWN, UP = torch.arange(6.0).reshape(2, 3), torch.arange(8.0).reshape(4, 2)
NAME = ("unet", "down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_out_0")
PATH = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_out.0"
TOWER = "text_model.encoder.layers.0.mlp.fc1"


def write(folder: Path, weights: dict[str, Tensor], metadata: dict[str, str] | None = None) -> Path:
    path = folder / "lora.safetensors"
    save_state_dict(weights, path, metadata=metadata)
    return path


@pytest.mark.parametrize(
    ("down", "up", "name"),
    [
        (f"lora_unet_{NAME[1]}.lora_down.weight", f"lora_unet_{NAME[1]}.lora_up.weight", NAME),
        (f"unet.{PATH}.lora_A.weight", f"unet.{PATH}.lora_B.weight", NAME),
        (f"{PATH}.lora_A.weight", f"{PATH}.lora_B.weight", NAME),
        (f"base_model.model.{PATH}.lora_A.default.weight", f"base_model.model.{PATH}.lora_B.default.weight", NAME),
        (f"unet.{PATH}.lora.down.weight", f"unet.{PATH}.lora.up.weight", NAME),
        (
            "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.processor.to_out_lora.down.weight",
            "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.processor.to_out_lora.up.weight",
            NAME,
        ),
        (
            f"base_model.model.{TOWER}.lora_A.weight",
            f"base_model.model.{TOWER}.lora_B.weight",
            ("text_encoder", TOWER.replace(".", "_")),
        ),
        *(
            (f"{start}encoder.layers.0.mlp.fc1.lora_A.weight", f"{start}encoder.layers.0.mlp.fc1.lora_B.weight",
             ("text_encoder", TOWER.replace(".", "_")))
            for start in ("text_encoder.", "base_model.model.")
        ),
        (
            "lora_te2_encoder_layers_0_mlp_fc1.lora_down.weight",
            "lora_te2_encoder_layers_0_mlp_fc1.lora_up.weight",
            ("text_encoder_2", TOWER.replace(".", "_")),
        ),
        ("diffusion_model.out.2.lora_A.weight", "diffusion_model.out.2.lora_B.weight", ("unet", "out_2")),
        (
            f"text_encoder_2.{TOWER}.lora_linear_layer.down.weight",
            f"text_encoder_2.{TOWER}.lora_linear_layer.up.weight",
            ("text_encoder_2", TOWER.replace(".", "_")),
        ),
        *(
            (
                f"lora_{part}_{TOWER.replace('.', '_')}.lora_down.weight",
                f"lora_{part}_{TOWER.replace('.', '_')}.lora_up.weight",
                (theirs, TOWER.replace(".", "_")),
            )
            for part, theirs in (("te", "text_encoder"), ("te1", "text_encoder"), ("te2", "text_encoder_2"))
        ),
    ],
)  # fmt: skip
def test_read_lora_of_every_program(tmp_path: Path, down: str, up: str, name: tuple[str, str]) -> None:
    found = read_lora(write(tmp_path, {down: DOWN, up: UP}))
    assert list(found) == [name] and found[name].shape == (4, 3)
    assert torch.equal(found[name].change(torch.float32, torch.device("cpu")), UP @ DOWN)


def kohya(**more: Tensor) -> dict[str, Tensor]:
    tensors = {"lora_down.weight": DOWN, "lora_up.weight": UP, **{key.replace("__", "."): v for key, v in more.items()}}
    return {f"lora_unet_x.{name}": value for name, value in tensors.items()}


def test_read_lora_scales_by_alpha_over_rank(tmp_path: Path) -> None:
    (factors,) = read_lora(write(tmp_path, kohya(alpha=torch.tensor(1.0)))).values()
    assert factors.scale == 0.5


def test_read_lora_warns_of_alpha_0(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (factors,) = read_lora(write(tmp_path, kohya(alpha=torch.tensor(0.0)))).values()
    assert factors.scale == 0 and "alpha is 0 in 1 of 1 layers, which therefore change nothing" in caplog.text


def test_read_lora_takes_alpha_from_diffusers_metadata(tmp_path: Path) -> None:
    keys = {
        f"unet.{path}.lora_{letter}.weight": value
        for path in ("a.to_q", "b.to_q")
        for letter, value in (("A", DOWN), ("B", UP))
    }
    values = {"unet.lora_alpha": 8, "unet.r": 2, "unet.alpha_pattern": {"b.to_q": 1}}
    found = read_lora(write(tmp_path, keys, {"lora_adapter_metadata": json.dumps(values)}))
    assert [factors.scale for factors in found.values()] == [4.0, 0.5]


def test_read_lora_takes_alpha_from_the_config_beside_peft_files(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    keys = {
        f"base_model.model.{path}.lora_{letter}.weight": value
        for path in ("a.to_q", "b.to_q")
        for letter, value in (("A", DOWN), ("B", UP))
    }
    lora, config = write(tmp_path, keys), tmp_path / "adapter_config.json"
    assert [factors.scale for factors in read_lora(lora).values()] == [1.0, 1.0]
    assert "no adapter_config.json beside it tells alpha, and the scale is taken for 1" in caplog.text
    values = {"peft_type": "LORA", "r": 2, "lora_alpha": 8, "alpha_pattern": {"b.to_q": 1}, "use_rslora": False}
    config.write_text(json.dumps(values))
    assert [factors.scale for factors in read_lora(lora).values()] == [4.0, 0.5]
    config.write_text(json.dumps({**values, "use_rslora": True}))
    assert [factors.scale for factors in read_lora(lora).values()] == pytest.approx([8 / 2**0.5, 1 / 2**0.5])
    config.write_text(json.dumps({**values, "lora_alpha": "x"}))
    with pytest.raises(UserError, match=r"lora_alpha 'x' in adapter_config\.json is not a number"):
        read_lora(lora)
    config.write_text(json.dumps({"peft_type": "LOHA", "r": 2, "alpha": 4}))
    names = {"w1_a": UP, "w1_b": DOWN, "w2_a": UP, "w2_b": DOWN}
    weights = {f"base_model.model.x.hada_{name}": value for name, value in names.items()}
    (loha,) = read_lora(write(tmp_path, weights)).values()
    assert loha.scale == 2.0


def test_read_lora_takes_a_rank_stabilised_scale_of_diffusers(tmp_path: Path) -> None:
    keys = {"unet.x.lora_A.weight": DOWN, "unet.x.lora_B.weight": UP}
    values = {"unet.lora_alpha": 8, "unet.r": 2, "unet.use_rslora": True}
    (factors,) = read_lora(write(tmp_path, keys, {"lora_adapter_metadata": json.dumps(values)})).values()
    assert factors.scale == pytest.approx(8 / 2**0.5)


def test_read_lora_leaves_embeddings_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert list(read_lora(write(tmp_path, {**kohya(), "bundle_emb.cat.string_to_param.*": UP}))) == [("unet", "x")]
    assert "embeddings left out: bundle_emb.cat.string_to_param.*" in caplog.text


def test_read_lora_of_convolutions(tmp_path: Path) -> None:
    down, mid, up = torch.randn(2, 3, 1, 1), torch.randn(2, 2, 3, 3), torch.randn(4, 2, 1, 1)
    plain = {"lora_unet_x.lora_down.weight": torch.randn(2, 3, 3, 3), "lora_unet_x.lora_up.weight": up}
    (factors,) = read_lora(write(tmp_path, plain)).values()
    change = factors.change(torch.float32, torch.device("cpu"))
    torch.testing.assert_close(
        change, torch.einsum("or,rihw->oihw", up[:, :, 0, 0], plain["lora_unet_x.lora_down.weight"]).flatten(1)
    )
    core = {"lora_unet_x.lora_down.weight": down, "lora_unet_x.lora_up.weight": up, "lora_unet_x.lora_mid.weight": mid}
    (factors,) = read_lora(write(tmp_path, core)).values()
    assert factors.shape == (4, 27)
    # The change is the composition of the three convolutions.
    x = torch.randn(1, 3, 5, 5)
    composed = torch.conv2d(torch.conv2d(torch.conv2d(x, down), mid, padding=1), up)
    weight = factors.change(torch.float32, torch.device("cpu")).reshape(4, 3, 3, 3)
    torch.testing.assert_close(torch.conv2d(x, weight, padding=1), composed)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"lora_unet_x.oft_blocks": DOWN}, "lora_unet_x.oft_blocks is OFT; this program adds LoRA, LoCon, DoRA, LoHa"),
        ({"lora_unet_x.on_input": DOWN}, "lora_unet_x.on_input is IA3"),
        ({"lora_unet_x.diff": DOWN, "lora_unet_x.diff_b": DOWN}, "lora_unet_x.diff_b is the change of a bias"),
        ({"lora_unet_x.w_norm": DOWN}, "lora_unet_x.w_norm is the change of a norm"),
        ({"base_model.model.x.oft_R.weight": DOWN}, "base_model.model.x.oft_R.weight is OFT"),
        ({"base_model.model.x.ia3_l": DOWN}, "base_model.model.x.ia3_l is IA3"),
        ({"base_model.model.x.vera_lambda_b": DOWN}, "base_model.model.x.vera_lambda_b is VeRA"),
        ({"lycoris_x.a1.weight": DOWN}, "lycoris_x.a1.weight is GLoRA"),
        ({"base_model.model.x.lora_B.bias": DOWN}, "x.lora_B.bias is the change of a bias"),
        ({"lora_unet_x.hada_w1_a": DOWN}, r"x: lacks a tensor, .* \(hada_w1_a \(2, 3\)\); download"),
        ({"lora_unet_x.lokr_w1": DOWN}, "x: lacks a tensor, or has some that do not fit"),
        ({"lora_unet_x.diff": torch.ones(3)}, "x: lacks a tensor, or has some that do not fit"),
        (
            {"model.diffusion_model.out.2.weight": DOWN},
            "model.diffusion_model.out.2.weight is not the name of a LoRA's",
        ),
        ({"lora_unet_x.lora_up.weight": UP}, "x: lacks one of its two factors"),
        (
            {"lora_unet_x.lora_down.weight": DOWN, "lora_unet_x.lora_up.weight": DOWN},
            r"x: has factors of shapes \(2, 3\)",
        ),
        ({"lora_unet_x.lora_down.weight": DOWN, "lora_unet_x.lora_up.weight": UP[:0, :1]}, "x: has factors of shapes"),
        (kohya(alpha=torch.tensor(float("nan"))), "x: its alpha is not a finite number"),
        (kohya(alpha=torch.tensor(1j)), "x.alpha has complex numbers"),
        ({**kohya(), "diffusion_model.x.lora_A.weight": DOWN}, "is there under two names"),
    ],
)
def test_read_lora_refuses_in_one_line(tmp_path: Path, weights: dict[str, Tensor], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        read_lora(write(tmp_path, weights))
    assert "\n" not in str(caught.value) and "lora.safetensors" in str(caught.value)


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ("{", "its metadata lora_adapter_metadata is damaged"),
        ('{"unet.lora_alpha": "x", "unet.r": 2}', "lora_alpha 'x' in its metadata is not a number"),
        ('{"unet.lora_alpha": 1e400, "unet.r": 2}', "lora_alpha inf in its metadata is not a number"),
        ('{"unet.alpha_pattern": [1]}', "alpha_pattern .* in its metadata is no dict"),
        ("[" * 100_000, "its metadata lora_adapter_metadata is damaged"),
        ('{"unet.alpha_pattern": {"a.*": 2}}', r"alpha_pattern 'a\.\*' is not the name of a layer"),
    ],
)
def test_read_lora_refuses_metadata_that_it_cannot_follow(tmp_path: Path, metadata: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_lora(write(tmp_path, kohya(), {"lora_adapter_metadata": metadata}))
