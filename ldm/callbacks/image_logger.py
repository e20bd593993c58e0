"""Images of what the model makes while it trains."""

from __future__ import annotations

import logging
import re
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

from ldm.callbacks.rng import aside
from ldm.callbacks.tolerance import Tolerance, write_tolerantly
from ldm.distributed.dtensor import is_sharded
from ldm.files import check_within
from ldm.images.grid import image_grid, save_png
from ldm.util import UserError, check_number, check_params

log = logging.getLogger(__name__)

_KEEP_FIRST = 10  # steps whose images stay: what the model made at the start
_NAME = re.compile(r".+_gs-(\d+)_e-\d+_b-\d+\.png")


class ImageLogger(Callback):
    """Asks the module for `log_images(batch, N=max_images, split=...)`, saves each entry as a PNG grid, and logs it.

    That happens at the steps 1, 2, 4, ... (with `increase_log_steps`) and then every `batch_frequency`. Validation
    shows its first batch, at most every `batch_frequency` steps. Training goes on as if nothing had been sampled, even
    where a GPU is too small for it.

    Args:
        batch_frequency: steps between images.
        max_images: images of a batch to show.
        clamp: cut values to [-1, 1] before anything else.
        rescale: the module's images are in [-1, 1]; else they are in [0, 1].
        disabled: do nothing.
        log_on_batch_idx: count batches instead of optimizer steps.
        log_first_step: also before the first step has been counted, which only happens with `log_on_batch_idx`.
        log_images_kwargs: passed on to `log_images`; `N` in it lowers `max_images`.
        log_all_val: show every batch of every validation.
        enable_autocast: sample in the precision of the training, else in that of the weights.
        log_before_first_step: also show the first batch before anything is trained.
        keep_last: number of steps whose images of each split stay in the run folder: the newest, besides the first few.
            None keeps all.
        event_file_gb: size of TensorBoard's files from which on they get numbers and no images; None for no limit. PNG
            files are not affected.

    Raises:
        UserError: numbers below 1, or, as training is set up, what `log_images` does not take.
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
        if event_file_gb is not None and not event_file_gb >= 0:
            raise UserError(f"event_file_gb {event_file_gb}: give a number of at least 0, or null for no limit")
        self.keep_last = keep_last
        self.event_file_gb = event_file_gb
        self._images, self._is_full = Tolerance("Images of the training"), False
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
        self._last_shown: dict[str, int] = {}  # by split: several batches share a step when gradients accumulate

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if self.disabled or not hasattr(pl_module, "log_images"):
            return
        where = "the image logger's log_images_kwargs"
        for name in ("batch", "split"):
            if name in self.log_images_kwargs:
                raise UserError(f"{where}: the logger itself gives {name}; leave it out")
        check_params(where, pl_module.log_images, self.log_images_kwargs)
        for name in ("n_row", "ddim_steps"):
            check_number(f"{where}: {name}", self.log_images_kwargs.get(name, 1), least=1)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self.log_before_first_step and trainer.global_step == 0 and "start" not in self._last_shown:
            self._last_shown["start"] = 0
            self._show(trainer, pl_module, batch, batch_idx, "train")

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.disabled or not trainer.is_global_zero or not hasattr(pl_module, "log_images"):
            return
        kept = "all" if self.keep_last is None else f"the first {_KEEP_FIRST} and the newest {self.keep_last}"
        limit = "without limit" if self.event_file_gb is None else f"up to {self.event_file_gb:g} GB"
        log.info("Images of the training: %s steps of a split are kept; TensorBoard's files take them %s", kept, limit)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        count = batch_idx if self.log_on_batch_idx else trainer.global_step
        if self._is_due(count) and self._last_shown.get("train") != count:
            self._last_shown["train"] = count
            self._show(trainer, pl_module, batch, batch_idx, "train")

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, *_: Any
    ) -> None:
        if trainer.sanity_checking or trainer.global_step == 0 or (batch_idx > 0 and not self.log_all_val):
            return
        last = self._last_shown.get("val")
        if self.log_all_val or last is None or trainer.global_step - last >= self.batch_frequency:
            self._last_shown["val"] = trainer.global_step
            self._show(trainer, pl_module, batch, batch_idx, "val")

    def _is_due(self, count: int) -> bool:
        if count == 0:
            return self.log_first_step
        is_early = self.increase_log_steps and count < self.batch_frequency and count & (count - 1) == 0
        return is_early or count % self.batch_frequency == 0

    def _show(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, split: str) -> None:
        if self.disabled or not hasattr(pl_module, "log_images"):
            return
        if not trainer.is_global_zero and not is_sharded(pl_module):
            return
        try:
            precision = trainer.precision_plugin.forward_context() if self.enable_autocast else nullcontext()
            with aside(pl_module), precision:
                images = pl_module.log_images(batch, N=self.max_images, split=split, **self.log_images_kwargs)
        except torch.OutOfMemoryError as error:  # a card that a step just fits may be too small for a decoder
            if is_sharded(pl_module):
                raise  # other processes wait for this one
            log.warning(
                "\nNo pictures at step %d: %s; training goes on. To draw none: "
                "lightning.callbacks.image_logger.params.disabled=true",
                trainer.global_step, str(error).split(". ")[0],
            )  # fmt: skip
            return
        if not trainer.is_global_zero:  # it took part in the computing, and is not the one to show it
            return
        folder = Path(trainer.default_root_dir) / "images" / split
        check_within(trainer.default_root_dir, folder, "images in")
        place = f"gs-{trainer.global_step:06}_e-{trainer.current_epoch:06}_b-{batch_idx:06}"
        samples = len(next(iter(images.values())))
        for key, value in images.items():
            grid = self._grid(value, self._columns(key, len(value), samples))
            with self._images():
                save_png(grid, folder / f"{key}_{place}.png".replace("/", "_"))
            for logger in trainer.loggers:
                if not isinstance(logger, TensorBoardLogger) or self._has_room(logger):
                    _log_image(logger, f"{split}/{key}", grid, trainer.global_step)
        if self.keep_last is not None:
            with suppress(OSError):
                remove_old_images(folder, _KEEP_FIRST, self.keep_last)

    def _has_room(self, logger: TensorBoardLogger) -> bool:
        """Return whether TensorBoard's files are below their limit, and warn once that they are not."""
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
                "\n%s: its files have reached %g GB and get no more images; PNG files go on. To change that: "
                "lightning.callbacks.image_logger.params.event_file_gb",
                logger.log_dir, self.event_file_gb,
            )  # fmt: skip
        return False

    def _columns(self, key: str, count: int, samples: int) -> int:
        """Entries named `..._row` hold each sample's steps one after the other, which makes a row of the grid."""
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
    """Of the images of this logger in `folder`, keep those of the `first` steps and of the `newest`."""
    steps: dict[int, list[Path]] = {}
    for path in folder.glob("*.png"):
        found = _NAME.fullmatch(path.name)
        if found:
            steps.setdefault(int(found[1]), []).append(path)
    for step in sorted(steps)[first:-newest]:
        for path in steps[step]:
            path.unlink(missing_ok=True)


def _log_image(logger: Logger, tag: str, grid: Image.Image, step: int) -> None:
    if isinstance(logger, TensorBoardLogger):
        write_tolerantly(logger, _add_image, logger, tag, grid, step)
    elif hasattr(logger, "log_image"):  # W&B and the like
        logger.log_image(key=tag, images=[grid], step=step)
