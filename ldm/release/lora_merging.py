"""LoRA added to the weights of a release."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ldm.checkpoint import (
    Pending,
    computed,
    converted,
    ema_key,
    is_finite,
    open_checkpoint,
)
from ldm.checkpoint.formats import precise_dtype
from ldm.checkpoint.keys import MODEL, has_part
from ldm.release.destination import About, Destination, save_release
from ldm.release.keys import check_release
from ldm.release.layer_names import Layer, layers_of
from ldm.release.lora_reading import Factors, Name, read_lora
from ldm.release.lycoris import LycorisChange
from ldm.release.model_spec import title_of
from ldm.release.opening import release_of, written_dtype
from ldm.release.recognition import log_family, shapes_of
from ldm.util import UserError, refuse_if

log = logging.getLogger(__name__)


class Lora(NamedTuple):
    """File of a LoRA, and the strength at which it is added.

    `factors` are those of the file at `path`, if they have been read.
    """

    path: Path
    strength: float = 1.0
    factors: Mapping[Name, Factors | LycorisChange] | None = None


class Change(NamedTuple):
    """Factors that change a layer, and their strength."""

    layer: Layer
    factors: Factors | LycorisChange
    strength: float

    def of(self, weight: Tensor) -> Tensor:
        """Return the changed `weight`, whose dtype is wide enough for the sum."""
        rows = slice(*self.layer.rows) if self.layer.rows else slice(None)
        old = weight[rows].flatten(1)
        change = self.factors.change(weight.dtype, weight.device)
        if self.factors.magnitude is not None:
            change = _with_magnitude(old + change, self.factors.magnitude.to(change)) - old
        result = weight.clone()
        result[rows] += (self.strength * change).view_as(weight[rows])
        return result


def _with_magnitude(weight: Tensor, magnitude: Tensor) -> Tensor:
    """Return m (W + ΔW) / ‖W + ΔW‖ of DoRA (arXiv:2402.09353, eq. 5), for `weight` W + ΔW (out, in · k).

    `magnitude` m holds one norm per row (out, 1), or one norm per input (1, in).
    """
    tiny = torch.finfo(weight.dtype).tiny
    if magnitude.shape[1] == 1:
        return weight * (magnitude / weight.norm(dim=1, keepdim=True).clamp(min=tiny))
    by_input = weight.unflatten(1, (magnitude.shape[1], -1))  # (out, in, k)
    norm = by_input.norm(dim=(0, 2), keepdim=True).clamp(min=tiny)  # (1, in, 1)
    return (by_input * (magnitude[..., None] / norm)).flatten(1)


def changes_of(
    loras: Iterable[Lora], weights: Mapping[str, Tensor | Pending], source: str | Path
) -> dict[str, list[Change]]:
    """Return the changes that `loras` make to `weights`, by key, in the order of the files.

    EMA weights change as the weights do. `source` names the weights in messages.

    Raises:
        UserError: a file cannot be read, or a layer of it matches nothing or has another shape.
    """
    shapes = shapes_of(weights)
    names = {(layer.part, name): layer for layer in layers_of(shapes) for name in layer.flat_names}
    result: dict[str, list[Change]] = defaultdict(list)
    for path, strength, given in loras:
        factors = read_lora(path) if given is None else given
        unmatched = [name for name in factors if name not in names]
        if unmatched:
            refuse_if(
                not has_part(shapes, MODEL), f"{source}: has only EMA weights; a LoRA needs the weights themselves"
            )
            raise UserError(
                f"{path}: {len(unmatched)} of {len(factors)} layers match nothing in {source}, the first is "
                f"{unmatched[0][1]} of the {unmatched[0][0]}; is it a LoRA of another family?"
            )
        for name, found in factors.items():
            layer = names[name]
            _check_shape(found, layer, f"{path}: {name[1]}", source)
            for key in (layer.key, ema_key(layer.key) if layer.key.startswith(MODEL) else ""):
                if key in shapes and strength:  # the sum with 0 would turn -0 to 0
                    result[key].append(Change(layer, found, strength))
        log.info("%s: %d layers, added with strength %g", path, len(factors), strength)
    return result


def _check_shape(factors: Factors | LycorisChange, layer: Layer, where: str, source: str | Path) -> None:
    own = layer.shape[0], torch.Size(layer.shape[1:]).numel()
    if factors.shape != own:
        raise UserError(
            f"{where}: changes {factors.shape[0]}×{factors.shape[1]} values, but {layer.key} of {source} has "
            f"{own[0]}×{own[1]}; is it a LoRA of another family?"
        )
    if _without_ones(factors.kernel) not in ((own[1],), _without_ones(layer.shape[1:])):  # values in another order
        raise UserError(
            f"{where}: has a kernel of shape {factors.kernel}, but {layer.key} of {source} has "
            f"{tuple(layer.shape[1:])}; is it a LoRA of another family?"
        )
    magnitude = factors.magnitude
    if magnitude is not None and tuple(magnitude.shape) not in ((own[0], 1), (1, layer.shape[1])):
        raise UserError(f"{where}: has a magnitude of shape {tuple(magnitude.shape)}, which does not fit {layer.key}")


def _without_ones(shape: Sequence[int]) -> tuple[int, ...]:
    return tuple(side for side in shape if side != 1)


def with_loras(
    weights: Mapping[str, Tensor | Pending], loras: Sequence[Lora], source: str | Path, half: bool = False
) -> dict[str, Tensor | Pending]:
    """Return `weights` with `loras` added, each computed when it is written, in its own dtype.

    With `half`, floating-point weights become float16; the noise schedule keeps its dtype.

    Raises:
        UserError: as `changes_of`, or a changed weight is quantised. Computing a `Pending` raises if its value is not
            finite.
    """
    changes = changes_of(loras, weights, source)
    result: dict[str, Tensor | Pending] = {}
    for key, value in weights.items():
        if key in changes and not value.dtype.is_floating_point:
            raise UserError(f"{source}: {key} is {value.dtype}; dequantise it and save it as floating-point numbers")
        dtype = written_dtype(key, value.dtype, half)
        is_same = key not in changes and dtype == value.dtype
        result[key] = value if is_same else _pending(key, value, changes.get(key, ()), dtype)
    return result


def _pending(key: str, weight: Tensor | Pending, changes: Sequence[Change], dtype: torch.dtype) -> Pending:
    def compute() -> Tensor:
        return _sum(key, computed(weight), changes, dtype)

    return Pending(tuple(weight.shape), dtype, compute)


def _sum(key: str, weight: Tensor, changes: Sequence[Change], dtype: torch.dtype) -> Tensor:
    wide = converted(weight, precise_dtype(weight.dtype))
    for change in changes:
        wide = change.of(wide)
    result = converted(wide, dtype)
    refuse_if(
        not is_finite(result) and is_finite(weight),
        f"{key} has values too large for {dtype}, or not finite; use a lower strength, or another file",
    )
    return result


def add_lora_files(
    release: Path, out: str | Path | Destination, loras: Sequence[Lora], half: bool = False, vae: Path | None = None
) -> None:
    """Add `loras` to a release, and write the result to `out`, with the names and metadata of the release.

    The file `vae`, if given, replaces its autoencoder.

    Raises:
        UserError: a file cannot be read, or a LoRA does not fit the release. Nothing is written in this case.
    """
    to = out if isinstance(out, Destination) else Destination.of(out)
    with to.locked((release, *(lora.path for lora in loras), *((vae,) if vae else ()))):
        checkpoint = open_checkpoint(release)
        check_release(checkpoint.content, release)
        opened = release_of(checkpoint, release, vae)
        log_family(opened.shapes, release, opened.predicts)
        mixed = title_of(opened.metadata, release), *(lora.path.stem for lora in loras)
        save_release(opened, with_loras(opened.weights, loras, release, half), to, About(merged_from=mixed))


@torch.no_grad()
def add_loras(model: nn.Module, loras: Sequence[Lora], source: str | Path) -> None:
    """Add `loras` to the weights of `model` in place; `source` names the model in messages. See `changes_of`."""
    own = model.state_dict()
    for key, changes in changes_of(loras, own, source).items():
        own[key].copy_(_sum(key, own[key], changes, own[key].dtype))
