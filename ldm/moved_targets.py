"""Targets and keys of public configs that differ here, and hints for unsupported ones. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_TRANSFORMS = "ldm.images.augmentations"
# Prefix of a dotted path, and its replacement. The longest matching prefix takes precedence.
_MOVED = {
    "torchvision.transforms": _TRANSFORMS,
    "torchvision.transforms.transforms": _TRANSFORMS,
    "torchvision.transforms.v2": _TRANSFORMS,
    "taming.data.faceshq": "ldm.data.faceshq",
    "taming.modules.losses.vqperceptual": "ldm.modules.losses.vqperceptual",
    "edit_dataset": "ldm.data.edit",
    "stable_diffusion.ldm": "ldm",
    "invokeai.backend.ldm": "ldm",
    "invokeai.backend.models": "ldm.models",
    "invokeai.backend.stable_diffusion.autoencoder": "ldm.models.autoencoder",
    "invokeai.backend.stable_diffusion.diffusion": "ldm.models.diffusion",
    "invokeai.backend.stable_diffusion.diffusionmodules": "ldm.modules.diffusionmodules",
    "invokeai.backend.stable_diffusion.encoders": "ldm.modules.encoders",
    "invokeai.backend.stable_diffusion.lr_scheduler": "ldm.lr_scheduler",
    "invokeai.models": "ldm.models",
}
_ENCODERS = "ldm.modules.encoders.modules"
# A whole path, after its prefix has moved, and the class that takes its place.
_RENAMED = {
    f"{_ENCODERS}.WeightedFrozenCLIPEmbedder": f"{_ENCODERS}.FrozenCLIPEmbedder",  # the same network
    "main.LearningRateMonitor": "pytorch_lightning.callbacks.LearningRateMonitor",
}
# Hints that `ldm.training.other_programs` has for options too.
LORA = (
    "lora.yaml, added to --base, trains a LoRA: model.params.lora has its rank, alpha and targets; "
    "tools/extract_lora.py makes one of a full fine-tune"
)
LEARNT_WORD = "a word is learned by textual_inversion.yaml, whose cond_stage_config names it as token and initial_token"
_INVERSION = "train on a folder of images with ldm.data.datasets.ImageCaptionDataset, as textual_inversion.yaml does"
_FOLDER = "use ldm.data.datasets.ImageCaptionDataset, which reads a folder of images and captions"
_OTHER_PROJECT = "it belongs to another project's package; install that one and give --trust-config, or " + _FOLDER
_BASE = "train the model that it extends with its own config, such as stable_diffusion_v1.yaml"
_CUSTOM = (
    "Custom Diffusion is not here; unet_trainable: attn trains the attention to captions, and textual_inversion.yaml "
    "a word"
)
_STABLE_SR = "StableSR's networks are not here; LatentUpscaleDiffusion upscales"
# Prefix of an unsupported dotted path, and a hint.
_HINTS_FOR_TARGETS = {
    "Adapter.": "T2I-Adapter is not here; " + _BASE,
    "cldm.": "ControlNet is not here; " + _BASE,
    "modules.xlmr": "AltDiffusion's text encoder is not here; " + _BASE,
    "sgm.": "use stable_diffusion_xl.yaml, which describes SDXL for this project",
    "src.custom_modules": _CUSTOM,
    "src.model.CustomDiffusion": _CUSTOM,
    "ldm.models.diffusion.ddpm.LatentDiffusionSRTextWT": _STABLE_SR,
    "ldm.modules.diffusionmodules.openaimodel.EncoderUNetModelWT": _STABLE_SR,
    "ldm.modules.diffusionmodules.openaimodel.UNetModelDualcondV2": _STABLE_SR,
    "ldm.modules.embedding_manager": LEARNT_WORD,
    "ldm.data.personalized": _INVERSION,
    "ldm.data.personalized_style": _INVERSION,
    "ldm.modules.encoders.modules.PersonalizedCLIPEmbedder": "aesthetic gradients are not here; use FrozenCLIPEmbedder",
    "ldm.modules.encoders.xlmr": "AltDiffusion's text encoder is not here; " + _BASE,
    "optimizedSD.": "it splits the model to sample with little memory; " + _BASE,
    "ldm.data.every_dream": _FOLDER,
    "ldm.data.ed_validate": _FOLDER,
    "ldm.data.open-images": "write a dataset of your own and give --trust-config",
    "ldm.data.openimages.OpenImagesBBox": "write a dataset of your own that gives image and the boxes' tokens",
    "ldm.data.previews": _FOLDER,
    "ldm.data.simple.Objaverse": "write a dataset of your own that gives image_target, image_cond and T",
    "invokeai.backend.stable_diffusion.data": _INVERSION,
    "src.finetune_data": _INVERSION,
    "train.DataModuleFromConfig": "use main.DataModuleFromConfig",
    "basicsr.data": "use ldm.data.imagenet.ImageNetSR, whose degradation bsrgan makes low-resolution images",
    "dataset.dataset_laion": "use ldm.data.laion.WebDataModuleFromConfig",
    "dataset.utils": _OTHER_PROJECT,
    "torchvision.transforms": f"see {_TRANSFORMS} for the transforms that are there",
    "torchvision": "torchvision is not used here; only torchvision.transforms is translated",
}
# Hints for the keys of textual-inversion and DreamBooth forks.
_PRIOR = "images of the class go into a prior, by prior_images.yaml"
_RATE = "the learning rate is model.base_learning_rate; trained_parts has factors for parts of the model"
_FILE = "the weights come with ckpt_path, a release in one file, or with --finetune_from"
_CONTROL = "ControlNet is not here; train the model that it extends, without this key"
_NOISE = "noise_config, with a class of ldm.models.diffusion.noise, has an offset"
# Unsupported key of public configs, and a hint.
HINTS_FOR_KEYS = {
    "personalization_config": LEARNT_WORD,
    "embedding_manager_ckpt": LEARNT_WORD,
    "placeholder_string": LEARNT_WORD,
    "placeholder_strings": LEARNT_WORD,
    "placeholder_token": LEARNT_WORD,
    "initializer_words": LEARNT_WORD,
    "embedding_reg_weight": "textual_inversion.yaml trains one embedding, begun at initial_token's, without it",
    "unfreeze_model": "the UNet trains unless unet_trainable is false, and the text encoder if cond_stage_trainable is "
    "true",
    "freeze_model": "unet_trainable: false freezes the UNet",
    "train_text_encoder": "cond_stage_trainable: true trains the text encoder",
    "reg_weight": f"prior_loss_weight is that weight; {_PRIOR}",
    "reg_data_root": _PRIOR,
    "with_prior_preservation": _PRIOR,
    "class_prompt": f"{_PRIOR}, made by tools/make_prior.py --prompt",
    "model_lr": _RATE,
    "lr_text_encoder": _RATE,
    "u_cond_percent": "ucg_training: {txt: {p: 0.1}} replaces captions by the empty one",
    "reg": "regularisation images go into a prior: tools/make_prior.py and prior_images.yaml",
    "bucket_sampler": "pre-encode with --buckets",
    "control_key": _CONTROL,
    "control_stage_config": _CONTROL,
    "first_stage_trainable": "an autoencoder is trained by its own config; leave it out",
    "freeze_unet": "unet_trainable: false freezes the UNet",
    "from_pretrained": _FILE,
    "learning_rate": _RATE,
    "lora_alpha": LORA,
    "lora_config": LORA,
    "lora_rank": LORA,
    "network_dim": LORA,
    "network_module": LORA,
    "noise_offset": _NOISE,
    "offset_noise_level": _NOISE,
    "only_mid_control": _CONTROL,
    "sd_locked": _CONTROL,
    "use_fp16": "--precision sets the type that the networks compute in",
    "use_lora": LORA,
    "penultimate": "clip_skip: 2 gives the states before the last block, normalised",
    "extended_mode": "max_chunks: 3 reads captions of 225 tokens",
    "add_conv_in_front_of_unet": "no UNet here has a convolution in front; only false is taken",
}
_DIFFUSION = "ldm.models.diffusion"
# Keys of forks that no class here uses, by prefix of the class path, and their values that do not affect the training
# of the fork. Models are built without these keys, because they affect neither weights nor images.
_UNUSED_KEYS: dict[str, dict[str, tuple[Any, ...]]] = {
    _DIFFUSION: {
        "personalization_config": (None,),
        "embedding_manager_ckpt": (None, ""),
        "embedding_reg_weight": (None, 0),
        "unfreeze_model": (None, True),
        "model_lr": (None,),
        "reg_weight": (None, 0),
        "u_cond_percent": (None, 0),
    },
}
# Keys that are accepted with these values only, because other values affect the weights.
_NEUTRAL_VALUES = {"ldm.modules.diffusionmodules.openaimodel.UNetModel": {"add_conv_in_front_of_unet": (False,)}}


def current_path(path: str) -> str:
    """Return the dotted path here of `path` in public configs. A path that has not moved is unchanged."""
    for prefix in sorted(_MOVED, key=len, reverse=True):
        if path.startswith(f"{prefix}."):
            path = _MOVED[prefix] + path[len(prefix) :]
            break
    return _RENAMED.get(path, path)


def hint_for_target(path: str) -> str:
    """Return a hint, such as `"; use X"`, for an unsupported target of public configs, else an empty string."""
    for prefix in sorted(_HINTS_FOR_TARGETS, key=len, reverse=True):
        if path.startswith(prefix):
            return f"; {_HINTS_FOR_TARGETS[prefix]}"
    return ""


def hint_for_missing_module(path: str) -> str:
    """Return a hint for a target whose module does not exist, else an empty string."""
    if path.startswith("pytorch_optimizer."):
        return "; install it: pip install -c constraints.txt '.[optimizers]'"
    data = path.startswith(("ldm.data.", "taming.data."))
    return hint_for_target(path) or (f"; it belongs to a fork; {_FOLDER}" if data else "")


def hint_for_key(key: str) -> str:
    """Return a hint, such as `"; use X"`, for an unsupported key of public configs, else an empty string."""
    return f"; {HINTS_FOR_KEYS[key]}" if key in HINTS_FOR_KEYS else ""


def without_unused_keys(target: Any, params: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Return `params` of the class `target` without the keys of forks that no class here uses, and these keys."""
    path = current_path(str(target))
    unused = [keys for prefix, keys in _UNUSED_KEYS.items() if path.startswith(f"{prefix}.")]
    neutral = _NEUTRAL_VALUES.get(path, {})
    dropped = [
        key for key, value in params.items() if any(key in keys for keys in unused) or value in neutral.get(key, ())
    ]
    return {key: value for key, value in params.items() if key not in dropped}, dropped


def changes_training(key: str, value: Any, learning_rate: Any) -> bool:
    """Return True if a fork trains differently because of the unused `key` and its `value`."""
    if key == "model_lr" and value == learning_rate:
        return False
    neutral = next((keys[key] for keys in _UNUSED_KEYS.values() if key in keys), (value,))
    return value not in neutral
