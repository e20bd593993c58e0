"""Folders in the layout of diffusers, made from tiny releases, and changes of them."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from torch import Tensor

from ldm.checkpoint import in_memory, load_state_dict, save_checkpoint, save_state_dict
from ldm.release.destination import Destination, save_release
from ldm.release.opening import open_release
from tests.tiny_families import write_tiny

UNET, VAE, TEXT = (
    "unet/diffusion_pytorch_model.safetensors",
    "vae/diffusion_pytorch_model.safetensors",
    "text_encoder/model.safetensors",
)


def write_tiny_folder(key: str, folder: Path) -> tuple[Path, Path]:
    """Write a release of the family `key` as a file and as a folder. Return the folder and the config."""
    release, config = write_tiny(key, folder)
    opened = open_release(release)
    save_release(opened, opened.weights, Destination.of(f"{folder}/{key}/", config))
    return folder / key, config


def copied(source: Path, target: Path) -> Path:
    """Copy a folder by hard links. Its files must be replaced, not changed."""
    return shutil.copytree(source, target, copy_function=os.link)


def rewrite(path: Path, weights: dict[str, Tensor]) -> None:
    """Replace a file of weights, a `.safetensors` or a `.bin`."""
    path.unlink(missing_ok=True)
    weights = {key: in_memory(value).clone() for key, value in weights.items()}
    if path.suffix == ".bin":
        save_checkpoint(weights, path)
    else:
        save_state_dict(weights, path)


def edit_weights(path: Path, **changes: Tensor | None) -> None:
    """Replace values of a file, by keys with `__` for dots; None removes one."""
    weights: dict[str, Any] = load_state_dict(path)
    weights |= {key.replace("__", "."): value for key, value in changes.items()}
    rewrite(path, {key: value for key, value in weights.items() if value is not None})


def edit_json(path: Path, **changes: Any) -> None:
    """Replace entries of a JSON file."""
    content = {**json.loads(path.read_text()), **changes} if path.exists() else changes
    path.unlink(missing_ok=True)
    path.write_text(json.dumps(content))


def shard(path: Path, count: int = 2) -> Path:
    """Divide a file of weights into several with an index, and return the index."""
    weights = load_state_dict(path)
    places = {}
    for number in range(count):
        name = f"{path.stem}-{number + 1:05}-of-{count:05}{path.suffix}"
        part = dict(list(weights.items())[number::count])
        rewrite(path.with_name(name), part)
        places |= dict.fromkeys(part, name)
    path.unlink()
    index = path.with_name(f"{path.name}.index.json")
    index.write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return index
