"""Callback that refuses shards made by other encoders than the run's."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from typing import Any

from pytorch_lightning import Callback, LightningModule, Trainer

from ldm.checkpoint import encoder_digests
from ldm.checkpoint.keys import FIRST_STAGE
from ldm.modules.encoders.caption_settings import CaptionSettings, caption_settings, reads_captions
from ldm.shards.index import AUTOENCODER, ENCODERS, USED_PARTS
from ldm.shards.open import check_encoders, common_caption_settings
from ldm.shards.reader import ShardDataset
from ldm.util import UserError

log = logging.getLogger(__name__)

# Names of digests in an index and in the state of the callback.
_AUTOENCODER = (AUTOENCODER, USED_PARTS[AUTOENCODER])
_TOWERS = tuple(name for name in (*ENCODERS, *USED_PARTS.values()) if name not in _AUTOENCODER)


class SameEncoders(Callback):
    """Callback that compares the encoders of the shards with those of the run, and refuses differing ones.

    It checks the sets for training and for evaluation during training. The index of a set has digests of the
    autoencoder and the text towers that made it. The digests of the run are this callback's state in a checkpoint;
    `tools/hack_weights.py` writes them. They cannot be computed from the checkpoint, because the training model has no
    text tower, and may hold the autoencoder in bfloat16. If the state has no digests of the autoencoder, they are
    computed from the loaded weights. Text towers are compared only if training uses stored caption embeddings. Old
    shards or checkpoints without digests are not compared.

    All sets whose caption embeddings are used must have been encoded with the same `CaptionSettings`. The state has
    these settings too, or those of the model's own text encoder; `tools/merge_release.py` records them in the release.

    Args:
        is_loaded: True if the run's weights come from a file. Otherwise the autoencoder is random, as in a run whose
            checkpoint will be hacked, and a difference gives only a warning. The checkpoints of such a run are marked,
            so that a resumed run treats them in the same way. `tools/hack_weights.py` removes the mark.
    """

    def __init__(self, is_loaded: bool) -> None:
        self.is_loaded = is_loaded
        self.towers: dict[str, str] = {}  # digests by their names
        self.autoencoder: dict[str, str] = {}
        self.captions: CaptionSettings | None = None

    def state_dict(self) -> dict[str, Any]:
        state: dict[str, Any] = self._digests()
        state |= self.captions._asdict() if self.captions else {}
        return state if self.is_loaded else {**state, "is_loaded": False}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.towers = _known(state_dict, _TOWERS)
        if state_dict.get("is_loaded") is False:  # a checkpoint of a fresh run, not hacked
            self.is_loaded = False
        autoencoder = _known(state_dict, _AUTOENCODER)
        if autoencoder and autoencoder.get(AUTOENCODER) != self.autoencoder.get(AUTOENCODER):
            self.autoencoder = {}  # of weights in bfloat16
        self.autoencoder |= autoencoder
        if all(type(state_dict.get(name)) is int for name in CaptionSettings._fields):
            self.captions = CaptionSettings.from_entries(state_dict)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Compute the digests of the loaded autoencoder, before the precision plugin rounds its weights."""
        first_stage = getattr(pl_module, "first_stage_model", None)
        weights = {} if first_stage is None else first_stage.state_dict()
        digests = encoder_digests({FIRST_STAGE + key: value for key, value in weights.items()})
        self.autoencoder = _known(digests, _AUTOENCODER)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Compare the digests, after the states of the callbacks are loaded.

        Raises:
            UserError: a set was made by another encoder, or two sets with other settings. The message names its index.
        """
        trained = getattr(trainer.datamodule, "datasets", {}).values()
        watched = (dataset for callback in trainer.callbacks for dataset in getattr(callback, "shard_datasets", []))
        datasets = [dataset for dataset in (*trained, *watched) if isinstance(dataset, ShardDataset)]
        for dataset in datasets:
            self._check(dataset)
        stage = getattr(pl_module, "cond_stage_model", None)
        captions = caption_settings(stage) if reads_captions(stage) else common_caption_settings(datasets)
        if captions is not None and self.captions not in (None, captions):
            log.warning("the checkpoint was trained on captions with %s; they now have %s", self.captions, captions)
        self.captions = captions or self.captions

    def _digests(self) -> dict[str, str]:
        return {**self.towers, **self.autoencoder}

    def _check(self, dataset: ShardDataset) -> None:
        own = self._digests()
        if self.is_loaded:
            check_encoders(dataset, own, "the checkpoint")
            return
        try:
            check_encoders(
                dataset,
                own,
                "the model, whose weights are random",
                "put released weights into it with tools/hack_weights.py",
            )
        except UserError as error:
            log.warning("%s", error)


def _known(digests: Mapping[str, Any], names: Iterable[str]) -> dict[str, str]:
    return {name: digests[name] for name in names if digests.get(name) is not None}
