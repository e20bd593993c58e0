"""Callback that samples and logs images during training."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.loggers import Logger, TensorBoardLogger
from torch import Tensor

from ldm.callbacks.rng import undisturbed
from ldm.callbacks.tolerance import Tolerance, write_tolerantly
from ldm.distributed.dtensor import is_partitioned
from ldm.files import check_within
from ldm.images.grid import image_grid, save_png
from ldm.images.logged_names import logged_name, parse_logged_name
from ldm.util import check_number, check_params, refuse_if

log = logging.getLogger(__name__)

_KEEP_FIRST = 10  # number of first steps whose images are always kept


class ImageLogger(Callback):
    """Callback that calls the module's `log_images(batch, N=max_images, split=...)` and logs each entry as a PNG grid.

    Training images are logged at the steps 1, 2, 4, ... (with `increase_log_steps`), then every `batch_frequency`
    steps. Validation logs its first batch, at most every `batch_frequency` steps. Logging does not change the training.
    If the GPU is too small for it, a warning replaces the images.

    Args:
        batch_frequency: steps between images.
        max_images: maximum number of images per batch.
        clamp: clamp values to [-1, 1] first.
        rescale: the module's images are in [-1, 1]; if False, in [0, 1].
        disabled: log no images.
        log_on_batch_idx: count batches instead of optimizer steps.
        log_first_step: also log at count 0, which only occurs with `log_on_batch_idx`.
        log_images_kwargs: further arguments of `log_images`. `N` in it lowers `max_images`.
        log_all_val: log every batch of every validation.
        enable_autocast: sample in the precision of training; if False, in the precision of the weights.
        log_before_first_step: also log the first batch before the first step.
        keep_last: number of newest steps per split whose images are kept in the run folder, in addition to the first
            10 steps. None keeps all.
        event_file_gb: size in GB at which TensorBoard's files get no more images; None for no limit. PNG files are not
            affected.

    Raises:
        UserError: a number is below 1; or, at the set-up of training, `log_images` does not take an argument.
    """

    def __init__(
        self,
        batch_frequency: int,
        max_images: int = 4,
        clamp: bool = True,
        increase_log_steps: bool = True,
        rescale: bool = True,
        disabled: bool = False,
        log_on_batch_idx: bool = False,
        log_first_step: bool = False,
        log_images_kwargs: Mapping[str, Any] | None = None,
        log_all_val: bool = False,
        enable_autocast: bool = False,
        log_before_first_step: bool = False,
        keep_last: int | None = 1000,
        event_file_gb: float | None = 2.0,
    ) -> None:
        passed_on = dict(log_images_kwargs or {})
        most = passed_on.pop("N", max_images)
        check_number("batch_frequency", batch_frequency, least=1)
        check_number("max_images", max_images, least=1)
        check_number("log_images_kwargs: N", most, least=1)
        max_images = min(max_images, most)
        if keep_last is not None:
            check_number("keep_last", keep_last, least=1)
        refuse_if(
            event_file_gb is not None and not event_file_gb >= 0,
            f"event_file_gb {event_file_gb}: give a number of at least 0, or null for no limit",
        )
        self.keep_last = keep_last
        self.event_file_gb = event_file_gb
        self._images, self._is_full = Tolerance("Training images"), False
        self.batch_frequency = batch_frequency
        self.max_images = max_images
        self.clamp = clamp
        self.increase_log_steps = increase_log_steps
        self.rescale = rescale
        self.disabled = disabled
        self.log_on_batch_idx = log_on_batch_idx
        self.log_first_step = log_first_step
        self.log_images_kwargs = passed_on
        self.log_all_val = log_all_val
        self.enable_autocast = enable_autocast
        self.log_before_first_step = log_before_first_step
        self._last_logged: dict[str, int] = {}  # per split; with accumulation, several batches have the same step

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if self.disabled or not hasattr(pl_module, "log_images"):
            return
        where = "the image logger's log_images_kwargs"
        for name in ("batch", "split"):
            refuse_if(name in self.log_images_kwargs, f"{where}: the image logger sets {name} itself; leave it out")
        check_params(where, pl_module.log_images, self.log_images_kwargs)
        for name in ("n_row", "ddim_steps"):
            check_number(f"{where}: {name}", self.log_images_kwargs.get(name, 1), least=1)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self.log_before_first_step and trainer.global_step == 0 and "start" not in self._last_logged:
            self._last_logged["start"] = 0
            self._log_images(trainer, pl_module, batch, batch_idx, "train")

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.disabled or not trainer.is_global_zero or not hasattr(pl_module, "log_images"):
            return
        kept = "all" if self.keep_last is None else f"the first {_KEEP_FIRST} and the newest {self.keep_last}"
        limit = "without limit" if self.event_file_gb is None else f"up to {self.event_file_gb:g} GB"
        log.info("Training images: %s steps per split are kept; TensorBoard's files hold images %s", kept, limit)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        count = batch_idx if self.log_on_batch_idx else trainer.global_step
        if self._is_due(count) and self._last_logged.get("train") != count:
            self._last_logged["train"] = count
            self._log_images(trainer, pl_module, batch, batch_idx, "train")

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, *_: Any
    ) -> None:
        if trainer.sanity_checking or trainer.global_step == 0 or (batch_idx > 0 and not self.log_all_val):
            return
        last = self._last_logged.get("val")
        if self.log_all_val or last is None or trainer.global_step - last >= self.batch_frequency:
            self._last_logged["val"] = trainer.global_step
            self._log_images(trainer, pl_module, batch, batch_idx, "val")

    def _is_due(self, count: int) -> bool:
        if count == 0:
            return self.log_first_step
        is_early = self.increase_log_steps and count < self.batch_frequency and count & (count - 1) == 0
        return is_early or count % self.batch_frequency == 0

    def _log_images(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, split: str) -> None:
        if self.disabled or not hasattr(pl_module, "log_images"):
            return
        if not trainer.is_global_zero and not is_partitioned(pl_module):
            return
        try:
            precision = trainer.precision_plugin.forward_context() if self.enable_autocast else nullcontext()
            with undisturbed(pl_module), precision:
                images = pl_module.log_images(batch, N=self.max_images, split=split, **self.log_images_kwargs)
        except torch.OutOfMemoryError as error:  # a GPU that fits a training step may be too small for the decoder
            if is_partitioned(pl_module):
                raise  # other processes wait for this one
            log.warning(
                "\nNo images at step %d: %s; training continues. To turn images off: "
                "lightning.callbacks.image_logger.params.disabled=true",
                trainer.global_step, str(error).split(". ")[0],
            )  # fmt: skip
            return
        if not trainer.is_global_zero:  # this process takes part in sampling only
            return
        folder = Path(trainer.default_root_dir) / "images" / split
        check_within(trainer.default_root_dir, folder, "images in")
        samples = len(next(iter(images.values())))
        for key, value in images.items():
            grid = self._grid(value, self._columns(key, len(value), samples))
            with self._images():
                save_png(grid, folder / logged_name(key, trainer.global_step, trainer.current_epoch, batch_idx))
            for logger in trainer.loggers:
                if not isinstance(logger, TensorBoardLogger) or self._has_room(logger):
                    log_image(logger, f"{split}/{key}", grid, trainer.global_step)
        if self.keep_last is not None:
            with suppress(OSError):
                remove_old_images(folder, _KEEP_FIRST, self.keep_last)

    def _has_room(self, logger: TensorBoardLogger) -> bool:
        """Return True if TensorBoard's files are below their limit, and warn once if they are not."""
        if self.event_file_gb is None:
            return True
        try:
            size = sum(path.stat().st_size for path in Path(logger.log_dir).glob("events.out.tfevents.*"))
        except OSError:
            return True
        if size < self.event_file_gb * 1e9:
            return True
        if not self._is_full:
            self._is_full = True
            log.warning(
                "\n%s: its files have reached %g GB and get no more images; PNG files continue. To change it: "
                "lightning.callbacks.image_logger.params.event_file_gb",
                logger.log_dir, self.event_file_gb,
            )  # fmt: skip
        return False

    def _columns(self, key: str, count: int, samples: int) -> int:
        """Return the columns of a grid. An entry `..._row` has consecutive steps of each sample, one sample per row."""
        rows = min(samples, self.log_images_kwargs.get("n_row", 4))
        return count // rows if key.endswith("_row") else self.max_images

    def _grid(self, images: Tensor, columns: int) -> Image.Image:
        images = images.float().cpu()
        if self.clamp:
            images = images.clamp(-1.0, 1.0)
        return image_grid(images if self.rescale else images * 2.0 - 1.0, columns)


def _add_image(logger: TensorBoardLogger, tag: str, grid: Image.Image, step: int) -> None:
    logger.experiment.add_image(tag, np.asarray(grid), step, dataformats="HWC")


def remove_old_images(folder: Path, first: int, newest: int) -> None:
    """Remove this logger's images in `folder`, except those of the `first` and the `newest` steps."""
    steps: dict[int, list[Path]] = {}
    for path in folder.glob("*.png"):
        found = parse_logged_name(path.name)
        if found:
            steps.setdefault(found.step, []).append(path)
    for step in sorted(steps)[first:-newest]:
        for path in steps[step]:
            path.unlink(missing_ok=True)


def log_image(logger: Logger, tag: str, grid: Image.Image, step: int) -> None:
    """Log an image, if `logger` takes images."""
    if isinstance(logger, TensorBoardLogger):
        write_tolerantly(logger, _add_image, logger, tag, grid, step)
    elif hasattr(logger, "log_image"):  # such as W&B
        logger.log_image(key=tag, images=[grid], step=step)
