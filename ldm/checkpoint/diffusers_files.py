"""Files of one part of a diffusers folder: its config, and its weights in one file or in several with an index."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from ldm.files import read_at_most
from ldm.util import UserError, refuse_if

Weights = dict[str, torch.Tensor]

CONFIG = "config.json"
_MOST_BYTES = 1 << 26  # of a config or an index
_SHARD = r"-\d+-of-\d+"
_WEIGHTS = re.compile(
    rf"(?:diffusion_pytorch_model|pytorch_model|model)(?:\.(?P<variant>[\w-]+?))?(?P<shard>{_SHARD})?"
    rf"(?:\.(?P<later>[\w-]+))?\.(?P<format>safetensors|bin)(?:\.index(?:\.(?P<of_index>[\w-]+))?\.json)?"
)
_HALF = "fp16"  # the variant that is taken if the folder has no plain files
_FORMATS = ("safetensors", "bin")


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in the file at `path`.

    Raises:
        UserError: the file is missing, or holds something else.
    """
    try:
        content = json.loads(read_at_most(path, _MOST_BYTES))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UserError(f"{path}: no such file; copy it from the model's folder") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: is not valid JSON ({error!s:.80}); download or copy it again") from error
    refuse_if(
        not isinstance(content, dict),
        f"{path}: holds {type(content).__name__}, not a JSON object; download or copy it again",
    )
    return content


def weights_file(folder: Path) -> Path:
    """Return the file of weights in `folder`, or the index of several: plain ones first, safetensors first.

    Raises:
        UserError: the folder has none, or only variants of which none is `fp16`.
    """
    found: dict[tuple[str, str], Path] = {}
    for path in sorted(folder.iterdir()):
        match = _WEIGHTS.fullmatch(path.name)
        is_index = path.suffix == ".json"
        if match and not match["shard"]:
            variant = match["variant"] or match["later"] or match["of_index"] or ""
            place = variant, match["format"]
            if place not in found or is_index:  # an index takes precedence, as in diffusers
                found[place] = path
    variants = sorted({variant for variant, _ in found})
    shard = next((path.name for path in sorted(folder.iterdir()) if re.search(_SHARD, path.name)), None)
    refuse_if(
        not variants and shard is not None,
        f"{folder}: has {shard}, and no index of its files, such as model.safetensors.index.json",
    )
    refuse_if(not variants, f"{folder}: holds no weights of diffusers, such as diffusion_pytorch_model.safetensors")
    variant = next((name for name in ("", _HALF) if name in variants), variants[0] if len(variants) == 1 else None)
    refuse_if(
        variant is None, f"{folder}: holds the variants {', '.join(variants)}; rename one to a name without variant"
    )
    return next(found[variant, kind] for kind in _FORMATS if (variant, kind) in found)


def read_weights(path: Path, open_weights: Callable[[Path], Weights]) -> Weights:
    """Return the weights in the file at `path`, or in the files of the index at `path`.

    Raises:
        UserError: a file is missing or damaged, or the index names a file outside of the folder or a missing key.
    """
    if path.suffix != ".json":
        return open_weights(path)
    places = read_json(path).get("weight_map")
    refuse_if(
        not isinstance(places, Mapping) or not all(isinstance(name, str) for name in places.values()),
        f"{path}: has no weight_map; download or copy it again",
    )
    shards = {name: _open_shard(path, name, open_weights) for name in dict.fromkeys(places.values())}
    for key, name in places.items():
        if key not in shards[name]:
            raise UserError(f"{path}: names {key:.100} in {name}, which lacks it; download both again")
    return {key: shards[name][key] for key, name in places.items()}


def _open_shard(index: Path, name: str, open_weights: Callable[[Path], Weights]) -> Weights:
    refuse_if(
        Path(name).name != name or name in ("", ".", ".."),
        f"{index}: names the file {name!r:.100}, which is not in its folder; download the index again",
    )
    refuse_if(
        not (index.parent / name).exists(),
        f"{index.parent / name}: no such file, but {index.name} names it; download it too",
    )
    return open_weights(index.parent / name)
