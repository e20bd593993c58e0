"""Loading of released checkpoints into models for inference."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig

from ldm.checkpoint import OPTIONAL_KEYS, load_into, open_checkpoint
from ldm.checkpoint.keys import DEPTH_STAGE, EMA, has_part
from ldm.checkpoint.markers import compare_markers
from ldm.config.load import build_model, load_config
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.processor import quick_dtype
from ldm.release.caption_record import apply_record
from ldm.release.diffusers_config import check_settings
from ldm.release.initialisation import without_initialisation
from ldm.release.lora_merging import Lora, add_loras
from ldm.release.opening import release_of
from ldm.util import UserError, refuse_if

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def pick_device(name: str, local_rank: int = 0) -> torch.device:
    """Return the device `name`. `auto` is the GPU `local_rank` if CUDA is available, else the CPU.

    Raises:
        UserError: this machine has no such device.
    """
    if name == "auto":
        name = f"cuda:{local_rank}" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(
            f"--device {name}: {str(error).splitlines()[0]}; give auto, cpu or a device of this machine"
        ) from error
    return device


def pick_precision(name: str, device: torch.device) -> torch.dtype:
    """Return the dtype of the option `--precision`: float32 with a warning where `device` would emulate it."""
    return quick_dtype(PRECISIONS[name], device, f"--precision {name}")


def load_release(
    ckpt: str | Path,
    config: str | Path | DictConfig | Mapping[str, Any],
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    vae: str | Path | None = None,
    loras: Sequence[Lora] = (),
) -> LatentDiffusion:
    """Return the model of `config` with the weights of `ckpt`, for inference.

    Args:
        config: the result of `load_config`, or the path of an untrusted config.
        dtype: of the networks. The diffusion schedule stays in float32.
        vae: a file whose autoencoder replaces that of the release.
        loras: added to the weights, in float32.

    Captions are read with the settings that the metadata of the file records, see `apply_record`.

    A depth model whose file lacks the depth network has None in its place.

    Raises:
        UserError: a file is missing or invalid, or the checkpoint does not match the config.
    """
    if isinstance(config, (str, Path)):
        config = load_config([config])
    opened = open_checkpoint(ckpt)
    with without_initialisation():
        model = build_model(config)
    refuse_if(
        not isinstance(model, LatentDiffusion),
        f"model.target is a {type(model).__name__}; a release needs a LatentDiffusion",
    )
    release = release_of(opened, ckpt, vae, model.state_dict())
    compare_markers(release.named.carried, model.parameterization, str(ckpt), release.metadata)
    report = load_into(model, release.weights, source=str(ckpt), optional=(*OPTIONAL_KEYS, f"{DEPTH_STAGE}*"))
    if opened.folder is not None:
        check_settings(opened.folder, config)
    if has_part(report.missing, DEPTH_STAGE):
        model.depth_model = None
    if has_part(report.missing, EMA):
        model.restart_ema()
    apply_record(model.cond_stage_model, release.metadata, ckpt)
    add_loras(model, loras, ckpt)
    for part in (model.model, model.first_stage_model, model.cond_stage_model):
        if part is not None:
            part.to(dtype)
    return model.to(device).eval().requires_grad_(False)
