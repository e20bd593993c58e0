"""Callback that measures forgetting: loss and drift on other images than the training set."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pytorch_lightning import Callback, LightningModule, Trainer

from ldm.callbacks.rng import undisturbed
from ldm.callbacks.tolerance import Tolerance
from ldm.distributed.dtensor import is_partitioned
from ldm.evaluation.baseline import load_start, save_start
from ldm.evaluation.denoising import Comparison, Record, compare, record
from ldm.evaluation.protocol import midpoint_timesteps
from ldm.evaluation.sets import EvaluationSet, open_set
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.shards.reader import ShardDataset
from ldm.util import UserError, check_number, refuse_if

log = logging.getLogger(__name__)

_METRICS = ("loss", "loss_ratio", "drift")


class Forgetting(Callback):
    """Callback that logs `eval/<set>/loss`, `eval/<set>/loss_ratio` and `eval/<set>/drift` every `every_n_train_steps`.

    The metrics are those of `tools/evaluate.py`: the mean square error at fixed timesteps and noise, its ratio to that
    of the run's initial weights, and the distance between the noise predictions of both. `model.params.monitor` may
    name any of them. The predictions of the initial weights are kept in `evaluation/start.safetensors` of the run, and
    a resumed run reads them. If the model has averaged weights, those are evaluated, because a merge releases them.
    Evaluation does not change the training.

    Args:
        sets: mapping of names to local shards, as in `data.params.training_urls`; null leaves a set out.
        every_n_train_steps: optimizer steps between evaluations.
        timesteps: number of timesteps, at the midpoints of equal strata of the schedule.
        limit: maximum number of images per set, spread over it; null for all.
        batch_size: images per batch.
        verify_shards: read new shards completely once, and compare them with the checksums of their index.

    Raises:
        UserError: `sets` is empty, or a number is below 1.
    """

    def __init__(
        self,
        sets: Mapping[str, str | Sequence[str]],
        every_n_train_steps: int,
        timesteps: int = 8,
        limit: int | None = 64,
        batch_size: int = 8,
        verify_shards: bool = True,
    ) -> None:
        if not isinstance(sets, Mapping) or all(shards is None for shards in sets.values()):
            raise UserError(f"sets {sets!r}: give at least one, as name: shards")
        check_number("every_n_train_steps", every_n_train_steps, least=1)
        check_number("batch_size", batch_size, least=1)
        check_number("limit", limit, least=1, optional=True)
        self.urls = {name: shards for name, shards in sets.items() if shards is not None}
        self.every_n_train_steps = every_n_train_steps
        self.timestep_count = timesteps
        self.limit = limit
        self.batch_size = batch_size
        self.verify_shards = verify_shards
        self._sets: list[EvaluationSet] = []
        self._timesteps: list[int] = []
        self._start: list[Record] = []
        self._recorded: int | None = None  # step of the initial weights
        self._step = 0
        self._is_off = False  # the initial results could not be saved
        self._tolerance = Tolerance("The file of initial results")

    @property
    def metrics(self) -> list[str]:
        """Names of the logged metrics."""
        return [f"eval/{name}/{metric}" for name in self.urls for metric in _METRICS]

    @property
    def shard_datasets(self) -> list[ShardDataset]:
        """Datasets of the opened sets, for `SameEncoders`."""
        return [image_set.dataset for image_set in self._sets]

    def state_dict(self) -> dict[str, Any]:
        return {} if self._recorded is None else {"recorded": self._recorded}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._recorded = state_dict["recorded"]

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        refuse_if(
            not isinstance(pl_module, LatentDiffusion),
            f"Forgetting needs a LatentDiffusion, not a {type(pl_module).__name__}",
        )
        refuse_if(
            pl_module.scale_by_std, "Forgetting needs a fixed scale of the latents: set scale_factor, not scale_by_std"
        )
        self._timesteps = midpoint_timesteps(pl_module.num_timesteps, self.timestep_count)
        verify = self.verify_shards and trainer.local_rank == 0
        self._sets = [open_set(name, urls, pl_module, self.limit, verify) for name, urls in self.urls.items()]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._step = trainer.global_step
        path = Path(trainer.default_root_dir) / "evaluation" / "start.safetensors"
        known = self._recorded is not None and path.exists()
        trainer.strategy.barrier()  # all processes have looked before the file is written
        if not known:
            self._recorded = trainer.global_step
            if trainer.is_global_zero or is_partitioned(pl_module):
                self._record(trainer, pl_module, path)
            trainer.strategy.barrier()
        if not path.exists():  # the file could not be written
            self._recorded, self._is_off = None, True
            return
        self._start = load_start(path, self._sets, self._timesteps)
        if not known:
            self._log(trainer, [Comparison(start.loss, start.loss, 0 * start.loss) for start in self._start])

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        if self._is_off or step == self._step or step % self.every_n_train_steps:
            return  # step == self._step: gradients are still accumulating
        self._step = step
        with undisturbed(pl_module):
            pairs = zip(self._start, self._sets, strict=True)
            found = [compare(start, pl_module, part, self._timesteps, self.batch_size) for start, part in pairs]
        # For `monitor`. The loggers have the metrics already; Lightning would log only at log_every_n_steps.
        pl_module.log_dict(self._log(trainer, found), logger=False, on_step=True, on_epoch=False, batch_size=1)

    def _record(self, trainer: Trainer, model: LightningModule, path: Path) -> None:
        if self._recorded and trainer.is_global_zero:
            log.warning(
                "%s: made at step %d; loss ratio and drift compare with these weights, not with those of step 0",
                path, self._recorded,
            )  # fmt: skip
        with undisturbed(model):
            found = [record(model, image_set, self._timesteps, self.batch_size) for image_set in self._sets]
        if trainer.is_global_zero:
            with self._tolerance():
                save_start(path, self._sets, found, self._timesteps)

    def _log(self, trainer: Trainer, found: Sequence[Comparison]) -> dict[str, float]:
        """Log the metrics to the loggers and the terminal, and return them."""
        values: dict[str, float] = {}
        lines = []
        for name, (base, tuned, drift) in zip(self.urls, found, strict=True):
            loss, ratio, distance = float(tuned.mean()), float(tuned.mean() / base.mean()), float(drift.mean())
            values |= {f"eval/{name}/{metric}": v for metric, v in zip(_METRICS, (loss, ratio, distance), strict=True)}
            lines.append(f"{name} loss {loss:.4g} ({ratio:.4g} of the initial loss), drift {distance:.3g}")
        for logger in trainer.loggers:
            logger.log_metrics(values, step=trainer.global_step)
        if trainer.is_global_zero:
            log.info("\nEvaluation at step %d: %s", trainer.global_step, "; ".join(lines))
        return values
