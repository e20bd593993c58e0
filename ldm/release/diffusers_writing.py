"""Writing of releases as folders in the layout of diffusers."""

from __future__ import annotations

import json
import logging
import shutil
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ldm.checkpoint import Pending, computed, is_optional, save_state_dict
from ldm.checkpoint.diffusers_files import CONFIG, read_json
from ldm.checkpoint.diffusers_folder import INDEX, PARTS, SCHEDULER, DiffusersFolder
from ldm.checkpoint.diffusers_keys import (
    PART_PREFIXES,
    RESBLOCKS_OF_SD2,
    TEXT_1,
    TEXT_2,
    VAE_PART,
    Origin,
    Place,
    diffusers_origins,
)
from ldm.config.load import load_config
from ldm.folders import atomic_folder, check_replaceable
from ldm.modules.encoders.tokenizer import write_vocabulary
from ldm.release.diffusers_config import folder_configs, stated_prediction
from ldm.release.families import Family
from ldm.release.opening import Release
from ldm.release.recognition import find_family
from ldm.util import UserError, located, refuse_if

log = logging.getLogger(__name__)

Value = torch.Tensor | Pending

_FILES = dict.fromkeys(PARTS, "diffusion_pytorch_model.safetensors") | dict.fromkeys(
    (TEXT_1, TEXT_2), "model.safetensors"
)
_DTYPES = ("torch_dtype", "dtype")  # entries of transformers' configs


def check_folder(path: Path) -> None:
    """Raise `UserError` unless a folder of diffusers can be written to `path`."""
    check_replaceable(path, INDEX)


def write_folder(
    release: Release,
    weights: Mapping[str, Value],
    path: Path,
    metadata: Mapping[str, str],
    family: Family | None,
    predicts: tuple[str, bool] | None = None,
    config: str | Path | None = None,
) -> int:
    """Write `weights` of the model of `release` to the folder `path`, and return the number of values.

    Configs, tokenizers and other parts are those of the release if it is a folder. Otherwise they follow from `config`,
    by default the config of `family`, which is None if unknown.

    Args:
        metadata: of the file with the UNet.
        predicts: prediction and zero SNR, if they differ from those of the release.

    Raises:
        UserError: `path` holds other files, or diffusers has no such model. Nothing is written in this case.
    """
    check_folder(path)
    folder = release.folder
    origins = diffusers_origins(weights) if folder is None else folder.origins
    values = _by_place(weights, origins, folder)
    parts: dict[str, dict[str, Value]] = defaultdict(dict)
    for place, value in values.items():
        parts[place.part][place.key] = value
    configs = _configs(release, parts, family, predicts, config)
    left_out = [key for key in weights if key not in origins]
    lost = next((key for key in left_out if _is_needed(key)), None)
    refuse_if(lost is not None, f"{path}: the folder has no place for {lost}; write a .safetensors file instead")
    if left_out and folder is None:
        log.info("%d values left out, which folders of diffusers do not hold, such as %s", len(left_out), left_out[0])
    with atomic_folder(path) as temporary:
        if folder is not None:
            _copy_others(folder.path, temporary)
        else:
            for part in parts:
                if part in (TEXT_1, TEXT_2):
                    is_clip = configs[f"{part}/{CONFIG}"]["hidden_act"] == "quick_gelu"
                    write_vocabulary(temporary / part.replace("text_encoder", "tokenizer"), pads_with_end=is_clip)
        for name, content in configs.items():
            (temporary / name).parent.mkdir(exist_ok=True)
            (temporary / name).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        for part, found in parts.items():
            save_state_dict(found, temporary / part / _FILES[part], metadata=metadata if part == PARTS[0] else None)
    return len(values)


def _is_needed(key: str) -> bool:
    """Return True if a model needs the value `key`. A text tower of SD 2 does not need its last block."""
    return key.startswith(tuple(PART_PREFIXES)) and not (is_optional(key) or key.startswith(RESBLOCKS_OF_SD2))


def shapes_by_part(weights: Mapping[str, Value]) -> dict[str, dict[str, tuple[int, ...]]]:
    """Return the shapes that a folder of `weights` under this package's names has, by part and key."""
    shapes: dict[str, dict[str, tuple[int, ...]]] = defaultdict(dict)
    for place, value in _by_place(weights, diffusers_origins(weights), None).items():
        shapes[place.part][place.key] = tuple(value.shape)
    return dict(shapes)


