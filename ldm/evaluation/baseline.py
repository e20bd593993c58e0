"""Losses and noise predictions of a run's initial weights on its evaluation sets, kept in a file.

The file is a `.safetensors`. For each set it holds `<set>.digest`, which identifies images and timesteps; `<set>.loss`
(N, T); and `<set>.<position>` (T, C, h, w), the noise predictions ε of one image.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from ldm.checkpoint import in_memory, is_finite, load_state_dict, save_state_dict
from ldm.evaluation.denoising import Record
from ldm.evaluation.sets import EvaluationSet
from ldm.util import refuse_if


def save_start(path: Path, sets: Sequence[EvaluationSet], records: Sequence[Record], timesteps: Sequence[int]) -> None:
    """Write the `records` of `sets` to `path`, whole or not at all."""
    tensors: dict[str, Tensor] = {}
    for image_set, record in zip(sets, records, strict=True):
        tensors[f"{image_set.name}.digest"] = _digest(image_set, timesteps)
        tensors[f"{image_set.name}.loss"] = torch.from_numpy(record.loss)
        tensors |= {_eps_key(image_set, position): eps for position, eps in enumerate(record.eps)}
    save_state_dict(tensors, path)


def load_start(path: Path, sets: Sequence[EvaluationSet], timesteps: Sequence[int]) -> list[Record]:
    """Return one record per set from a file of `save_start`, memory-mapped.

    Raises:
        UserError: the file is damaged, or was made with other images or timesteps.
    """
    tensors = load_state_dict(path)
    return [_record(path, tensors, image_set, timesteps) for image_set in sets]


def _record(path: Path, tensors: Mapping[str, Tensor], image_set: EvaluationSet, timesteps: Sequence[int]) -> Record:
    digest = tensors.get(f"{image_set.name}.digest")
    refuse_if(
        digest is None or not torch.equal(digest, _digest(image_set, timesteps)),
        f"{path}: made with other images or timesteps of the set {image_set.name!r}; restore those, "
        "or remove the file to compare with the present weights from now on",
    )
    names = [f"{image_set.name}.loss", *(_eps_key(image_set, position) for position in range(len(image_set)))]
    missing = next((name for name in names if name not in tensors), None)
    refuse_if(
        missing is not None, f"{path}: lacks {missing}; remove the file to compare with the present weights from now on"
    )
    loss, *eps = (tensors[name] for name in names)
    shapes = {(*prediction.shape[:1], prediction.ndim) for prediction in eps}
    refuse_if(
        (loss.dtype, loss.shape) != (torch.float64, (len(image_set), len(timesteps)))
        or shapes != {(len(timesteps), 4)},
        f"{path}: damaged, it holds tensors of wrong shapes; "
        "remove the file to compare with the present weights from now on",
    )
    refuse_if(
        not all(is_finite(in_memory(tensor)) for tensor in (loss, *eps)),
        f"{path}: has values that are not finite; remove the file to compare with the present weights from now on",
    )
    return Record(loss.numpy(), eps)


def _eps_key(image_set: EvaluationSet, position: int) -> str:
    return f"{image_set.name}.{position:06d}"


def _digest(image_set: EvaluationSet, timesteps: Sequence[int]) -> Tensor:
    return torch.frombuffer(bytearray(image_set.digest(timesteps)), dtype=torch.uint8)
