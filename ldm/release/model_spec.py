"""Metadata of the files that this package writes, after the public ModelSpec 1.0.

Nothing here names a folder, a person or a caption.
"""

from __future__ import annotations

import json
import logging
import os
import re
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ldm.checkpoint.keys import CONDITIONER, UNET, has_part
from ldm.checkpoint.markers import PREDICTION_TYPE, STATED
from ldm.checkpoint.writing import HASH
from ldm.release.caption_record import KEYS
from ldm.release.families import Family
from ldm.util import UserError

log = logging.getLogger(__name__)

_SPEC = "modelspec."
VERSION, ARCHITECTURE, IMPLEMENTATION = (
    f"{_SPEC}{name}" for name in ("sai_model_spec", "architecture", "implementation")
)
TITLE, DATE, RESOLUTION, MERGED_FROM = (f"{_SPEC}{name}" for name in ("title", "date", "resolution", "merged_from"))
SETTINGS = "ldm.training_settings"
# Digests of the weights in the metadata of other programs' releases. A change of the weights makes them wrong.
_DIGESTS = (HASH, f"{_SPEC}hash_md5", "sshs_model_hash", "sshs_legacy_hash")
# Entries of other trainers and UIs that hold folders of a person's machine, captions or prompts.
_PRIVATE = re.compile(
    r"ss_(?:dataset_dirs|reg_dataset_dirs|datasets|tag_frequency|sd_model_name|vae_name|network_args|training_comment)"
    r"|ot_config|ot_.*_path|prompt|workflow|parameters|invokeai_.*"
)
# Folders of a person's machine, in any other entry.
_FOLDER = re.compile(
    r"(?:^|[\s\"'=:,;(\[{])"
    r"(?:~?/(?:home|Users|root|mnt|media|tmp|workspace|content|data|opt|var|srv|volumes?|kaggle)/|[A-Za-z]:(?:\\|/(?!/)))",
)
_ARCHITECTURES = {
    "sd1": "stable-diffusion-v1",
    "sd1_inpainting": "stable-diffusion-v1-inpainting",
    "instruct_pix2pix": "stable-diffusion-v1-instruct-pix2pix",
    "sd2_768_v": "stable-diffusion-v2-768-v",
    "sd2_base": "stable-diffusion-v2-512",
    "sd2_inpainting": "stable-diffusion-v2-inpainting",
    "sd2_depth": "stable-diffusion-v2-depth",
    "sdxl": "stable-diffusion-xl-v1-base",
    "sdxl_inpainting": "stable-diffusion-xl-v1-inpainting",
}
_OF_COMPVIS, _OF_SGM = (
    "https://github.com/CompVis/stable-diffusion",
    "https://github.com/Stability-AI/generative-models",
)
DIFFUSERS = "diffusers"
_LORA = "/lora"
# Parts of a training's config that `training_settings` may copy: numbers and names of methods.
_COPIED = {
    "model": ("base_learning_rate",),
    "model.params": ("parameterization", "use_ema", "rescale_betas_zero_snr", "loss_type"),
    "model.params.lora": ("rank", "alpha", "dropout"),
    "data.params": ("batch_size", "null_cond_dropout"),
    "lightning.trainer": ("accumulate_grad_batches", "precision", "gradient_clip_val", "max_steps", "max_epochs"),
}
_MOST_TEXT = 64


def lasting(metadata: Mapping[str, str]) -> dict[str, str]:
    """Return the entries of a release's `metadata` that stay true if its weights change, and tell nothing private."""
    private = [key for key, text in metadata.items() if _PRIVATE.fullmatch(key) or _FOLDER.search(text)]
    if private:
        log.info("metadata left out, which may tell folders, captions or prompts: %s", ", ".join(private))
    return {key: text for key, text in metadata.items() if key not in (*_DIGESTS, *private)}


def described(
    metadata: Mapping[str, str],
    out: Path,
    keys: Iterable[str],
    family: Family | None,
    predicts: str | None = None,
    merged_from: Iterable[str] = (),
    settings: Mapping[str, Any] | None = None,
    is_folder: bool = False,
    captions: Mapping[str, str] | None = None,
) -> dict[str, str]:
    """Return the metadata of a release that is written to `out`.

    The entries of `metadata`, of the release that it was made from, are kept, except for those that are no longer true.
    A `.ckpt` gets no others. Without a family, the architecture is unknown, and the file does not claim to follow the
    specification.

    Args:
        keys: of the release, under this package's names.
        predicts: prediction of the UNet, `eps` or `v`; that of the family if None.
        merged_from: titles of the files that were mixed.
        settings: those of the training, see `training_settings`.
        captions: those of `record_of`; None keeps those in `metadata`.
    """
    keys = list(keys)
    new = {} if TITLE in metadata else {TITLE: out.name if is_folder else out.stem}
    predicts = predicts or (family.parameterization if family else None)
    if family is not None:
        of_xl = has_part(keys, CONDITIONER) or has_part(keys, f"{UNET}label_emb.")
        new |= {ARCHITECTURE: architecture(family, predicts), RESOLUTION: f"{family.size}x{family.size}"}
        new[IMPLEMENTATION] = DIFFUSERS if is_folder else (_OF_SGM if of_xl else _OF_COMPVIS)
        new[VERSION] = "1.0.1"
    if predicts in STATED:
        new[PREDICTION_TYPE] = STATED[predicts]
    if merged_from:
        new[MERGED_FROM] = ", ".join(merged_from)
    if settings:
        new[SETTINGS] = json.dumps(settings, sort_keys=True)
    new |= {DATE: _now(), HASH: ""}
    if out.suffix == ".ckpt" and not is_folder:  # the specification is of .safetensors
        new = {key: text for key, text in new.items() if key in metadata or key == SETTINGS}
    if captions is not None:
        metadata = {key: text for key, text in metadata.items() if key not in KEYS.values()}
    return {**lasting(metadata), **new, **(captions or {})}


