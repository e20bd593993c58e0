"""Extraction of a LoRA: the difference of two releases of one model as low-rank factors, in the format of kohya.

The best factors of rank r are those of the singular value decomposition (Eckart and Young 1936). The energy of a change
is ‖ΔW‖², its squared Frobenius norm.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ldm.checkpoint import converted, in_memory, is_finite, is_optional
from ldm.checkpoint.diffusers_folder import stands_in
from ldm.checkpoint.keys import FIRST_STAGE, MODEL, has_part
from ldm.evaluation.report import aligned
from ldm.release.layer_names import Layer, kohya_names, layers_of
from ldm.release.lora_writing import kohya_tensors, lora_to_write, save_lora
from ldm.release.mixture import check_same_model
from ldm.release.opening import Release, open_release
from ldm.release.recognition import find_family
from ldm.util import refuse_if

log = logging.getLogger(__name__)

_SMALL = 256  # side up to which the whole decomposition is as fast as a random projection
_SPARE = 16  # columns of the random projection beyond the rank (arXiv:0909.4061, section 4.2)
_ITERATIONS = 4  # power iterations, for spectra that fall slowly (section 4.5)
_FIRST_RANK = 32  # of the search for a share of the energy


@dataclass(frozen=True)
class Target:
    """Rank of the factors: `rank`, or the least rank that keeps the share `energy` of each layer's change."""

    rank: int | None = None
    energy: float | None = None


class Extracted(NamedTuple):
    """Layer of an extraction: its rank, and the energy of the change and of what the factors leave out."""

    layer: Layer
    rank: int
    energy: float
    lost: float


@dataclass(frozen=True)
class Extraction:
    """Layers of an extraction, and what the LoRA does not hold.

    Args:
        others: energies of changed weights that a LoRA does not hold, by key.
        autoencoder: True if the autoencoders differ.
    """

    layers: Sequence[Extracted]
    others: dict[str, float]
    autoencoder: bool

    def table(self) -> str:
        """Return a line per block: its layers, their ranks, and the energy kept."""
        blocks: dict[str, list[Extracted]] = defaultdict(list)
        for found in self.layers:
            blocks[found.layer.block].append(found)
        rows = [(name, *_described(found)) for name, found in (*blocks.items(), ("all", self.layers))]
        return aligned([("block", "layers", "rank", "energy kept"), *rows])

    def left_out(self) -> list[str]:
        """Return a line for each kind of change that the LoRA does not hold."""
        lines = []
        if self.others:
            lost = sum(self.others.values())
            share = lost / (lost + sum(found.energy for found in self.layers))
            lines.append(
                f"{len(self.others)} changed weights are not in the LoRA, {share:.2%} of the whole change: "
                f"{', '.join(list(self.others)[:3])}{', …' if len(self.others) > 3 else ''}"
            )
        if self.autoencoder:
            lines.append("the autoencoders differ; a LoRA holds none: give the tuned one to --vae")
        return lines


def _described(found: Sequence[Extracted]) -> tuple[str, str, str]:
    ranks = sorted({each.rank for each in found})
    kept = 1 - sum(each.lost for each in found) / sum(each.energy for each in found)
    return str(len(found)), f"{ranks[0]}" if len(ranks) == 1 else f"{ranks[0]}-{ranks[-1]}", f"{max(kept, 0):.4f}"


def extract_files(
    base: Path,
    tuned: Path,
    out: Path,
    target: Target,
    half: bool = False,
    all_layers: bool = False,
    device: str | torch.device = "cpu",
) -> Extraction:
    """Write the difference of the releases `tuned` and `base` to `out` as a LoRA, and return its record.

    Layers with the same weights are left out. With `half`, the factors are float16.

    Args:
        all_layers: take the UNet's first and last convolution and its embeddings too.
        device: of the decompositions.

    Raises:
        UserError: a file cannot be read, the releases are not of one model, or no layer differs. Nothing is written in
            this case.
    """
    with lora_to_write(out, (base, tuned)):
        before, after = open_release(base), open_release(tuned)
        check_same_model(before, after)
        refuse_if(
            not has_part(before.weights, MODEL), f"{base}: has only EMA weights; a LoRA needs the weights themselves"
        )
        layers, found = extract(before, after, target, torch.float16 if half else torch.float32, all_layers, device)
        rank = str(target.rank) if target.energy is None else "Dynamic"  # as kohya's tools write for several ranks
        family = find_family(before.shapes, parameterization=before.predicts or after.predicts, certain=True)
        save_lora(layers, out, family, rank)
    return found


