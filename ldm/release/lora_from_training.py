"""LoRA of a training: its factors in a training checkpoint, for a release or as a file in the format of kohya."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm.checkpoint import ema_key, in_memory, is_finite, open_checkpoint, weights_of
from ldm.checkpoint.keys import ALPHA, DOWN, PREDICTION, UNET, UP
from ldm.release.keys import check_training_checkpoint
from ldm.release.layer_names import UNET_PART, flat, kohya_names, layers_of
from ldm.release.lora_merging import Lora
from ldm.release.lora_reading import Factors, Name, factors_from
from ldm.release.lora_writing import kohya_tensors, lora_to_write, save_lora
from ldm.release.opening import training_weights
from ldm.release.recognition import find_family, shapes_of
from ldm.util import UserError, refuse_if

log = logging.getLogger(__name__)


def trained_loras(content: dict[str, Any], path: Path, kind: str | None, strength: float = 1.0) -> list[Lora]:
    """Return the LoRA in the `content` of the training checkpoint at `path`, at `strength`; none if it has none.

    `kind` is `ema` for the moving average of the factors, `raw` for the factors, and None for `ema` if there is one.

    Raises:
        UserError: `kind` is `ema` and there is no moving average, or the factors are incomplete or not finite.
    """
    weights = weights_of(content, path)
    ends = [key for key in weights if key.endswith(DOWN)]
    if not ends:
        return []
    has_ema = ema_key(ends[0]) in weights
    refuse_if(
        kind == "ema" and not has_ema, f"{path}: has no moving average of its LoRA (use_ema: False); use --weights raw"
    )
    averaged = has_ema and kind != "raw"
    log.info("%s: factors of its LoRA, %s", path, "moving average (ema)" if averaged else "raw weights")
    factors = {}
    for end in ends:
        layer = end.removesuffix(DOWN)
        found = _factors(weights, layer, averaged, f"{path}: {layer}")
        factors[UNET_PART, flat(layer.removeprefix(UNET))] = found
    return [Lora(path, strength, factors)]


def _factors(weights: Mapping[str, Tensor], layer: str, averaged: bool, where: str) -> Factors:
    tensors = {}
    for name, end in (("down", DOWN), ("up", UP), ("alpha", ALPHA)):
        key = layer + end
        key = ema_key(key) if averaged and name != "alpha" else key
        refuse_if(key not in weights, f"{where}: the checkpoint lacks {key}; it is damaged, use another one")
        tensors[name] = in_memory(weights[key])
        refuse_if(
            tensors[name].is_complex(), f"{where}: {key} has complex numbers; it is damaged, use another checkpoint"
        )
        refuse_if(
            not is_finite(tensors[name]),
            f"{where}: its factors are not finite, because the training diverged; use an older checkpoint",
        )
    return factors_from(tensors, None, where)


def write_trained_lora(training: Path, out: Path, kind: str | None = None, half: bool = False) -> None:
    """Write the LoRA in the checkpoint `training` to `out`. With `half`, the factors are float16.

    `kind` is as in `trained_loras`.

    Raises:
        UserError: the file cannot be read, or is no training of a LoRA. Nothing is written in this case.
    """
    with lora_to_write(out, (training,)):
        content = open_checkpoint(training).content
        check_training_checkpoint(content, training, weights_alone=True)
        loras = trained_loras(content, training, kind)
        refuse_if(
            not loras,
            f"{training}: trains weights, and no LoRA; make a release of it with tools/merge_release.py, and give "
            "that as --tuned, beside --base",
        )
        factors = loras[0].factors or {}
        shapes = shapes_of(training_weights(content, training))
        layers = _named(factors, shapes, torch.float16 if half else torch.float32, training)
        family = find_family(shapes, parameterization=content.get(PREDICTION), certain=True)
        first = next(iter(factors.values()))
        rank = len(first.down)
        save_lora(layers, out, family, str(rank), f"{first.scale * rank:g}")


def _named(
    factors: Mapping[Name, Factors], shapes: Any, dtype: torch.dtype, training: Path
) -> dict[str, dict[str, Tensor]]:
    """Return the layers of a LoRA file with `factors`, for a model with weights of these `shapes`."""
    layers = {(layer.part, flat(layer.paths[0])): layer for layer in layers_of(shapes)}
    names = kohya_names(layers.values(), shapes)
    named: dict[str, dict[str, Tensor]] = {}
    for name, found in factors.items():
        if name not in layers:
            raise UserError(f"{training}: {name[1]} has factors, and no weight; it is damaged, use another checkpoint")
        kohya = names[layers[name]]
        named[kohya] = kohya_tensors(kohya, found.down, found.up, found.scale * len(found.down), dtype)
    outside = sum(layers[name].is_outside for name in factors)
    if outside:
        log.warning("%d layers lie outside of the UNet's blocks; older programs refuse a file with them", outside)
    return named
