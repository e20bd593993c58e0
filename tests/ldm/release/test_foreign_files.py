"""Files of other programs, by their key lists: each is taken, or refused with its kind and the way out."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from ldm.checkpoint import load_state_dict, save_checkpoint, save_state_dict
from ldm.release.configs import release_config
from ldm.release.load import load_release
from ldm.release.mixture import Recipe, mix_files
from ldm.release.opening import open_release
from ldm.util import UserError
from tests.conftest import RELEASE_CONFIG

M = "model.diffusion_model."
UNETS = "this program takes the UNets of Stable Diffusion 1, 2 and XL"
BESIDE = "which works beside a release; name the release itself"
# Kind of file: some of its keys, and the message.
REFUSED: dict[str, tuple[list[str], str]] = {
    "Flux, ComfyUI": ([f"{M}double_blocks.0.img_attn.qkv.weight", f"{M}img_in.weight"], f"a Flux model: {UNETS}"),
    "Flux, bare": (["double_blocks.18.txt_mlp.0.bias", "single_blocks.0.linear1.weight"], f"a Flux model: {UNETS}"),
    "Flux, diffusers": (["single_transformer_blocks.0.attn.to_q.weight"], f"a Flux model: {UNETS}"),
    "SD 3": ([f"{M}joint_blocks.0.context_block.attn.qkv.weight", "first_stage_model.decoder.conv_in.weight"],
             f"a Stable Diffusion 3 model: {UNETS}"),
    "SD 3, diffusers": (["transformer_blocks.0.norm1_context.linear.weight"], "a Stable Diffusion 3 model"),
    "SVD": ([f"{M}input_blocks.1.0.time_stack.in_layers.0.weight", f"{M}input_blocks.1.1.time_mixer.mix_factor"],
            f"a Stable Video Diffusion model: {UNETS}"),
    "SVD, diffusers": (["down_blocks.0.resnets.0.temporal_res_block.conv1.weight"], "a Stable Video Diffusion model"),
    "Stable Cascade": (["clip_txt_pooled_mapper.weight", "down_blocks.0.0.depthwise.weight"], "a Stable Cascade model"),
    "Stable Cascade B": ([f"{M}effnet_mapper.0.weight"], "a Stable Cascade model"),
    "PixArt": (["adaln_single.linear.weight", "transformer_blocks.0.attn1.to_q.weight"], "a PixArt model"),
    "SDXL refiner": ([f"{M}label_emb.0.0.weight", "conditioner.embedders.0.model.ln_final.weight"],
                     "SDXL's refiner: give the base model"),
    "LCM": ([f"{M}time_embed.cond_proj.weight", f"{M}out.2.weight"], "a latent consistency model: fine-tune the model"),
    "AnimateDiff": (["down_blocks.0.motion_modules.0.temporal_transformer.x"], "an AnimateDiff motion module"),
    "ControlNet": (["control_model.input_blocks.0.0.weight", "control_model.zero_convs.0.0.weight"],
                   f"a ControlNet: {BESIDE}"),
    "ControlNet, diffusers": (["controlnet_cond_embedding.conv_in.weight", "down_blocks.0.resnets.0.norm1.bias"],
                              f"a ControlNet: {BESIDE}"),
    "T2I-Adapter": (["body.0.block1.weight", "adapter.body.1.resnets.0.block1.weight"], f"a T2I-Adapter: {BESIDE}"),
    "IP-Adapter": (["image_proj.proj.weight", "ip_adapter.1.to_k_ip.weight"], f"an IP-Adapter: {BESIDE}"),
    "embedding": (["emb_params"], f"a textual-inversion embedding: {BESIDE}"),
    "embedding, SDXL": (["clip_g", "clip_l"], f"a textual-inversion embedding: {BESIDE}"),
    "embedding, diffusers": (["<my-cat>"], f"a textual-inversion embedding of diffusers: {BESIDE}"),
    "LoRA, kohya": (["lora_unet_mid_block_resnets_0_conv1.lora_down.weight"], "a LoRA: give it by --lora FILE"),
    "LoHa": (["lora_unet_mid_block_resnets_0_conv1.hada_w1_a"], "a LoRA: give it by --lora FILE"),
    "LyCORIS": (["lycoris_mid_block_resnets_0_conv1.lokr_w1"], "a LoRA: give it by --lora FILE"),
    "LoRA, old diffusers": (["unet.mid_block.attentions.0.transformer_blocks.0.attn1.processor.to_q_lora.up.weight"],
                            "a LoRA: give it by --lora FILE"),
    "LoRA, diffusers 0.20": (["unet.mid_block.attentions.0.proj_in.lora.down.weight"], "a LoRA: give it by --lora"),
    "LoRA, ComfyUI": (["diffusion_model.input_blocks.1.1.proj_in.lora_up.weight"], "a LoRA: give it by --lora FILE"),
    "LoHa, ComfyUI": (["diffusion_model.input_blocks.1.1.proj_in.hada_w1_a"], "a LoRA: give it by --lora FILE"),
    "OFT, PEFT": (["base_model.model.mid_block.attentions.0.proj_in.oft_R.weight"], "a LoRA: give it by --lora FILE"),
    "Wan": ([f"{M}blocks.0.self_attn.q.weight", f"{M}patch_embedding.weight"], f"a diffusion transformer: {UNETS}"),
    "AuraFlow": (["double_layers.0.attn.w1q.weight"], f"a diffusion transformer: {UNETS}"),
    "autoencoder": (["encoder.conv_in.weight", "decoder.conv_in.weight", "quant_conv.bias"], "an autoencoder alone"),
    "text encoder": (["text_model.embeddings.token_embedding.weight"], "a text encoder alone"),
    "UNet, diffusers": (["conv_in.weight", "down_blocks.0.resnets.0.norm1.bias"], "name the folder of the whole model"),
}  # fmt: skip


@pytest.mark.parametrize("kind", REFUSED)
def test_files_of_other_kinds_are_refused_with_the_way_out(kind: str, tmp_path: Path) -> None:
    keys, message = REFUSED[kind]
    path = tmp_path / "file.safetensors"
    save_state_dict({key: torch.ones(1) for key in keys}, path)
    refusals = (
        lambda: release_config(path),
        lambda: release_config(path, RELEASE_CONFIG),
        lambda: open_release(path),
        lambda: mix_files([path, path], tmp_path / "out.safetensors", Recipe("sum", [0.5])),
    )
    for refused in refusals:
        with pytest.raises(UserError) as caught:
            refused()
        assert str(caught.value).startswith(f"{path}: ") and message in str(caught.value)
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "out.safetensors").exists()


@pytest.mark.parametrize(
    "content",
    [
        {"string_to_token": {"*": 265}, "string_to_param": {"*": torch.ones(1, 4)}, "name": "cat", "step": 5},
        {"string_to_token": {"*": 265}, "string_to_param": None},  # a ParameterDict, which is dropped
    ],
)
def test_pickled_embeddings_are_refused(content: dict, tmp_path: Path) -> None:
    save_checkpoint(content, tmp_path / "cat.pt")
    with pytest.raises(UserError, match=r"cat\.pt: the file is a textual-inversion embedding: which works beside"):
        open_release(tmp_path / "cat.pt")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            {768: [{"linear.0.weight": torch.ones(1)}], "layer_structure": [1, 2, 1]},
            "the file is a hypernetwork:",
        ),
        (
            {"state": {0: {"exp_avg": torch.ones(1)}}, "param_groups": [{"lr": 1.0}]},
            "the state of an optimizer,",
        ),
        ({"model": {"x": torch.ones(1)}, "ema": {"x": torch.ones(1)}}, r"has several dicts of weights \(model, ema\);"),
        ({"shadow_params": [torch.ones(1)], "decay": 0.9}, "has no weights .keys: 'shadow_params', 'decay'"),
    ],
)
def test_pickles_without_weights_are_refused(content: dict, message: str, tmp_path: Path) -> None:
    save_checkpoint(content, tmp_path / "file.pt")
    with pytest.raises(UserError, match=rf"file\.pt: {message}") as caught:
        open_release(tmp_path / "file.pt")
    assert "\n" not in str(caught.value)


def mixed_dtypes(plain: dict[str, Tensor]) -> dict[str, Tensor]:
    """A merge of AUTOMATIC1111 with a baked autoencoder of another dtype, and text positions that were cast."""
    halves = {key: value.half() if value.is_floating_point() else value for key, value in plain.items()}
    vae = {key: value.bfloat16() for key, value in plain.items() if key.startswith("first_stage_model.")}
    positions = "cond_stage_model.transformer.text_model.embeddings.position_ids"
    return {**halves, **vae, positions: torch.arange(77)[None].half()}


def lightning(plain: dict[str, Tensor]) -> dict:
    """EveryDream and other trainers of 2022: a state dict beside the step, the callbacks and the version."""
    return {"state_dict": plain, "global_step": 470_000, "epoch": 3, "pytorch-lightning_version": "1.4.2",
            "callbacks": {}, "lr_schedulers": []}  # fmt: skip


def nested(plain: dict[str, Tensor]) -> dict:
    """A training loop of one's own: the weights of a wrapped model below two names, beside an optimizer's state."""
    named = {f"module._orig_mod.{key}": value for key, value in plain.items()}
    return {"model": {"state_dict": named}, "step": 7, "optimizer": [{"lr": 1.0}]}


def with_ema_and_control(plain: dict[str, Tensor]) -> dict[str, Tensor]:
    """A training of a ControlNet, which holds the release that it works beside."""
    return {**plain, "control_model.zero_convs.0.0.weight": torch.ones(1), "control_scales": torch.ones(1)}


def with_motion(plain: dict[str, Tensor]) -> dict[str, Tensor]:
    """A release into which AnimateDiff's modules were put."""
    return {**plain, f"{M}input_blocks.1.motion_modules.0.temporal_transformer.proj_in.weight": torch.ones(1)}


TAKEN = {
    "mixed dtypes": mixed_dtypes,
    "lightning": lightning,
    "nested": nested,
    "ControlNet with its release": with_ema_and_control,
    "AnimateDiff with its release": with_motion,
}


@pytest.mark.parametrize("kind", TAKEN)
def test_files_of_other_trainers_are_taken(kind: str, tiny_release: Path, tmp_path: Path) -> None:
    plain = load_state_dict(tiny_release)
    save_checkpoint(TAKEN[kind](plain), tmp_path / "theirs.ckpt")
    found = load_release(tmp_path / "theirs.ckpt", RELEASE_CONFIG).state_dict()
    reference = load_release(tiny_release, RELEASE_CONFIG).state_dict()
    assert found.keys() == reference.keys()
    for key, value in reference.items():
        assert torch.allclose(found[key].float(), value.float(), rtol=1e-2, atol=1e-2), key