def extract(
    before: Release, after: Release, target: Target, dtype: torch.dtype, all_layers: bool, device: str | torch.device
) -> tuple[dict[str, dict[str, Tensor]], Extraction]:
    """Return the layers of a LoRA file with the change from `before` to `after`, and the record of the extraction."""
    layers = [layer for layer in layers_of(before.shapes) if all_layers or not layer.is_outside]
    names = kohya_names(layers, before.weights)
    factors: dict[str, dict[str, Tensor]] = {}
    found = []
    for layer, change in _changes(layers, before, after, device):
        down, up = factors_of(change.flatten(1), target)
        down, up = down.reshape(-1, *change.shape[1:]).to(dtype), up.to(dtype)
        lost = _energy(change.flatten(1) - up.float() @ down.float().flatten(1))
        found.append(Extracted(layer, len(down), _energy(change), lost))
        if change.ndim == 4:
            up = up[:, :, None, None]
        factors[names[layer]] = kohya_tensors(names[layer], down, up, float(len(down)), dtype)
    refuse_if(not found, f"{after.path}: has the weights of {before.path} in all layers that a LoRA holds")
    return factors, Extraction(found, *_others(layers, before, after))


def factors_of(change: Tensor, target: Target) -> tuple[Tensor, Tensor]:
    """Return A (r, in) and B (out, r) with B A ≈ `change` (out, in), both of the same size."""
    side = min(change.shape)
    energy = change.square().sum()
    wanted = min(target.rank or _FIRST_RANK, side)
    while True:
        left, values, right = _decomposed(change, wanted)
        kept = values.square().cumsum(0)
        if target.energy is None:
            rank = wanted
            break
        enough = (kept >= target.energy * energy).nonzero()
        if len(enough) or len(values) == side:
            rank = int(enough[0]) + 1 if len(enough) else side
            break
        wanted = min(2 * wanted, side)
    root = values[:rank].clamp(min=0).sqrt()
    return root[:, None] * right[:, :rank].T, left[:, :rank] * root


def _decomposed(change: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return at least `rank` singular vectors and values U, S, V of `change`, by a random projection if it is large."""
    side = min(change.shape)
    if side <= _SMALL or 4 * (rank + _SPARE) > side:
        left, values, right = torch.linalg.svd(change, full_matrices=False)
        return left, values, right.T
    with torch.random.fork_rng(devices=[change.device] if change.is_cuda else []):
        torch.manual_seed(0)  # the same file each time
        return torch.svd_lowrank(change, q=rank + _SPARE, niter=_ITERATIONS)


def _changes(
    layers: Sequence[Layer], before: Release, after: Release, device: str | torch.device
) -> Iterator[tuple[Layer, Tensor]]:
    """Yield the layers that differ, and their changes in float32."""
    for layer in layers:
        change = _difference(layer.key, before, after)
        if layer.rows:
            change = change[slice(*layer.rows)]
        refuse_if(
            not is_finite(change),
            f"{layer.key}: differs by values that are not finite; is {after.path} damaged or diverged?",
        )
        if change.any():
            yield layer, change.to(device)


def _difference(key: str, before: Release, after: Release) -> Tensor:
    """Return the change of a weight in float32. The rounding of the release of the coarser dtype is none."""
    values = [in_memory(release.weights[key]) for release in (before, after)]
    old, new = (converted(value, torch.float32) for value in values)
    if stands_in(key, old) or stands_in(key, new):
        return torch.zeros_like(old)
    if values[0].dtype == values[1].dtype:
        return new - old
    coarse = max((value.dtype for value in values), key=lambda dtype: torch.finfo(dtype).eps)
    rounded = [converted(converted(value, coarse), torch.float32) for value in values]
    return torch.where(rounded[0] == rounded[1], 0, new - old)


def _energy(change: Tensor) -> float:
    return torch.linalg.vector_norm(change, dtype=torch.float64).square().item()


def _others(layers: Sequence[Layer], before: Release, after: Release) -> tuple[dict[str, float], bool]:
    """Return the energies of the changed weights that are in none of `layers`, and True if the autoencoders differ."""
    held = {layer.key for layer in layers}
    others, autoencoder = {}, False
    for key, value in before.weights.items():
        if key in held or is_optional(key) or not value.is_floating_point():
            continue
        energy = _energy(_difference(key, before, after))
        if energy and key.startswith(FIRST_STAGE):
            autoencoder = True
        elif energy:
            others[key] = energy
    return others, autoencoder
