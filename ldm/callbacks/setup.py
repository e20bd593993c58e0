"""Callback that saves the configs of a run in its folder."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from pytorch_lightning import Callback, LightningModule, Trainer

from ldm.callbacks.tolerance import Tolerance
from ldm.files import atomic_write
from ldm.printable import without_secrets

log = logging.getLogger(__name__)


class SetupCallback(Callback):
    """Callback that makes `logdir`, `ckptdir` and `cfgdir`, and saves the configs in `cfgdir`.

    `<now>-project.yaml` holds model and data, `<now>-lightning.yaml` the section `lightning`. `--resume` merges both.
    Values from the environment are saved as `${oc.env:NAME}`, and typed secrets as `<hidden>`: a resume needs them
    again. The configs are saved after the first step, so that a config that cannot train does not block a later resume.
    """

    def __init__(
        self,
        now: str,
        logdir: str | Path,
        ckptdir: str | Path,
        cfgdir: str | Path,
        config: DictConfig,
        lightning_config: DictConfig,
    ) -> None:
        self.now = now
        self.logdir = Path(logdir)
        self.ckptdir = Path(ckptdir)
        self.cfgdir = Path(cfgdir)
        self.config = config
        self.lightning_config = lightning_config
        self._saved = False
        self._tolerance = Tolerance(f"The config in {self.cfgdir}")

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._saved or not trainer.is_global_zero:
            return
        with self._tolerance():  # on failure, the next batch tries again
            for folder in (self.logdir, self.ckptdir, self.cfgdir):
                folder.mkdir(parents=True, exist_ok=True)
            self._save("project", self.config)
            self._save("lightning", OmegaConf.create({"lightning": self.lightning_config}))
            self._saved = True

    def _save(self, name: str, config: DictConfig) -> None:
        written = OmegaConf.to_container(config)
        saved = without_secrets(written)
        if saved != written:
            log.info("Passwords and keys in configs are not saved; to resume, type them again or use ${oc.env:NAME}.")
        with atomic_write(self.cfgdir / f"{self.now}-{name}.yaml") as path:
            OmegaConf.save(OmegaConf.create(saved), path)
