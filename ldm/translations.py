"""Targets and keys of public configs that are elsewhere here, and what replaces those that are not.

Imports no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_TRANSFORMS = "ldm.images.augmentations"
# A prefix of a dotted path, and what takes its place. The longest prefix that fits takes precedence.
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
_TOKEN = "a word is learned by textual_inversion.yaml, whose cond_stage_config names it as token and initial_token"
_INVERSION = "train on a folder of images with ldm.data.datasets.ImageCaptionDataset, as textual_inversion.yaml does"
_FOLDER = "use ldm.data.datasets.ImageCaptionDataset, which reads a folder of images and captions"
_OTHER_PROJECT = "it belongs to another project's package; install that one and give --trust-config, or " + _FOLDER
_BASE = "train the model that it extends with its own config, such as stable_diffusion_v1.yaml"
_CUSTOM = (
    "Custom Diffusion is not here; unet_trainable: attn trains the attention to captions, and textual_inversion.yaml "
    "a word"
)
_UNCLIP = "unCLIP is not here; " + _BASE
_FACES = "networks that recognise faces are not here; use FaceClipEncoder"
_STABLE_SR = "StableSR's networks are not here; LatentUpscaleDiffusion upscales"
# A prefix of a dotted path that no module here has, and what to use.
_INSTEAD = {
    "Adapter.": "T2I-Adapter is not here; " + _BASE,
    "cldm.": "ControlNet is not here; " + _BASE,
    "modules.xlmr": "AltDiffusion's text encoder is not here; " + _BASE,
    "sgm.": "use stable_diffusion_xl.yaml, which describes SDXL for this project",
    "src.custom_modules": _CUSTOM,
    "src.model.CustomDiffusion": _CUSTOM,
    "ldm.models.diffusion.ddpm.ImageEmbeddingConditionedLatentDiffusion": _UNCLIP,
    "ldm.models.diffusion.ddpm.LatentDiffusionSRTextWT": _STABLE_SR,
    "ldm.modules.diffusionmodules.openaimodel.EncoderUNetModelWT": _STABLE_SR,
    "ldm.modules.diffusionmodules.openaimodel.UNetModelDualcondV2": _STABLE_SR,
    "ldm.modules.encoders.modules.CLIPEmbeddingNoiseAugmentation": _UNCLIP,
    "ldm.modules.encoders.modules.ClipImageEmbedder": _UNCLIP,
    "ldm.modules.encoders.modules.FaceIdClipEncoder": _FACES,
    "ldm.modules.encoders.modules.FrozenFaceEncoder": _FACES,
    "ldm.modules.embedding_manager": _TOKEN,
    "ldm.data.personalized": _INVERSION,
    "ldm.data.personalized_style": _INVERSION,
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
_RATE = "the learning rate is model.base_learning_rate, one for all weights"
# A key of public configs that no class here takes, and what to use.
INSTEAD_OF_KEY = {
    "personalization_config": _TOKEN,
    "embedding_manager_ckpt": _TOKEN,
    "placeholder_string": _TOKEN,
    "placeholder_strings": _TOKEN,
    "placeholder_token": _TOKEN,
    "initializer_words": _TOKEN,
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
    "penultimate": "layer: hidden with layer_idx: -2 gives the states before the last block",
    "extended_mode": "a caption has at most 77 ids here",
    "max_chunks": "a caption has at most 77 ids here",
    "add_conv_in_front_of_unet": "no UNet here has a convolution in front; only false is taken",
}
_DIFFUSION = "ldm.models.diffusion"
# Keys of forks that nothing here reads, by a prefix of the class's path, with the values that a training of the fork
# ignores too. A model is built without them, since they change neither its weights nor its images.
_LEFT_OUT: dict[str, dict[str, tuple[Any, ...]]] = {
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
# The same for keys of which no other value is taken, since others change the weights.
_WITHOUT_EFFECT = {"ldm.modules.diffusionmodules.openaimodel.UNetModel": {"add_conv_in_front_of_unet": (False,)}}


def todays_path(path: str) -> str:
    """The dotted path here of what `path` names in public configs; `path` itself where it has not moved."""
    for prefix in sorted(_MOVED, key=len, reverse=True):
        if path.startswith(f"{prefix}."):
            path = _MOVED[prefix] + path[len(prefix) :]
            break
    return _RENAMED.get(path, path)


def instead(path: str) -> str:
    """`"; use X"` for a target of public configs that nothing here provides, else the empty string."""
    for prefix in sorted(_INSTEAD, key=len, reverse=True):
        if path.startswith(prefix):
            return f"; {_INSTEAD[prefix]}"
    return ""


def instead_of_key(key: str) -> str:
    """`"; use X"` for a key of public configs that nothing here takes, else the empty string."""
    return f"; {INSTEAD_OF_KEY[key]}" if key in INSTEAD_OF_KEY else ""


def without_left_out(target: Any, params: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Return the `params` of the class `target` without the keys of forks that nothing here reads, and these keys."""
    path = todays_path(str(target))
    unread = [keys for prefix, keys in _LEFT_OUT.items() if path.startswith(f"{prefix}.")]
    without_effect = _WITHOUT_EFFECT.get(path, {})
    left_out = [
        key
        for key, value in params.items()
        if any(key in keys for keys in unread) or value in without_effect.get(key, ())
    ]
    return {key: value for key, value in params.items() if key not in left_out}, left_out


def changes_training(key: str, value: Any, learning_rate: Any) -> bool:
    """Return whether a fork trains in another way than this project because of `key`, one that is left out."""
    if key == "model_lr" and value == learning_rate:
        return False
    values = next((keys[key] for keys in _LEFT_OUT.values() if key in keys), (value,))
    return value not in values
