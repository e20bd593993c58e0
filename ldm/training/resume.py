"""Taking up a training checkpoint: is it one, and is it one of this model."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_fabric.plugins.io import CheckpointIO
from pytorch_lightning import LightningModule, seed_everything

from ldm.callbacks.rng import StepSeeds
from ldm.checkpoint import load_checkpoint, load_into, save_checkpoint
from ldm.training.arguments import DEFAULT_SEED
from ldm.training.layout import check_training_checkpoint
from ldm.training.run import lies_in_run
from ldm.util import UserError

log = logging.getLogger(__name__)


class AtomicCheckpointIO(CheckpointIO):
    """Checkpoints that are whole or not there, and that run no code when they are read."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        save_checkpoint(checkpoint, path)

    def load_checkpoint(self, path: str | Path, map_location: Any = None, weights_only: bool | None = None) -> Any:
        return load_checkpoint(path)

    def remove_checkpoint(self, path: str | Path) -> None:
        Path(path).unlink(missing_ok=True)


@dataclass(frozen=True)
class TrainingCheckpoint:
    """The memory-mapped content of a training checkpoint, and where it is."""

    path: Path
    content: dict[str, Any]


def read_training_checkpoint(path: Path | None) -> TrainingCheckpoint | None:
    """The training checkpoint at `path`, all of it held against its checksums; None if there is nothing to go on from.

    Raises:
        UserError: the file is damaged, and then the newest of its run that is not is named; or it holds no training
            state.
    """
    if path is None:
        return None
    try:
        content = load_checkpoint(path)
    except UserError as error:
        raise UserError(f"{error}{_instead_of(path)}") from error
    check_training_checkpoint(content, path)
    return TrainingCheckpoint(path, content)


def _instead_of(broken: Path) -> str:
    """The end of a message about a `broken` checkpoint: what its run can go on from."""
    if not lies_in_run(broken):
        return ""
    others = [path for path in broken.parent.glob("[!.]*.ckpt") if path != broken]
    for path in sorted(others, key=lambda path: path.stat().st_mtime, reverse=True):
        try:
            content = load_checkpoint(path)
            check_training_checkpoint(content, path)
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


def load_weights(model: LightningModule, checkpoint: TrainingCheckpoint | None) -> None:
    """Load the weights of `checkpoint` into `model`; Lightning takes up the rest when the fit begins.

    Raises:
        UserError: it is a checkpoint of another model.
    """
    if checkpoint is None:
        return
    report = load_into(model, checkpoint.content["state_dict"], source=str(checkpoint.path))
    if any(key.startswith("model_ema.") for key in report.missing):
        log.info("%s: has no moving average, which starts from the weights", checkpoint.path)
        model.restart_ema()
    model.strict_loading = False  # Lightning loads them once more, and the keys still missing are optional
