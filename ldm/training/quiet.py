"""Filters for messages of Lightning and torch that do not apply here."""

from __future__ import annotations

import logging
import warnings

from ldm.distributed.ranks import is_first_process

_WARNINGS = (
    r".*module\(s\) in eval mode at the start of training",  # the frozen stages
    r".*Checkpoint directory .* exists and is not empty",  # a resumed run continues in its folder
    r"Total length of `list` across ranks is zero",  # no validation data
    r"The number of training batches \(\d+\) is smaller than the logging interval",  # appears for every small data set
    r"Precision .* is not supported by the model summary",  # our summary shows no size
    r"`broadcast_buffers` is deprecated",  # its successor does not exist in the oldest supported torch
    r"It is recommended to use `self.log\('device/",  # logged by the first process alone
    r".*isinstance\(treespec, LeafSpec\)",  # from Lightning's own use of torch
    r"To copy construct from a tensor, it is recommended",  # from Lightning's reading of a tensor learning rate
)
_LOGGERS = ("pytorch_lightning.utilities.rank_zero", "pytorch_lightning.trainer.connectors.checkpoint_connector")
_PHRASES = ("Tip:", "TPU available:", "`weights_only` was not set", "Trainer already configured with model summary")


def silence_lightning() -> None:
    """Suppress the warnings and phrases above; in every process except the first, also all messages below warnings."""
    for message in _WARNINGS:
        warnings.filterwarnings("ignore", message=message)
    for name in _LOGGERS:
        logging.getLogger(name).addFilter(_is_relevant)
    if not is_first_process():
        logging.getLogger().setLevel(logging.WARNING)


def _is_relevant(record: logging.LogRecord) -> bool:
    return not any(phrase in record.getMessage() for phrase in _PHRASES)
