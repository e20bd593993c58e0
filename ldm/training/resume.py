"""Resuming from a training checkpoint: reading, checking and loading it."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning_fabric.plugins.io import CheckpointIO
from omegaconf import DictConfig, OmegaConf
from pytorch_lightning import LightningModule, seed_everything

from ldm.callbacks.rng import StepSeeds
from ldm.callbacks.saving import mark_newest
from ldm.checkpoint import (
    OpenCheckpoint,
    PickledCheckpoint,
    load_checkpoint,
    load_into,
    open_checkpoint,
    save_checkpoint,
)
from ldm.checkpoint.keys import EMA, PREDICTION, has_part, is_factor
from ldm.config.load import build_model
from ldm.files import check_within
from ldm.locks import run_of
from ldm.modules.lora import start_branches
from ldm.release.initial_checkpoint import checkpoint_at_start
from ldm.release.initialisation import without_initialisation
from ldm.release.keys import check_training_checkpoint, has_step_counters
from ldm.training.arguments import DEFAULT_SEED
from ldm.training.run import LAST
from ldm.training.structure import check_structure
from ldm.util import UserError, refuse_if

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainingCheckpoint:
    """Memory-mapped content of a training checkpoint, with its path."""

    path: Path
    opened: OpenCheckpoint

    @property
    def content(self) -> dict[str, Any]:
        return self.opened.content


class AtomicCheckpointIO(CheckpointIO):
    """Checkpoint plugin that writes files whole or not at all, and executes no code when it reads one.

    `save_checkpoint` with `storage_options`, a function, gives it the checkpoint to write instead.

    Args:
        folder: run folder. The plugin writes and removes nothing outside, even if a callback or its state asks for it.
        preloaded: checkpoint that was read before. It is returned for the first request of its path.
    """

    def __init__(self, folder: Path, preloaded: TrainingCheckpoint | None = None) -> None:
        self._folder = folder
        self._preloaded = preloaded

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        check_within(self._folder, Path(path).parent, "checkpoint in")
        if storage_options is not None:
            storage_options(PickledCheckpoint.of(checkpoint))
            return
        save_checkpoint(checkpoint, path)
        mark_newest(Path(path))

    def load_checkpoint(self, path: str | Path, map_location: Any = None, weights_only: bool | None = None) -> Any:
        preloaded, self._preloaded = self._preloaded, None
        return preloaded.content if preloaded and preloaded.path == Path(path) else load_checkpoint(path)

    def remove_checkpoint(self, path: str | Path) -> None:
        path = Path(path)
        try:
            check_within(self._folder, path.parent, "checkpoint in")
        except UserError as error:
            log.warning("Not removed: %s", error)
            return
        if path.suffix == ".ckpt" and path.name != LAST:
            path.unlink(missing_ok=True)


def read_training_checkpoint(path: Path | None) -> TrainingCheckpoint | None:
    """Read the training checkpoint at `path` and verify its checksums and structure; return None if `path` is None.

    Raises:
        UserError: the file is damaged, or has no training state. The message names the newest undamaged checkpoint of
            the run.
    """
    if path is None:
        return None
    try:
        return TrainingCheckpoint(path, _open_checked(path))
    except UserError as error:
        raise UserError(f"{error}{_alternative_to(path)}") from error


def _open_checked(path: Path) -> OpenCheckpoint:
    """Open the checkpoint at `path` and check its structure; a checkpoint of Lightning 1 keeps only its weights.

    Raises:
        UserError: the file is damaged, or not a training checkpoint.
    """
    opened = open_checkpoint(path)
    check_training_checkpoint(opened.content, path)
    if not has_step_counters(opened.content, path):
        weights = opened.content["state_dict"]
        opened.content.clear()
        opened.content.update(checkpoint_at_start({}), state_dict=weights)
    try:
        check_structure(opened.content)
    except UserError as error:
        raise UserError(f"{path}: not a checkpoint that a run can resume ({error})") from error
    return opened


def _alternative_to(broken: Path) -> str:
    """Return the end of a message about a `broken` checkpoint: the newest undamaged one of its run."""
    if run_of(broken) is None:
        return ""
    others = [path for path in broken.parent.glob("[!.]*.ckpt") if path != broken]
    for path in sorted(others, key=lambda path: path.stat().st_mtime, reverse=True):
        try:
            content = _open_checked(path).content
        except UserError:
            continue
        step = content["global_step"]
        return f"; resume the newest undamaged one of this run, of step {step}: python main.py --resume {path} -t"
    return "; this run has no other undamaged checkpoint"


def seed_run(given: int | None, checkpoint: TrainingCheckpoint | None) -> int:
    """Seed all random numbers with `given`, else the resumed run's seed, else the default; return the seed."""
    saved = checkpoint.content.get("callbacks", {}).get(StepSeeds.__name__, {}).get("seed") if checkpoint else None
    seed = next(number for number in (given, saved, DEFAULT_SEED) if number is not None)
    return seed_everything(seed, verbose=False)