def architecture(family: Family, predicts: str | None) -> str:
    """Return the specification's name of a family. Its names of SD 2 tell the prediction too."""
    key = family.key
    if key in ("sd2_768_v", "sd2_base"):
        key = "sd2_base" if predicts == "eps" else "sd2_768_v"
    return _ARCHITECTURES[key]


def described_lora(out: Path, family: Family | None, rank: str, alpha: str | None = None) -> dict[str, str]:
    """Return the metadata by which other programs tell the model of a LoRA.

    `rank` is that of all layers, or a word. `alpha` is α if it is not the rank.
    """
    about = {"ss_network_module": "networks.lora", "ss_network_dim": rank, "ss_network_alpha": alpha or rank}
    about |= {TITLE: out.stem, DATE: _now(), HASH: ""}
    if family is None:
        return about
    about["ss_v2"] = str(family.key.startswith("sd2"))
    about["ss_base_model_version"] = _kohya_version(family)
    about |= {VERSION: "1.0.1", ARCHITECTURE: architecture(family, family.parameterization) + _LORA}
    # The layers' names are those of diffusers, except for SDXL.
    about |= {IMPLEMENTATION: _OF_SGM if family.has_vector else DIFFUSERS, RESOLUTION: f"{family.size}x{family.size}"}
    about[PREDICTION_TYPE] = STATED[family.parameterization]
    return about


def title_of(metadata: Mapping[str, str], path: Path) -> str:
    """Return the title of a release, by default the name of its file. Commas would separate titles."""
    return (metadata.get(TITLE) or path.stem).replace(",", " ")


def training_settings(checkpoint: Mapping[str, Any], config: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return the step and epoch of a training checkpoint, settings of its optimizers, and values of its `config`.

    Only numbers, switches and short names of methods are taken.
    """
    settings = {key: checkpoint[key] for key in ("global_step", "epoch") if isinstance(checkpoint.get(key), int)}
    for number, state in enumerate(checkpoint.get("optimizer_states") or ()):
        for group in (state.get("param_groups") or ())[:1] if isinstance(state, Mapping) else ():
            name = f"optimizer_{number}"
            settings |= {f"{name}.{key}": group[key] for key in ("lr", "betas", "weight_decay", "eps") if key in group}
    for section, names in _COPIED.items():
        found: Any = config or {}
        for part in section.split("."):
            found = found.get(part) if isinstance(found, Mapping) else None
        settings |= {f"{section}.{name}": found[name] for name in names if isinstance(found, Mapping) and name in found}
    for kind in ("optimizer_config", "loss_config", "timestep_config", "noise_config"):
        entry = ((config or {}).get("model") or {}).get("params", {}).get(kind)
        if isinstance(entry, Mapping) and isinstance(entry.get("target"), str):
            settings[f"{kind}.target"] = entry["target"]
    return {key: plain for key, value in settings.items() if (plain := _plain(value)) is not None}


def _plain(value: Any) -> Any:
    """Return a number, a switch, a short name or a list of numbers; None for others, such as a path or a reference."""
    if isinstance(value, (bool, int, float)):
        return value
    if isinstance(value, str) and len(value) <= _MOST_TEXT and not set(value) & set("/\\~$ "):
        return value
    if isinstance(value, (list, tuple)) and all(isinstance(number, (int, float)) for number in value):
        return list(value)
    return float(value) if hasattr(value, "item") and getattr(value, "ndim", 1) == 0 else None


def _kohya_version(family: Family) -> str:
    if family.key.startswith("sdxl"):
        return "sdxl_base_v1-0"
    start = "sd_v2" if family.key.startswith("sd2") else "sd_v1"
    return f"{start}_v" if family.parameterization == "v" else start


def _now() -> str:
    """Return the time in UTC, or that of SOURCE_DATE_EPOCH, which makes files reproducible."""
    given = os.environ.get("SOURCE_DATE_EPOCH", "")
    try:
        moment = time.gmtime(int(given) if given else None)
    except (ValueError, OverflowError, OSError) as error:
        raise UserError(f"SOURCE_DATE_EPOCH={given:.40} in the environment: give seconds since 1970") from error
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", moment)
