"""Batches of training data."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ldm.util import UserError

Batch = Mapping[str, Any]


def batch_entry(batch: Batch, key: str) -> Any:
    """Return `batch[key]`.

    Raises:
        UserError: the batch has no such entry.
    """
    if key not in batch:
        raise UserError(f"the model reads the batch entry {key!r}, but the data have {', '.join(map(repr, batch))}")
    return batch[key]
