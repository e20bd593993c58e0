"""Comparison of the encoders that made the shards with those of the run's checkpoint."""

from __future__ import annotations

import logging
from typing import Any

from pytorch_lightning import Callback, LightningModule, Trainer

from ldm.checkpoint import weights_digest
from ldm.shards.open import check_encoders
from ldm.shards.reader import ShardDataset
from ldm.util import UserError

log = logging.getLogger(__name__)


class SameEncoders(Callback):
    """Callback that refuses shards of another autoencoder or text tower than the checkpoint's.

    The index of the shards holds the digests of both encoders, and so does this callback's state in each checkpoint of
    the run; `tools/hack_weights.py` writes them there. The training's model has no text tower, and a checkpoint may
    hold the autoencoder in bfloat16, which has another digest. If the state has no digest of the autoencoder, it is
    computed from the loaded weights. The text tower is compared where training uses the stored encodings, and not where
    the model reads captions itself. Shards and checkpoints without digests are not compared.

    A fresh run, whose checkpoint will be hacked, has a random autoencoder. Its mismatch is a warning, also when the run
    is resumed before released weights are put into its checkpoint.

    Args:
        is_loaded: True if the weights of the run come from a file.
    """

    def __init__(self, is_loaded: bool) -> None:
        self.is_loaded = is_loaded
        self.text_tower: str | None = None
        self.autoencoder: str | None = None

    def state_dict(self) -> dict[str, Any]:
        if not self.is_loaded:
            return {"random": True}
        digests = {"text_tower": self.text_tower, "autoencoder": self.autoencoder}
        return {name: digest for name, digest in digests.items() if digest is not None}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.is_loaded = not state_dict.get("random", False)
        self.text_tower = state_dict.get("text_tower")
        self.autoencoder = state_dict.get("autoencoder") or self.autoencoder

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Read the digest of the autoencoder, after its weights are loaded and before a precision rounds them."""
        first_stage = getattr(pl_module, "first_stage_model", None)
        self.autoencoder = None if first_stage is None else weights_digest(first_stage.state_dict())

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Compare the digests, after the states of the callbacks are loaded.

        Raises:
            UserError: another encoder made a set; the message names its index.
        """
        trained = getattr(trainer.datamodule, "datasets", {}).values()
        watched = (dataset for callback in trainer.callbacks for dataset in getattr(callback, "shard_datasets", []))
        for dataset in (*trained, *watched):
            if isinstance(dataset, ShardDataset):
                self._check(dataset)

    def _check(self, dataset: ShardDataset) -> None:
        own = {"autoencoder": self.autoencoder, "text_tower": self.text_tower}
        if self.is_loaded:
            check_encoders(dataset, own, "the checkpoint")
            return
        try:
            check_encoders(dataset, own, "the model, which is random", "put weights into it with tools/hack_weights.py")
        except UserError as error:
            log.warning("%s", error)
