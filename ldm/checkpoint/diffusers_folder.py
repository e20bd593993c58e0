"""Reading of folders in the layout of diffusers, as a release under this package's names."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ldm.checkpoint.diffusers_files import CONFIG, Weights, read_json, read_weights, weights_file
from ldm.checkpoint.diffusers_keys import (
    CLIP,
    OPEN_CLIP,
    PART_PREFIXES,
    RESBLOCKS_OF_SD2,
    TEXT_1,
    TEXT_2,
    UNET_PART,
    VAE_PART,
    Origin,
    Place,
    canonical,
    diffusers_origins,
    our_keys,
    resblocks,
)
from ldm.checkpoint.diffusers_schedule import check_schedule, prediction_of
from ldm.checkpoint.diffusers_sizes import check_sizes
from ldm.checkpoint.keys import COND_STAGE, FIRST_STAGE, TOWERS, UNET, UNUSED_BY_TOWERS, is_optional
from ldm.checkpoint.mapped import Joined, in_memory
from ldm.util import UserError, refuse_if

INDEX = "model_index.json"
SCHEDULER = "scheduler"
_SCHEDULER_CONFIG = "scheduler_config.json"
PARTS = (UNET_PART, VAE_PART, TEXT_1, TEXT_2)
# Classes of the parts that this package has, and those that hold something else under the same name.
_CLASSES = {
    **{UNET_PART: ("UNet2DConditionModel",), VAE_PART: ("AutoencoderKL",)},
    **dict.fromkeys((TEXT_1, TEXT_2), ("CLIPTextModel", "CLIPTextModelWithProjection", "CLIPModel")),
}
_OTHER_NETWORKS = ("transformer", "prior", "decoder", "controlnet", "movq", "vqvae", "prior_prior")
# Values of transformers' towers that no model here uses.
_UNUSED = re.compile(
    r"(?:text_model\.)?embeddings\.position_ids|vision_model\..*|(?:visual|text)_projection\.weight|logit_scale"
)
_KINDS = {"gelu": OPEN_CLIP, "quick_gelu": CLIP}  # tower by its activation


@dataclass(frozen=True)
class DiffusersFolder:
    """Folder in the layout of diffusers.

    Args:
        configs: content of the JSON files, by the part's name; `scheduler` for that of the scheduler.
        origins: places of the values, by the key of this package.
        shapes: shapes of the values in the folder, by place.
        extras: values that no model here uses, by place.
        files: files of the weights.
    """

    path: Path
    configs: Mapping[str, Mapping[str, Any]]
    origins: Mapping[str, Origin]
    shapes: Mapping[Place, tuple[int, ...]]
    extras: Mapping[Place, torch.Tensor]
    files: Sequence[Path] = ()


def is_diffusers_folder(path: Path) -> bool:
    """Return True if `path` is a folder with a model's index, with one of its parts, or of one part alone."""
    return (path / INDEX).is_file() or any((path / part).is_dir() for part in PARTS) or _is_part(path)


def _is_part(path: Path) -> bool:
    return (path / CONFIG).is_file() and "_class_name" in read_json(path / CONFIG)


