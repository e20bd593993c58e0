"""Conditioning dropout in training, for classifier-free guidance (arXiv:2207.12598)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ldm.models.diffusion.batch import Batch, batch_entry
from ldm.models.diffusion.random_streams import RandomStreams
from ldm.util import UserError


class Replacement(NamedTuple):
    """Value that replaces a batch entry in a share of the samples."""

    share: float
    value: Any


def replacements_of(config: Mapping[str, Mapping[str, Any]] | None) -> dict[str, Replacement]:
    """Read `ucg_training`, which maps a batch entry to `p` and `val`.

    Raises:
        UserError: `p` is missing or not from 0 to 1, or there is another key.
    """
    found = {}
    for entry, rule in (config or {}).items():
        if not isinstance(rule, Mapping) or set(rule) - {"p", "val"} or not 0 <= rule.get("p", -1) <= 1:
            raise UserError(f"ucg_training.{entry} {rule!r}: give p, from 0 to 1, and val, the replacement")
        value = rule.get("val")
        found[entry] = Replacement(rule["p"], "" if value is None else value)
    return found


def replaced(batch: Batch, replacements: Mapping[str, Replacement], device: torch.device) -> Batch:
    """Return `batch` with entries of random samples replaced, chosen by the random streams of the batch."""
    if not replacements:
        return batch
    streams, changed = RandomStreams.of(batch), {}
    for entry, (share, value) in replacements.items():
        old = batch_entry(batch, entry)
        chosen = streams.uniform(f"replace/{entry}", torch.empty(len(old), device=device)) < share  # (B,)
        if isinstance(old, Tensor):
            if isinstance(value, str):
                raise UserError(
                    f"ucg_training.{entry}: the batch has stored encodings, which the caption {value!r} cannot "
                    "replace; set data.params.null_cond_dropout instead"
                )
            filled = torch.full_like(old, value)
            changed[entry] = torch.where(chosen.view(-1, *(1,) * (old.ndim - 1)), filled, old)
        else:
            changed[entry] = [
                value if is_chosen else item for item, is_chosen in zip(old, chosen.tolist(), strict=True)
            ]
    return {**batch, **changed}
