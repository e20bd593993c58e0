"""Comparison of the encoders that made the shards with those of the run's checkpoint."""

from __future__ import annotations

import logging
from typing import Any

from pytorch_lightning import Callback, LightningModule, Trainer

from ldm.checkpoint import weights_digest
from ldm.shards.index import AUTOENCODER, ENCODERS
from ldm.shards.open import check_encoders
from ldm.shards.reader import ShardDataset
from ldm.util import UserError

log = logging.getLogger(__name__)


class SameEncoders(Callback):
    """Refuses to train, or to evaluate beside it, on shards of another autoencoder or text tower than the checkpoint's.

    The shards' index has the digests of all, and so has each checkpoint of the run, as this callback's state:
    `tools/hack_weights.py` leaves them there. Text towers are not in the training's model, and the autoencoder may be
    in its checkpoints in bfloat16, which no digest tells; where the state lacks it, it is that of the loaded weights.
    Text towers count where the stored encodings are trained on, not where the model reads captions itself. What has no
    digest (shards or checkpoints made before there were any) is not compared.

    Args:
        is_loaded: whether the run's weights come from a file. If not, the autoencoder is a random one, and another
            one is told of, no more: so begins a run whose checkpoint is to be hacked. Its checkpoints say so, and a
            resumed run treats them the same; `tools/hack_weights.py` removes the mark.
    """

    def __init__(self, is_loaded: bool) -> None:
        self.is_loaded = is_loaded
        self.towers: dict[str, str] = {}  # digests by the names of an index
        self.autoencoder: str | None = None

    def state_dict(self) -> dict[str, Any]:
        state: dict[str, Any] = {name: digest for name, digest in self._digests().items() if digest is not None}
        return state if self.is_loaded else {**state, "is_loaded": False}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        names = [name for name in ENCODERS if name != AUTOENCODER]
        self.towers = {name: state_dict[name] for name in names if state_dict.get(name) is not None}
        if state_dict.get("is_loaded") is False:  # a checkpoint of a fresh run, which no tool has put weights into
            self.is_loaded = False
        self.autoencoder = state_dict.get(AUTOENCODER) or self.autoencoder

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

    def _digests(self) -> dict[str, str | None]:
        return {**self.towers, AUTOENCODER: self.autoencoder}

    def _check(self, dataset: ShardDataset) -> None:
        own = self._digests()
        if self.is_loaded:
            check_encoders(dataset, own, "the checkpoint")
            return
        try:
            check_encoders(dataset, own, "the model, which is random", "put weights into it with tools/hack_weights.py")
        except UserError as error:
            log.warning("%s", error)
