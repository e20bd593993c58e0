"""Configs of a diffusers folder, from a config of this package, and their comparison with it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from omegaconf import DictConfig

from ldm.checkpoint.diffusers_folder import DiffusersFolder
from ldm.checkpoint.diffusers_keys import TEXT_1, TEXT_2, UNET_PART, VAE_PART
from ldm.checkpoint.diffusers_schedule import PREDICTIONS, SCHEDULE
from ldm.checkpoint.diffusers_sizes import CONSTANTS, sizes_of
from ldm.config.load import plain
from ldm.modules.encoders.clip_text import clip_text_config
from ldm.modules.encoders.open_clip import text_config_of
from ldm.util import UserError, refuse_if

_HEADS = "attention_head_dim"  # diffusers' name; it is the number of heads
_DIFFUSERS_VERSION = "0.30.0"  # that all versions since then read
_FACTOR = 8  # pixels per latent cell
# Pipelines by the number of channels that join the noisy latent, and by whether the model is SDXL.
_PIPELINES = {
    (0, False): "StableDiffusionPipeline",
    (5, False): "StableDiffusionInpaintPipeline",
    (4, False): "StableDiffusionInstructPix2PixPipeline",
    (0, True): "StableDiffusionXLPipeline",
    (5, True): "StableDiffusionXLInpaintPipeline",
}


def settings_of(config: DictConfig) -> dict[str, dict[str, Any]]:
    """Return the entries of each part's config that the weights do not tell, for a release of `config`.

    Raises:
        UserError: `config` is of a model that diffusers' folders of Stable Diffusion cannot hold.
    """
    params = plain(config)["model"]["params"]
    unet = params["unet_config"].get("params") or {}
    size = params.get("image_size") or 64
    settings = {
        UNET_PART: {_HEADS: _heads(unet), "sample_size": size},
        VAE_PART: {"scaling_factor": params.get("scale_factor", 1.0), "sample_size": size * _FACTOR},
    }
    stage = params.get("cond_stage_config")
    stage = stage if isinstance(stage, Mapping) else {}
    embedders = (stage.get("params") or {}).get("emb_models")
    towers = [tower for each in embedders or [stage] if (tower := _tower(each))]
    settings |= dict(zip((TEXT_1, TEXT_2), towers, strict=False))
    if embedders is not None:
        outdims = [each["params"]["outdim"] for each in embedders if "outdim" in (each.get("params") or {})]
        settings[UNET_PART] |= {"addition_embed_type": "text_time", "addition_time_embed_dim": (outdims or [256])[0]}
    return settings


def _heads(unet: Mapping[str, Any]) -> list[int]:
    """Return the number of attention heads per level."""
    widths = [unet.get("model_channels", 0) * factor for factor in unet.get("channel_mult", ())]
    channels = unet.get("num_head_channels", -1)
    return [unet.get("num_heads", -1) if channels == -1 else width // channels for width in widths]


def _tower(stage: Mapping[str, Any]) -> dict[str, Any] | None:
    kind = str(stage.get("target", "")).rpartition(".")[2]
    params = stage.get("params") or {}
    if kind == "FrozenCLIPEmbedder":
        config = clip_text_config(params.get("text_config"))
        return {key: config[key] for key in ("num_attention_heads", "hidden_act", "projection_dim")}
    if kind.startswith("FrozenOpenCLIPEmbedder"):
        arch, version = params.get("arch", "ViT-H-14"), params.get("version")
        config = text_config_of(arch, version, params.get("text_config"))
        activation = "quick_gelu" if config["quick_gelu"] else "gelu"
        return {
            **{"num_attention_heads": config["heads"], "hidden_act": activation},
            "projection_dim": config["embed_dim"],
        }
    return None


def check_settings(folder: DiffusersFolder, config: DictConfig) -> None:
    """Raise `UserError` if a config in `folder` describes another network than `config`."""
    settings = settings_of(config)
    for part, expected in settings.items():
        stated = folder.configs.get(part)
        if stated is None:
            continue
        stated = stated.get("text_config") if isinstance(stated.get("text_config"), Mapping) else stated
        for key in (_HEADS, "num_attention_heads", "hidden_act", "scaling_factor"):
            found = _stated_heads(stated) if key == _HEADS else stated.get(key)
            if key not in expected or found is None:
                continue
            if not _agrees(found, expected[key], stated.get("down_block_types")):
                raise UserError(
                    f"{folder.path / part / 'config.json'}: {key} is {found}, but the model's config has "
                    f"{expected[key]}; name the config of this model"
                )


def _stated_heads(stated: Mapping[str, Any]) -> Any:
    return stated.get("num_attention_heads") or stated.get(_HEADS, 8)  # 8: diffusers' default


def _agrees(found: Any, expected: Any, levels: Sequence[str] | None) -> bool:
    """Return True if two settings agree. Heads are compared at the levels with attention."""
    if not isinstance(expected, list):
        return found == expected
    found = [found] * len(expected) if isinstance(found, int) else found
    if not isinstance(found, list) or len(found) != len(expected):
        return False
    attends = [str(level).startswith("CrossAttn") for level in levels] if isinstance(levels, list) else []
    attends = [*attends[:-1], True] if len(attends) == len(found) else [True] * len(found)
    return all(one == two for one, two, counts in zip(found, expected, attends, strict=True) if counts)


def folder_configs(
    config: DictConfig, shapes: Mapping[str, Mapping[str, Sequence[int]]], predicts: str, zero_snr: bool
) -> dict[str, dict[str, Any]]:
    """Return the JSON files of a folder by name, for the parts with these `shapes` of weights.

    Raises:
        UserError: no pipeline of diffusers has these parts.
    """
    settings = settings_of(config)
    files: dict[str, dict[str, Any]] = {}
    for part, kind in ((UNET_PART, "UNet2DConditionModel"), (VAE_PART, "AutoencoderKL")):
        if part in shapes:
            entries = {**CONSTANTS[part], **sizes_of(part, shapes[part]), **settings[part]}
            files[f"{part}/config.json"] = {"_class_name": kind, **{k: v for k, v in entries.items() if v is not None}}
    if UNET_PART in shapes:
        depths = files[f"{UNET_PART}/config.json"].get("transformer_layers_per_block", [1])
        files[f"{UNET_PART}/config.json"]["transformer_layers_per_block"] = [depth or 1 for depth in depths]
    for part in (TEXT_1, TEXT_2):
        if part in shapes:
            files[f"{part}/config.json"] = _text_config(shapes[part], settings.get(part, {}))
    files["scheduler/scheduler_config.json"] = _scheduler(predicts, zero_snr)
    files["model_index.json"] = _index(shapes)
    return files


def _text_config(shapes: Mapping[str, Sequence[int]], settings: Mapping[str, Any]) -> dict[str, Any]:
    kind = "CLIPTextModelWithProjection" if "text_projection.weight" in shapes else "CLIPTextModel"
    ends = {"bos_token_id": 49406, "eos_token_id": 49407, "pad_token_id": 1}
    constants = {"layer_norm_eps": 1e-5, "attention_dropout": 0.0, "model_type": "clip_text_model"}
    return {"architectures": [kind], **constants, **ends, **settings, **sizes_of(TEXT_1, shapes)}


def _scheduler(predicts: str, zero_snr: bool) -> dict[str, Any]:
    spacing = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"} if zero_snr else {}
    offset = {} if zero_snr else {"steps_offset": 1}
    return {
        "_class_name": "DDIMScheduler",
        **SCHEDULE,
        **{"clip_sample": False, "set_alpha_to_one": False, "prediction_type": stated_prediction(predicts)},
        **offset,
        **spacing,
    }


def stated_prediction(predicts: str) -> str:
    """Return the `prediction_type` of a scheduler for a prediction in the terms of the config."""
    names = {ours: theirs for theirs, ours in PREDICTIONS.items()}
    refuse_if(
        predicts not in names,
        f"parameterization {predicts}: a folder of diffusers takes {' or '.join(names)}; write a .safetensors file",
    )
    return names[predicts]


def _index(shapes: Mapping[str, Mapping[str, Sequence[int]]]) -> dict[str, Any]:
    is_xl = TEXT_2 in shapes
    unet = shapes.get(UNET_PART, {})
    maps = unet["conv_in.weight"][1] - unet["conv_out.weight"][0] if "conv_in.weight" in unet else None
    pipeline = _PIPELINES.get((maps, is_xl))
    lacking = [part for part in (UNET_PART, VAE_PART, TEXT_1) if part not in shapes]
    if lacking or pipeline is None:
        reason = f"the release lacks {' and '.join(lacking)}" if lacking else f"its UNet takes {maps} further channels"
        raise UserError(f"{reason}, which no pipeline of diffusers has; write a .safetensors file instead")
    index: dict[str, Any] = {"_class_name": pipeline, "_diffusers_version": _DIFFUSERS_VERSION}
    for part in (TEXT_1, *((TEXT_2,) if is_xl else ())):
        projects = "text_projection.weight" in shapes[part]
        index[part] = ["transformers", "CLIPTextModelWithProjection" if projects else "CLIPTextModel"]
        index[part.replace("text_encoder", "tokenizer")] = ["transformers", "CLIPTokenizer"]
    index |= {UNET_PART: ["diffusers", "UNet2DConditionModel"], VAE_PART: ["diffusers", "AutoencoderKL"]}
    index["scheduler"] = ["diffusers", "DDIMScheduler"]
    others = {"force_zeros_for_empty_prompt": True} if is_xl else {"requires_safety_checker": False}
    unused = ("image_encoder", "feature_extractor") if is_xl else ("safety_checker", "feature_extractor")
    return {**index, **{name: [None, None] for name in unused}, **others}