def read_folder(
    path: Path, open_weights: Callable[[Path], Weights]
) -> tuple[DiffusersFolder, dict[str, torch.Tensor], tuple[str | None, bool]]:
    """Return the folder, its weights under this package's names, and the prediction and zero SNR of its schedule.

    `open_weights` returns the weights of a file. A weight that diffusers splits is joined when it is used.

    Raises:
        UserError: a part or a file is missing or damaged, contradicts its config, or is of an unknown kind.
    """
    folders = _part_folders(path)
    configs = {part: read_json(folder / CONFIG) for part, folder in folders.items()}
    _check_classes(configs, folders)
    weights: dict[str, torch.Tensor] = {}
    origins: dict[str, Origin] = {}
    shapes: dict[Place, tuple[int, ...]] = {}
    extras: dict[Place, torch.Tensor] = {}
    for part, folder in folders.items():
        file = weights_file(folder)
        found = read_weights(file, open_weights)
        shapes |= {Place(part, key): tuple(value.shape) for key, value in found.items()}
        sizes = {canonical(part, key): value.shape for key, value in found.items()}
        check_sizes(part, configs[part], sizes, folder / CONFIG)
        kind = _kind(configs[part], folder) if part in (TEXT_1, TEXT_2) else ""
        prefix = _prefix(part, TEXT_2 in folders)
        values, unused = _read_part(prefix, kind, found, file)
        weights |= {key: value for key, (value, _) in values.items()}
        origins |= {key: origin for key, (_, origin) in values.items()}
        extras |= {Place(part, key): found[key] for key in unused}
        if prefix == COND_STAGE and kind == OPEN_CLIP:
            weights |= _unused_block(weights)
    schedule = path / SCHEDULER / _SCHEDULER_CONFIG
    if schedule.is_file():
        configs[SCHEDULER] = read_json(schedule)
        check_schedule(configs[SCHEDULER], schedule)
    prediction = prediction_of(configs.get(SCHEDULER, {}), schedule)
    return DiffusersFolder(path, configs, origins, shapes, extras), weights, prediction


def _part_folders(path: Path) -> dict[str, Path]:
    """Return the folders of the parts by name."""
    if (path / INDEX).is_file():
        index = read_json(path / INDEX)
        other = next((name for name in _OTHER_NETWORKS if _names_class(index.get(name))), None)
        if other is not None and not _names_class(index.get(UNET_PART)):
            raise UserError(
                f"{path}: is a {index.get('_class_name', 'pipeline')!s:.60} with a {other}; this program takes the "
                "UNets of Stable Diffusion 1, 2 and XL"
            )
        for part in PARTS:
            refuse_if(
                _names_class(index.get(part)) and not (path / part).is_dir(),
                f"{path / part}: no such folder, but {INDEX} names it; download it too",
            )
    found = {part: path / part for part in PARTS if (path / part).is_dir()}
    if found:
        return found
    kind = read_json(path / CONFIG).get("_class_name") if (path / CONFIG).is_file() else None
    part = next((part for part in (UNET_PART, VAE_PART) if kind in _CLASSES[part]), None)
    if part is None:
        raise UserError(f"{path}: holds {f'a {kind}' if kind else 'no UNet'}; name the folder of a whole model")
    return {part: path}


def _names_class(entry: Any) -> bool:
    return isinstance(entry, list) and len(entry) == 2 and entry[1] is not None


def _check_classes(configs: Mapping[str, Mapping[str, Any]], folders: Mapping[str, Path]) -> None:
    for part, config in configs.items():
        kinds = [config["_class_name"]] if "_class_name" in config else config.get("architectures")
        kinds = kinds if isinstance(kinds, list) else []
        other = next((kind for kind in kinds if kind not in _CLASSES[part]), None)
        if other is not None:
            raise UserError(
                f"{folders[part] / CONFIG}: is of a {other!s:.60}; this program takes {' or '.join(_CLASSES[part][:2])}"
            )
    if TEXT_2 in configs and TEXT_1 not in configs:
        raise UserError(f"{folders[TEXT_2].parent}: has {TEXT_2} alone, as SDXL's refiner does; no model here is one")


def _prefix(part: str, is_xl: bool) -> str:
    if part in (TEXT_1, TEXT_2):
        return TOWERS[part == TEXT_2] if is_xl else COND_STAGE
    return {UNET_PART: UNET, VAE_PART: FIRST_STAGE}[part]


def _kind(config: Mapping[str, Any], folder: Path) -> str:
    config = config.get("text_config") if isinstance(config.get("text_config"), dict) else config
    activation = config.get("hidden_act", "quick_gelu")  # the default of transformers
    refuse_if(
        not isinstance(activation, str) or activation not in _KINDS,
        f"{folder / CONFIG}: hidden_act {activation!r:.40} is not of CLIP or OpenCLIP; "
        f"this program takes {' or '.join(_KINDS)}",
    )
    return _KINDS[activation]


