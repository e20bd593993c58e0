"""Messages of Lightning that do not apply here, so that those that do are read."""

from __future__ import annotations

import logging
import os
import warnings

_WARNINGS = (
    r".*module\(s\) in eval mode at the start of training",  # the frozen stages
    r".*Checkpoint directory .* exists and is not empty",  # a resumed run goes on in its folder
    r"Total length of `list` across ranks is zero",  # no validation data
    r".*isinstance\(treespec, LeafSpec\)",  # Lightning's own use of torch
)


def silence_lightning() -> None:
    """Leave out the warnings above, the advertisements, and what each process but the first would repeat."""
    for message in _WARNINGS:
        warnings.filterwarnings("ignore", message=message)
    logging.getLogger("pytorch_lightning.utilities.rank_zero").addFilter(_is_no_advertisement)
    if os.environ.get("LOCAL_RANK", "0") != "0":
        logging.getLogger().setLevel(logging.WARNING)


def _is_no_advertisement(record: logging.LogRecord) -> bool:
    return "Tip:" not in record.getMessage()
