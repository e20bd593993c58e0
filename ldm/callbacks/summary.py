"""Callback that logs a summary of the model."""

from __future__ import annotations

import logging
from typing import Any

from pytorch_lightning.callbacks import ModelSummary
from pytorch_lightning.utilities.model_summary.model_summary import get_human_readable_count

log = logging.getLogger(__name__)

_COLUMNS = ("Name", "Type", "Params", "Mode")


class ParameterSummary(ModelSummary):
    """Lightning's model summary without FLOPs and sizes, which it cannot compute for these models."""

    @staticmethod
    def summarize(
        summary_data: list[tuple[str, list[str]]], total_parameters: int, trainable_parameters: int, *_: Any, **__: Any
    ) -> None:
        """Log one line per module, from Lightning's table of columns."""
        columns = dict(summary_data)
        widths = [max(map(len, columns[name]), default=0) for name in _COLUMNS]
        for row in zip(*(columns[name] for name in _COLUMNS), strict=True):
            log.info("  %s", "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
        counts = (get_human_readable_count(count).strip() for count in (total_parameters, trainable_parameters))
        log.info("  %s parameters, %s of them trained", *counts)
