"""Released checkpoints as models that are ready to use."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig

from ldm.checkpoint import load_into, load_state_dict
from ldm.checkpoint.keys import EMA, has_part
from ldm.config.load import build_model, load_config
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.release.building import without_initialisation
from ldm.util import UserError

logger = logging.getLogger(__name__)

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def pick_device(name: str, local_rank: int = 0) -> torch.device:
    """The device called `name`; `auto` is the GPU if there is one, that of process `local_rank`, else the CPU.

    Raises:
        UserError: there is no such device here.
    """
    if name == "auto":
        name = f"cuda:{local_rank}" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name}: {str(error).splitlines()[0]}") from error
    return device


def load_release(
    ckpt: str | Path,
    config: str | Path | DictConfig | Mapping[str, Any],
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
) -> LatentDiffusion:
    """Return the model of `config` with the weights of `ckpt`, for inference.

    `config` is what `load_config` gives, or the path of a config that is not trusted. The diffusion schedule stays in
    float32 whatever `dtype` is.

    Raises:
        UserError: a file is missing or broken, or the checkpoint does not fit the config.
    """
    if isinstance(config, (str, Path)):
        config = load_config([config])
    weights = load_state_dict(ckpt)
    with without_initialisation():
        model = build_model(config)
    if not isinstance(model, LatentDiffusion):
        raise UserError(f"the config describes a {type(model).__name__}; a release is a LatentDiffusion")
    report = load_into(model, weights, source=str(ckpt))
    if has_part(report.missing, EMA):
        model.restart_ema()
    for part in (model.model, model.first_stage_model, model.cond_stage_model):
        if part is not None:
            part.to(dtype)
    return model.to(device).eval().requires_grad_(False)
