"""Targets of public configs that have another path here, and hints for unsupported targets. Imports no torch."""

from __future__ import annotations

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
}
_INVERSION = "train on a folder of images with ldm.data.datasets.ImageCaptionDataset, as textual_inversion.yaml does"
_FOLDER = "use ldm.data.datasets.ImageCaptionDataset, which reads a folder of images and captions"
_OTHER_PROJECT = "it belongs to another project's package; install that one and give --trust-config, or " + _FOLDER
# Prefix of an unsupported dotted path, and a hint.
_HINTS_FOR_TARGETS = {
    "ldm.data.personalized": _INVERSION,
    "ldm.data.personalized_style": _INVERSION,
    "ldm.data.every_dream": _FOLDER,
    "ldm.data.ed_validate": _FOLDER,
    "ldm.data.open-images": "write a dataset of your own and give --trust-config",
    "ldm.data.openimages.OpenImagesBBox": "write a dataset of your own that gives image and the boxes' tokens",
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
_TOKEN = "a word is learned by textual_inversion.yaml, whose cond_stage_config names it as token and initial_token"
_PRIOR = "images of the class go into a prior, by prior_images.yaml"
_RATE = "the learning rate is model.base_learning_rate, one for all weights"
# Unsupported key of public configs, and a hint.
HINTS_FOR_KEYS = {
    "personalization_config": _TOKEN,
    "embedding_manager_ckpt": _TOKEN,
    "placeholder_string": _TOKEN,
    "placeholder_strings": _TOKEN,
    "placeholder_token": _TOKEN,
    "initializer_words": _TOKEN,
    "embedding_reg_weight": "leave it out: textual_inversion.yaml trains one embedding, begun at initial_token's",
    "unfreeze_model": "leave it out: the UNet trains unless unet_trainable is false, and the text encoder if "
    "cond_stage_trainable is true",
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
}


def current_path(path: str) -> str:
    """Return the dotted path here of `path` in public configs. A path that has not moved is unchanged."""
    for prefix in sorted(_MOVED, key=len, reverse=True):
        if path.startswith(f"{prefix}."):
            return _MOVED[prefix] + path[len(prefix) :]
    return path


def hint_for_target(path: str) -> str:
    """Return a hint, such as `"; use X"`, for an unsupported target of public configs, else an empty string."""
    for prefix in sorted(_HINTS_FOR_TARGETS, key=len, reverse=True):
        if path.startswith(prefix):
            return f"; {_HINTS_FOR_TARGETS[prefix]}"
    return ""


def hint_for_key(key: str) -> str:
    """Return a hint, such as `"; use X"`, for an unsupported key of public configs, else an empty string."""
    return f"; {HINTS_FOR_KEYS[key]}" if key in HINTS_FOR_KEYS else ""
