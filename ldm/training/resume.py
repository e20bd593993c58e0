"""Taking up a training checkpoint: is it one, and is it one of this model."""

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
from ldm.checkpoint import OpenCheckpoint, load_checkpoint, load_into, open_checkpoint, save_checkpoint
from ldm.checkpoint.keys import EMA, has_part
from ldm.config.load import build_model
from ldm.files import check_within
from ldm.release.building import without_initialisation
from ldm.release.fresh import checkpoint_at_start
from ldm.release.keys import check_training_checkpoint, is_of_2022
from ldm.training.arguments import DEFAULT_SEED
from ldm.training.run import LAST, lies_in_run
from ldm.training.structure import check_structure
from ldm.util import UserError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainingCheckpoint:
    """The content of a training checkpoint, memory-mapped, and where it is."""

    path: Path
    opened: OpenCheckpoint

    @property
    def content(self) -> dict[str, Any]:
        return self.opened.content


class AtomicCheckpointIO(CheckpointIO):
    """Checkpoints that are whole or not there, and that run no code when they are read.

    Args:
        folder: the run folder. Nothing outside is written or removed, whatever a callback or its saved state says.
        taken_up: a checkpoint that was read before. It is handed out the first time that Lightning asks for it.
    """

    def __init__(self, folder: Path, taken_up: TrainingCheckpoint | None = None) -> None:
        self._folder = folder
        self._taken_up = taken_up

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        check_within(self._folder, Path(path).parent, "checkpoint in")
        save_checkpoint(checkpoint, path)
        mark_newest(Path(path))

    def load_checkpoint(self, path: str | Path, map_location: Any = None, weights_only: bool | None = None) -> Any:
        taken_up, self._taken_up = self._taken_up, None
        return taken_up.content if taken_up and taken_up.path == Path(path) else load_checkpoint(path)

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
    """The training checkpoint at `path`, all of it held against its checksums; None if there is nothing to go on from.

    Raises:
        UserError: the file is damaged, and then the newest of its run that is not is named; or it holds no training
            state.
    """
    if path is None:
        return None
    try:
        return TrainingCheckpoint(path, _open_whole(path))
    except UserError as error:
        raise UserError(f"{error}{_instead_of(path)}") from error


def _open_whole(path: Path) -> OpenCheckpoint:
    """Open the checkpoint at `path` and check its structure; of one without progress, the weights alone are taken up.

    Raises:
        UserError: the file is damaged, or not a training checkpoint.
    """
    opened = open_checkpoint(path)
    check_training_checkpoint(opened.content, path)
    if is_of_2022(opened.content):
        log.info("%s: of Lightning 1.4, without progress: its weights are taken up, the step counters start anew", path)
        weights = opened.content["state_dict"]
        opened.content.clear()
        opened.content.update(checkpoint_at_start({}), state_dict=weights)
    try:
        check_structure(opened.content)
    except UserError as error:
        raise UserError(f"{path}: not a checkpoint that a run can go on from ({error})") from error
    return opened


def _instead_of(broken: Path) -> str:
    """The end of a message about a `broken` checkpoint: what its run can go on from."""
    if not lies_in_run(broken):
        return ""
    others = [path for path in broken.parent.glob("[!.]*.ckpt") if path != broken]
    for path in sorted(others, key=lambda path: path.stat().st_mtime, reverse=True):
        try:
            content = _open_whole(path).content
        except UserError:
            continue
        step = content["global_step"]
        return f"; the newest whole one of this run is of step {step}: python main.py --resume {path} -t"
    return "; this run has no other whole checkpoint"


def seed_run(asked: int | None, checkpoint: TrainingCheckpoint | None) -> int:
    """Seed everything with the number `asked` for, else with that of the resumed run, else with the default."""
    saved = checkpoint.content.get("callbacks", {}).get(StepSeeds.__name__, {}).get("seed") if checkpoint else None
    seed = next(number for number in (asked, saved, DEFAULT_SEED) if number is not None)
    return seed_everything(seed, verbose=False)


def build_from(config: DictConfig, checkpoint: TrainingCheckpoint | None) -> LightningModule:
    """The model of `config`, with the weights of `checkpoint` if there is one; the rest is taken up as the fit begins.

    Raises:
        UserError: the config describes no model, or it is a checkpoint of another one.
    """
    if checkpoint is None:
        return build_model(config)
    with without_initialisation():
        model = build_model(config)
    missing = _load_weights(model, checkpoint)
    if missing & dict(model.named_parameters()).keys():  # optional ones, such as a loss's, begin as in a new model
        model = build_model(config)
        _load_weights(model, checkpoint)
    _hand_over(model, checkpoint, OmegaConf.select(config, "lightning.trainer.precision") == "bf16-true")
    return model


def _load_weights(model: LightningModule, checkpoint: TrainingCheckpoint) -> set[str]:
    """Load the weights into `model`; returns the keys that the checkpoint lacks."""
    weights = checkpoint.content["state_dict"]
    report = load_into(model, weights, source=str(checkpoint.path))
    if has_part(report.missing, EMA):
        log.info("%s: has no moving average, which starts from the weights", checkpoint.path)
        model.restart_ema()
    return set(report.missing)


def _hand_over(model: LightningModule, checkpoint: TrainingCheckpoint, in_bfloat16: bool) -> None:
    """Make the weights of `model` those of `checkpoint`, so that they are held once.

    Lightning loads them once more, from the model's own tensors: nothing is copied. What is missing is optional. With
    `in_bfloat16` the model is cast here. If Lightning did it later, the checkpoint would still hold the float32 ones.
    """
    if in_bfloat16:
        model.to(torch.bfloat16)
    weights = checkpoint.content["state_dict"]
    checkpoint.content["state_dict"] = {key: own for key, own in model.state_dict().items() if key in weights}
    model.strict_loading = False
