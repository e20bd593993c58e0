"""diffusers' own single-file loader opens merged SD 2.1 and SDXL files, with local configs, and agrees with us.

The files have all of the released keys, and a small width.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import diffusers
import pytest
import torch

from ldm.checkpoint import load_checkpoint, save_checkpoint
from ldm.checkpoint.keys import UNET
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.release.configs import training_config
from ldm.release.families import FAMILIES
from ldm.release.hack import hack_config
from ldm.release.load import load_release
from ldm.release.merge import merge_files
from tests.golden_data import relative_error, seeded_tensor
from tests.narrow_models import CLIP, CONTEXT, OPEN_CLIP, VECTOR, write_configs, write_release

PROMPTS = ["a photo of a cat", "a drawing of a dog, with a rather long description of what it does all day"]
UNET_OF_SD2 = {
    "_class_name": "UNet2DConditionModel",
    "block_out_channels": [32, 64, 128, 128],
    "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
    "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
    "attention_head_dim": [1, 2, 4, 4],  # the number of heads
    "layers_per_block": 2,
    "cross_attention_dim": CONTEXT[1024],
    "use_linear_projection": True,
}
UNET_OF_SDXL = {
    **UNET_OF_SD2,
    "block_out_channels": [32, 64, 128],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "attention_head_dim": [1, 2, 4],
    "transformer_layers_per_block": [1, 2, 10],
    "cross_attention_dim": CONTEXT[2048],
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": VECTOR,
}
VAE = {
    "_class_name": "AutoencoderKL",
    "block_out_channels": [32, 64, 128, 128],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "latent_channels": 4,
    "layers_per_block": 2,
}
CLIP_CONFIG = {**CLIP, "model_type": "clip_text_model", "num_hidden_layers": 12, "hidden_act": "quick_gelu"}
OPEN_CLIP_CONFIG = {
    **{"model_type": "clip_text_model", "hidden_act": "gelu", "hidden_size": OPEN_CLIP["width"]},
    **{"num_attention_heads": OPEN_CLIP["heads"], "intermediate_size": 4 * OPEN_CLIP["width"]},
    "projection_dim": OPEN_CLIP["embed_dim"],
}
TEXT, PROJECTED = ["transformers", "CLIPTextModel"], ["transformers", "CLIPTextModelWithProjection"]


class Kind(NamedTuple):
    """A family, and what diffusers calls it."""

    family: str
    pipeline: type
    unet: dict[str, Any]
    texts: dict[str, tuple[list[str], dict[str, Any]]]


SD2 = Kind(
    "sd2_768_v",
    diffusers.StableDiffusionPipeline,
    UNET_OF_SD2,
    {"text_encoder": (TEXT, {**OPEN_CLIP_CONFIG, "num_hidden_layers": 23})},  # the last is not used
)
SDXL = Kind(
    "sdxl",
    diffusers.StableDiffusionXLPipeline,
    UNET_OF_SDXL,
    {
        "text_encoder": (TEXT, CLIP_CONFIG),
        "text_encoder_2": (PROJECTED, {**OPEN_CLIP_CONFIG, "num_hidden_layers": 32}),
    },
)


class Opened(NamedTuple):
    """A merged file as we open it, and as diffusers does."""

    ours: LatentDiffusion
    theirs: diffusers.DiffusionPipeline


@pytest.fixture(scope="module", params=[SD2, SDXL], ids=lambda kind: kind.family)
def opened(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Opened]:
    kind: Kind = request.param
    folder = tmp_path_factory.mktemp(kind.family)
    merged, config = merged_file(kind.family, folder)
    yield Opened(load_release(merged, config), pipeline_of(kind, merged, folder / "local"))
    shutil.rmtree(folder)  # some hundred megabytes


def merged_file(family: str, folder: Path) -> tuple[Path, Path]:
    """Return the file of a training merged into a release, and the release config."""
    config, finetune = write_configs(FAMILIES[family], folder)
    release, start, merged = folder / "release.safetensors", folder / "start.ckpt", folder / "merged.safetensors"
    write_release(config, release)
    hack_config(training_config(release, [str(finetune)]), release, start)
    content = load_checkpoint(start)
    weights = content["state_dict"]
    trained = {key: value * 1.01 for key, value in weights.items() if key.startswith(UNET)}
    save_checkpoint({**content, "state_dict": {**weights, **trained}}, start)
    merge_files(start, release, merged, None, False)
    return merged, config


def pipeline_of(kind: Kind, merged: Path, local: Path) -> diffusers.DiffusionPipeline:
    """Return the pipeline that diffusers builds from the file and a folder of configs, without tokenizers."""
    parts = {"unet": (["diffusers", "UNet2DConditionModel"], kind.unet), "vae": (["diffusers", "AutoencoderKL"], VAE)}
    parts |= kind.texts
    for name, (_, config) in parts.items():
        (local / name).mkdir(parents=True)
        (local / name / "config.json").write_text(json.dumps(config))
    index = {name: place for name, (place, _) in parts.items()}
    tokenizers = {name.replace("text_encoder", "tokenizer"): None for name in kind.texts}
    index |= {name: ["transformers", "CLIPTokenizer"] for name in tokenizers}
    index |= {"scheduler": ["diffusers", "DDIMScheduler"], "_class_name": kind.pipeline.__name__}
    (local / "model_index.json").write_text(json.dumps(index))
    others = {"safety_checker": None, "feature_extractor": None} if kind is SD2 else {}
    scheduler = diffusers.DDIMScheduler(steps_offset=1, clip_sample=False)
    return kind.pipeline.from_single_file(
        str(merged), config=str(local), local_files_only=True, scheduler=scheduler, **tokenizers, **others
    )


@torch.no_grad()
def test_a_merged_file_predicts_the_same_noise(opened: Opened) -> None:
    ours, theirs = opened
    x, t = seeded_tensor("oracle/x", (2, 4, 16, 16)), torch.tensor([3, 731])
    context = seeded_tensor("oracle/context", (2, 77, ours.model.diffusion_model.context_dim))
    cond: dict[str, Any] = {"c_crossattn": [context]}
    added = None
    if ours.model.conditioning_key == "crossattn-adm":
        pooled = seeded_tensor("oracle/pooled", (2, OPEN_CLIP["embed_dim"]))
        sizes = {"original_size_as_tuple": [[512, 768], [1024, 1024]], "crop_coords_top_left": [[0, 16], [7, 0]]}
        sizes["target_size_as_tuple"] = [[1024, 1024], [832, 1216]]
        numbers = torch.tensor(list(sizes.values())).permute(1, 0, 2).flatten(1).float()  # (2, 6)
        embedders = ours.cond_stage_model.embedders[2:]
        embedded = [embed(torch.tensor(pairs).float()) for embed, pairs in zip(embedders, sizes.values(), strict=True)]
        cond["c_adm"] = torch.cat([pooled, *embedded], dim=1)
        added = {"text_embeds": pooled, "time_ids": numbers}
    reference = theirs.unet(x, t, encoder_hidden_states=context, added_cond_kwargs=added).sample
    assert relative_error(ours.apply_model(x, t, cond), reference) < 1e-5


@torch.no_grad()
def test_a_merged_file_has_the_same_autoencoder(opened: Opened) -> None:
    image = seeded_tensor("oracle/image", (1, 3, 32, 32), 0.5).clamp(-1, 1)
    posterior = opened.ours.first_stage_model.encode(image)
    assert relative_error(posterior.parameters, opened.theirs.vae.encode(image).latent_dist.parameters) < 1e-5


@torch.no_grad()
def test_a_merged_file_gives_the_same_text_states(opened: Opened) -> None:
    ours, theirs = opened
    stage = ours.cond_stage_model
    if not hasattr(stage, "embedders"):
        reference = theirs.text_encoder(stage.tokenize(PROMPTS)).last_hidden_state
        assert relative_error(stage.encode(PROMPTS), reference) < 1e-5
        return
    clip, open_clip = stage.embedders[:2]
    first = theirs.text_encoder(clip.tokenize(PROMPTS), output_hidden_states=True)
    second = theirs.text_encoder_2(open_clip.tokenize(PROMPTS), output_hidden_states=True)
    reference = torch.cat([first.hidden_states[-2], second.hidden_states[-2]], dim=-1)
    states, pooled = open_clip(PROMPTS)
    assert relative_error(torch.cat([clip(PROMPTS), states], dim=-1), reference) < 1e-5
    assert relative_error(pooled, second.text_embeds) < 1e-5