def _by_place(
    weights: Mapping[str, Value], origins: Mapping[str, Origin], folder: DiffusersFolder | None
) -> dict[Place, Value]:
    """Return the values of a folder by place. Those that no model uses are those of `folder`."""
    result: dict[Place, Value] = {}
    for key, origin in origins.items():
        for number, place in enumerate(origin.places if key in weights else ()):
            shape = _shape(weights[key], origin) if folder is None else folder.shapes[place]
            result[place] = _piece(weights[key], origin, number, shape)
    return result if folder is None else {**result, **folder.extras}


def _shape(value: Value, origin: Origin) -> tuple[int, ...]:
    """Return the shape that diffusers has for a piece of `value`."""
    shape, (part, key) = tuple(value.shape), origin.places[0]
    if origin.is_transposed:
        return shape[::-1]
    if part == VAE_PART and ".attentions." in key:  # linear layers there, 1x1 convolutions here
        return shape[:2]
    return shape[0] // len(origin.places), *shape[1:]


def _piece(value: Value, origin: Origin, number: int, shape: tuple[int, ...]) -> Value:
    if len(origin.places) == 1 and not origin.is_transposed and tuple(value.shape) == shape:
        return value

    def compute() -> torch.Tensor:
        whole = computed(value)
        if origin.is_transposed:
            return whole.T
        rows = len(whole) // len(origin.places)
        return whole[number * rows : (number + 1) * rows].reshape(shape)

    return Pending(shape, value.dtype, compute)


def _configs(
    release: Release,
    parts: Mapping[str, Mapping[str, Value]],
    family: Family | None,
    predicts: tuple[str, bool] | None,
    config: str | Path | None,
) -> dict[str, Mapping[str, Any]]:
    """Return the JSON files to write, by name."""
    if release.folder is not None:
        return _changed_configs(release.folder, parts, predicts)
    if config is not None:
        chosen = load_config([config])
        stated = chosen.model.params.get("parameterization", release.predicts or "eps")
        told = stated, bool(chosen.model.params.get("rescale_betas_zero_snr", False))
    elif family is not None:
        chosen, told = load_config([family.config]), (family.parameterization, family.zero_snr)
    elif find_family(release.shapes) is not None:
        raise UserError(
            f"{release.path}: SD 2 predicts eps or v, which the keys do not tell, and a folder does; name "
            "--config stable_diffusion_v2_base.yaml or stable_diffusion_v2_768_v.yaml, or write a .safetensors file"
        )
    else:
        raise UserError(
            f"{release.path}: is of no family of full size, and a folder's configs need the number of attention heads; "
            "name the config of the release with --config, or write a .safetensors file"
        )
    shapes = {part: {key: tuple(value.shape) for key, value in found.items()} for part, found in parts.items()}
    with located(str(release.path)):
        return folder_configs(chosen, shapes, *(predicts or told))


def _changed_configs(
    folder: DiffusersFolder, parts: Mapping[str, Mapping[str, Value]], predicts: tuple[str, bool] | None
) -> dict[str, Mapping[str, Any]]:
    """Return the configs of `folder` that another prediction or another dtype changes, and those of its parts."""
    result: dict[str, Mapping[str, Any]] = {}
    for part, found in parts.items():
        dtype = str(next(iter(found.values())).dtype).removeprefix("torch.")
        config = folder.configs[part]
        result[f"{part}/{CONFIG}"] = {**config, **{key: dtype for key in _DTYPES if key in config}}
    if predicts is not None:
        prediction, zero_snr = predicts
        changed = {"prediction_type": stated_prediction(prediction), "rescale_betas_zero_snr": zero_snr}
        result[f"{SCHEDULER}/scheduler_config.json"] = {**folder.configs.get(SCHEDULER, {}), **changed}
    return result


def _copy_others(source: Path, target: Path) -> None:
    """Copy the folder's index, and those of the parts that it names that hold no weights of this package."""
    refuse_if(
        not (source / INDEX).is_file(),
        f"{source}: has no {INDEX}, which a whole folder needs; copy it from the base model",
    )
    shutil.copyfile(source / INDEX, target / INDEX)
    named = [name for name, entry in read_json(source / INDEX).items() if isinstance(entry, list)]
    for name in named:
        if name in (*PARTS, "", "..") or Path(name).name != name or not (source / name).is_dir():
            continue
        (target / name).mkdir()
        for file in sorted((source / name).iterdir()):
            if file.is_file():
                shutil.copyfile(file, target / name / file.name)
