"""Callback that keeps the best checkpoints by a metric."""

from __future__ import annotations

import copy
import logging
import re
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.callbacks import ModelCheckpoint

from ldm.callbacks.saving import WritingTime, try_save
from ldm.checkpoint import load_checkpoint
from ldm.util import UserError, refuse_if

log = logging.getLogger(__name__)


class _AnyMetric(dict):
    """Metrics for testing a template, with a value for every name."""

    def __contains__(self, name: object) -> bool:
        return True

    def __missing__(self, name: str) -> torch.Tensor:
        return torch.tensor(0.5)


def _own_score(path: Path, monitor: str) -> torch.Tensor | None:
    """Return the score `monitor` for which the checkpoint at `path` was kept; None if it has no such score."""
    try:
        callbacks = load_checkpoint(path).get("callbacks")
    except (UserError, OSError):
        return None
    for state in callbacks.values() if isinstance(callbacks, dict) else ():
        if isinstance(state, dict) and state.get("monitor") == monitor:
            for name, score in (state.get("best_k_models") or {}).items():
                if Path(name).name == path.name and isinstance(score, torch.Tensor) and score.isfinite().all():
                    return score
    return None


class KeptCheckpoints(ModelCheckpoint):
    """Lightning's ModelCheckpoint that warns, instead of failing, if the metric is not logged or the disk is full.

    The monitor of the published config is a validation metric, and first runs often have no validation data. The time
    spent on writing is added to `writing`, which other callbacks may share.
    """

    def __init__(self, **params: Any) -> None:
        if not isinstance(params.get("monitor"), str | None):
            raise UserError(f"monitor {params['monitor']!r:.100}: give the name of a metric, or null")
        super().__init__(**params)
        self.writing = WritingTime()
        self._warned = self._validated = False
        self._before_validation: Any = None  # score at the start of a validation
        self._validated_step: int | None = None  # step of the last validation that gave the score
        self._check_filename()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        # Other paths are the best checkpoints of another run, or arbitrary files. This run must not delete them.
        if state_dict["dirpath"] == self.dirpath and self._are_own(state_dict):
            super().load_state_dict(state_dict)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        if trainer.ckpt_path and self.monitor is not None and self.save_top_k > 0:
            self._rank_existing(trainer)

    def _rank_existing(self, trainer: Trainer) -> None:
        """Rank the checkpoints in the folder, and remove the worst beyond `save_top_k`.

        The resumed state may be older than some of them, or have another `save_top_k`. Each checkpoint has its own
        score in its state of this callback.
        """
        ranked = {path: score for path, score in self.best_k_models.items() if Path(path).is_file()}
        for path in sorted(Path(self.dirpath).glob("[!.]*.ckpt")):
            if path.name != "last.ckpt" and str(path) not in ranked:
                score = _own_score(path, self.monitor)
                if score is not None:
                    ranked[str(path)] = score
        if not ranked:
            self.best_k_models = {}
            return
        best_first = sorted(ranked, key=lambda path: float(ranked[path]), reverse=self.mode == "max")
        for path in best_first[self.save_top_k :]:
            if self._should_remove_checkpoint(trainer, path, ""):
                self._remove_checkpoint(trainer, path)
        self.best_k_models = {path: ranked[path] for path in best_first[: self.save_top_k]}
        self.best_model_path, self.kth_best_model_path = best_first[0], list(self.best_k_models)[-1]
        self.best_model_score, self.kth_value = ranked[best_first[0]], ranked[self.kth_best_model_path]

    def _check_filename(self) -> None:
        """Raise `UserError` unless `filename` is a template of one file name."""
        try:
            name = self._format_checkpoint_name(self.filename, _AnyMetric(epoch=torch.tensor(0), step=torch.tensor(0)))
        except (ValueError, KeyError, IndexError, AttributeError, TypeError) as error:
            raise UserError(
                f"filename {self.filename!r}: not a template such as '{{epoch}}-{{step}}' ({error})"
            ) from error
        refuse_if(
            "/" in name or name in ("", ".", "..", "last"),
            f"filename {self.filename!r}: give a file name without folders, other than last",
        )

    def _format_checkpoint_name(self, filename: str | None, metrics: Any, *args: Any, **kwargs: Any) -> str:
        """Format a name as Lightning does, with `_` for `/` in a metric's name, which would make folders."""
        if filename:
            filename = re.sub(r"\{[^}:]*", lambda name: name[0].replace("/", "_"), filename)
            metrics = type(metrics)({key.replace("/", "_"): value for key, value in metrics.items()})
        return super()._format_checkpoint_name(filename, metrics, *args, **kwargs)

    def _are_own(self, state: dict[str, Any]) -> bool:
        single = (state.get(key) for key in ("best_model_path", "kth_best_model_path", "last_model_path"))
        paths = [*(state.get("best_k_models") or {}), *filter(None, single)]
        return all(isinstance(path, str) and self._is_own(Path(path)) for path in paths)

    def _is_own(self, path: Path) -> bool:
        others = path.name == "last.ckpt" or path.name.startswith("step=")
        return path.parent == Path(self.dirpath) and path.suffix == ".ckpt" and not others

    def _save_topk_checkpoint(self, trainer: Trainer, monitor_candidates: dict[str, Any]) -> None:
        if self.monitor is not None and self._validated_step not in (None, trainer.global_step):
            return  # the score belongs to older weights
        before, began = copy.deepcopy(self.state_dict()), time.monotonic()
        if not try_save(trainer, partial(super()._save_topk_checkpoint, trainer, monitor_candidates)):
            super().load_state_dict(before)  # no checkpoint was removed either
        self.writing.add(since=began)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._can_rank(trainer):
            super().on_train_epoch_end(trainer, pl_module)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._before_validation = trainer.callback_metrics.get(self.monitor)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._validated |= not trainer.sanity_checking
        score = trainer.callback_metrics.get(self.monitor)
        if score is not None and score is not self._before_validation and not trainer.sanity_checking:
            self._validated_step = trainer.global_step
            self._save_on_train_epoch_end = False  # the end of an epoch need not be the step of the score
        if trainer.sanity_checking or self._can_rank(trainer):
            super().on_validation_end(trainer, pl_module)

    def _can_rank(self, trainer: Trainer) -> bool:
        if self.monitor is None or self.monitor in trainer.callback_metrics:
            return True
        # With an interval in steps, the metric may come later. With one in epochs, the first validation may be later.
        may_come = not self.every_n_epochs or (any(trainer.num_val_batches) and not self._validated)
        if not may_come and not self._warned and trainer.is_global_zero:
            logged = ", ".join(sorted(trainer.callback_metrics)) or "nothing"
            hint = "" if any(trainer.num_val_batches) else "; there is no validation data"
            log.warning("No best checkpoints are kept: %r is not logged%s (logged: %s)", self.monitor, hint, logged)
            self._warned = True
        return False