def translated(part: str, found: Weights, file: Path) -> dict[str, torch.Tensor]:
    """Return the weights `found` of a UNet or an autoencoder in `file` under this package's names."""
    return {key: value for key, (value, _) in _read_part(_prefix(part, False), "", found, file)[0].items()}


def _read_part(
    prefix: str, kind: str, found: Weights, file: Path
) -> tuple[dict[str, tuple[torch.Tensor, Origin]], list[str]]:
    """Return the values of one part and their places by key of this package, and the keys that no model here uses."""
    part = PART_PREFIXES[prefix]
    names = {key: canonical(part, key) for key in found}
    if len(set(names.values())) < len(names):
        twice, _ = Counter(names.values()).most_common(1)[0]
        raise UserError(f"{file}: holds {twice} under two names; it is damaged, download it again")
    ours = our_keys(prefix, kind, names.values())
    unused = [key for key in found if ours.get(names[key]) is None]
    for key in unused:
        if not _UNUSED.fullmatch(key):
            raise UserError(f"{file}: holds {key:.100}, which no model here has; is it of another kind?")
    actual = {Place(part, names[key]): Place(part, key) for key in found if ours.get(names[key])}
    keys = {ours[place.key] for place in actual}
    result = {}
    for key, origin in diffusers_origins([*keys, *_block_after(keys)]).items():
        if key not in keys:
            continue
        missing = next((place for place in origin.places if place not in actual), None)
        if missing is not None:
            raise UserError(f"{file}: lacks {missing.key}; the file is incomplete, download it again")
        places = tuple(actual[place] for place in origin.places)
        result[key] = _value(key, origin, [found[place.key] for place in places], file), replace(origin, places=places)
    return result, unused


def _value(key: str, origin: Origin, values: Sequence[torch.Tensor], file: Path) -> torch.Tensor:
    """Return the value of `key`, whose rows are `values`."""
    first = values[0]
    if any(value.shape != first.shape or value.dtype != first.dtype for value in values) or not first.ndim:
        keys = ", ".join(place.key for place in origin.places)
        raise UserError(f"{file}: {keys} differ in shape or dtype; the file is damaged, download it again")
    value = first if len(values) == 1 else Joined(values)
    if origin.is_transposed:
        return value.T
    # The attention of an autoencoder has 1x1 convolutions here.
    return value[:, :, None, None] if value.ndim == 2 and _ATTENTION.fullmatch(key) else value


_ATTENTION = re.compile(rf"{re.escape(FIRST_STAGE)}.*\battn\w*\.(?:\d+\.)?(?:q|k|v|proj_out)\.weight")


def _block_after(keys: set[str]) -> list[str]:
    """Return a key of the block that folders of SD 2 lack."""
    start = COND_STAGE + OPEN_CLIP
    below = [key.removeprefix(start) for key in keys if key.startswith(start)]
    return [f"{start}transformer.resblocks.{resblocks(below)}.ln_1.weight"] if below else []


def stands_in(key: str, value: torch.Tensor) -> bool:
    """Return True if `value` holds zeros for weights that folders lack, because SD 2 does not use them."""
    if not key.startswith(RESBLOCKS_OF_SD2) and not is_optional(key, UNUSED_BY_TOWERS):
        return False
    return not bool(in_memory(value).any())


def _unused_block(weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the last block of SD 2's text tower, which folders lack. Its zeros make it the identity."""
    start = RESBLOCKS_OF_SD2
    last = resblocks([key.removeprefix(COND_STAGE + OPEN_CLIP) for key in weights])
    first = {key: value for key, value in weights.items() if key.startswith(f"{start}0.")}
    return {
        key.replace(f"{start}0.", f"{start}{last}.", 1): torch.zeros((), dtype=value.dtype).expand(value.shape)
        for key, value in first.items()
    }