def build_from(config: DictConfig, checkpoint: TrainingCheckpoint | None) -> LightningModule:
    """Build the model of `config` with the weights of `checkpoint`, if there is one.

    Lightning restores the rest of the checkpoint when the fit begins.

    Raises:
        UserError: the config describes no model, or the checkpoint is of another model.
    """
    if checkpoint is None:
        return build_model(config)
    in_bfloat16 = OmegaConf.select(config, "lightning.trainer.precision") == "bf16-true"
    with without_initialisation():
        model = build_model(config)
    if in_bfloat16 and not getattr(model, "use_ema", False):  # an average can start from float32 weights
        model.to(torch.bfloat16)  # before loading, so that memory never holds them in float32
    missing = _load_weights(model, checkpoint)
    if missing & dict(model.named_parameters()).keys():  # optional weights, such as a loss's, start as in a new model
        model = build_model(config)
        _load_weights(model, checkpoint)
    _hand_over(model, checkpoint, in_bfloat16)
    return model


def _check_prediction(model: LightningModule, checkpoint: TrainingCheckpoint) -> None:
    """Raise `UserError` if the checkpoint names another parameterization than the config's. The weights would load."""
    noted, own = checkpoint.content.get(PREDICTION), getattr(model, "parameterization", None)
    refuse_if(
        None not in (noted, own) and noted != own,
        f"{checkpoint.path}: its UNet predicts {noted}, the config's parameterization is {own}; give "
        f"model.params.parameterization={noted}",
    )


def _load_weights(model: LightningModule, checkpoint: TrainingCheckpoint) -> set[str]:
    """Load the weights into `model`; return the keys that the checkpoint lacks and that have no values yet."""
    _check_prediction(model, checkpoint)
    weights = checkpoint.content["state_dict"]
    report = load_into(model, weights, source=str(checkpoint.path))
    if any(map(is_factor, report.missing)):
        log.info("%s: has no LoRA; a new one starts, which changes nothing yet", checkpoint.path)
        start_branches(model)
    if has_part(report.missing, EMA):
        log.info("%s: has no moving average; the moving average starts from the weights of this file", checkpoint.path)
        model.restart_ema()
    return {key for key in report.missing if not is_factor(key)}


def _hand_over(model: LightningModule, checkpoint: TrainingCheckpoint, in_bfloat16: bool) -> None:
    """Replace the weights of `checkpoint` by the model's own tensors, so that memory holds them once.

    Lightning loads the weights again, from these tensors, which copies nothing. Missing keys are optional. With
    `in_bfloat16` the model is cast here. If Lightning cast it later, the checkpoint would keep the float32 weights.
    """
    if in_bfloat16:
        model.to(torch.bfloat16)
    weights = checkpoint.content["state_dict"]
    checkpoint.content["state_dict"] = {key: own for key, own in model.state_dict().items() if key in weights}
    model.strict_loading = False
