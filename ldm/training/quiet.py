"""Messages of Lightning that do not apply here, so that those that do are read."""

from __future__ import annotations

import logging
import warnings

from ldm.distributed.ranks import is_first_process

_WARNINGS = (
    r".*module\(s\) in eval mode at the start of training",  # the frozen stages
    r".*Checkpoint directory .* exists and is not empty",  # a resumed run goes on in its folder
    r"Total length of `list` across ranks is zero",  # no validation data
    r"The number of training batches \(\d+\) is smaller than the logging interval",  # said of any small data set
    r"Precision .* is not supported by the model summary",  # which shows no size
    r"`broadcast_buffers` is deprecated",  # its successor is newer than the oldest torch that will do
    r"It is recommended to use `self.log\('device/",  # of the first process alone
    r".*isinstance\(treespec, LeafSpec\)",  # Lightning's own use of torch
    r"To copy construct from a tensor, it is recommended",  # so is its reading of a learning rate that is a tensor
)
_LOGGERS = ("pytorch_lightning.utilities.rank_zero", "pytorch_lightning.trainer.connectors.checkpoint_connector")
_PHRASES = ("Tip:", "TPU available:", "`weights_only` was not set", "Trainer already configured with model summary")


def silence_lightning() -> None:
    """Leave out the warnings and phrases above, and what each process but the first would repeat."""
    for message in _WARNINGS:
        warnings.filterwarnings("ignore", message=message)
    for name in _LOGGERS:
        logging.getLogger(name).addFilter(_says_something)
    if not is_first_process():
        logging.getLogger().setLevel(logging.WARNING)


def _says_something(record: logging.LogRecord) -> bool:
    return not any(words in record.getMessage() for words in _PHRASES)
