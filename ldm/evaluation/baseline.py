"""What the weights that a run began with make of its evaluation sets, kept in a file.

A `.safetensors` with, for each set: `<set>.digest`, what tells other pictures and timesteps apart; `<set>.loss` (N, T);
and `<set>.<position>` (T, C, h, w), each picture's ε.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from ldm.checkpoint import load_state_dict, save_state_dict
from ldm.evaluation.denoising import Record
from ldm.evaluation.sets import EvaluationSet
from ldm.util import UserError


def save_start(path: Path, sets: Sequence[EvaluationSet], records: Sequence[Record], timesteps: Sequence[int]) -> None:
    """Write the `records` of `sets` to `path`, whole or not at all."""
    tensors: dict[str, Tensor] = {}
    for pictures, found in zip(sets, records, strict=True):
        tensors[f"{pictures.name}.digest"] = _digest(pictures, timesteps)
        tensors[f"{pictures.name}.loss"] = torch.from_numpy(found.loss)
        tensors |= {_eps_key(pictures, position): eps for position, eps in enumerate(found.eps)}
    save_state_dict(tensors, path)


def load_start(path: Path, sets: Sequence[EvaluationSet], timesteps: Sequence[int]) -> list[Record]:
    """What `save_start` wrote, memory-mapped.

    Raises:
        UserError: the file is damaged, or is that of other pictures or timesteps.
    """
    tensors = load_state_dict(path)
    return [_record(path, tensors, pictures, timesteps) for pictures in sets]


def _record(path: Path, tensors: Mapping[str, Tensor], pictures: EvaluationSet, timesteps: Sequence[int]) -> Record:
    digest = tensors.get(f"{pictures.name}.digest")
    if digest is None or not torch.equal(digest, _digest(pictures, timesteps)):
        raise UserError(
            f"{path}: set {pictures.name!r} has other pictures or timesteps than when the run began; take those, "
            "or remove the file to go on from the present weights as the base"
        )
    names = [f"{pictures.name}.loss", *(_eps_key(pictures, position) for position in range(len(pictures)))]
    lacking = next((name for name in names if name not in tensors), None)
    if lacking is not None:
        raise UserError(f"{path}: lacks {lacking}; remove the file to go on from the present weights as the base")
    loss, *eps = (tensors[name] for name in names)
    shapes = {(*found.shape[:1], found.ndim) for found in eps}
    if (loss.dtype, loss.shape) != (torch.float64, (len(pictures), len(timesteps))) or shapes != {(len(timesteps), 4)}:
        raise UserError(f"{path}: damaged, its shapes are of no evaluation; remove the file to make it anew")
    return Record(loss.numpy(), eps)


def _eps_key(pictures: EvaluationSet, position: int) -> str:
    return f"{pictures.name}.{position:06d}"


def _digest(pictures: EvaluationSet, timesteps: Sequence[int]) -> Tensor:
    return torch.frombuffer(bytearray(pictures.digest(timesteps)), dtype=torch.uint8)
