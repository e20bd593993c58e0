"""α of LoRA files that store it beside the tensors: in the metadata (diffusers), or in `adapter_config.json` (PEFT)."""

from __future__ import annotations

import json
import logging
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ldm.checkpoint.diffusers_files import read_json
from ldm.util import UserError, refuse_if

log = logging.getLogger(__name__)

PEFT = "base_model.model."  # start of the keys in PEFT's files
_METADATA = "lora_adapter_metadata"  # of diffusers
_CONFIG = "adapter_config.json"  # of PEFT
_MOST_ALPHA = 1e9


class Alphas:
    """α of the layers of a LoRA file, as far as the file, or the config beside it, tells it outside of the tensors.

    Args:
        metadata: of the file.
        of_peft: True if the keys are those of PEFT.

    Raises:
        UserError: the metadata or the config are damaged.
    """

    def __init__(self, metadata: Mapping[str, str], path: str | Path, of_peft: bool) -> None:
        self.path, self.place, self.of_peft = Path(path), "its metadata", of_peft
        config = self.path.with_name(_CONFIG)
        if _METADATA in metadata or not (of_peft and config.is_file()):
            self.values = _parsed(metadata.get(_METADATA, "{}"), path)
            if of_peft and not self.values:
                log.warning("%s: no %s beside it tells alpha, and the scale is taken for 1; copy it too", path, _CONFIG)
            return
        self.values, self.place = read_json(config), _CONFIG

    def of(self, part: str, layer: str, rank: int | None) -> float | None:
        """Return α of the layer with the dotted path `layer`, or None if it is the rank.

        A rank-stabilised scale is α/√r (arXiv:2312.03732) instead of α/r: then the result is α √r.
        """
        alpha, others = self._value(part, "lora_alpha"), self._value(part, "alpha_pattern") or {}
        if alpha is None and self.of_peft:
            alpha = self.values.get("alpha")  # of LoHa and LoKr
        if not isinstance(others, dict):
            raise UserError(f"{self.path}: alpha_pattern {others!r:.40} in {self.place} is no dict; save it again")
        for name in others:
            refuse_if(
                not re.fullmatch(r"[\w.]+", name),
                f"{self.path}: alpha_pattern {name!r:.80} is not the name of a layer; fuse the file",
            )
        alpha = next((other for name, other in others.items() if f".{layer}".endswith(f".{name}")), alpha)
        refuse_if(
            alpha is not None and not (isinstance(alpha, (int, float)) and abs(alpha) < _MOST_ALPHA),
            f"{self.path}: lora_alpha {alpha!r:.40} in {self.place} is not a number; save it again",
        )
        if alpha is not None and rank and self._value(part, "use_rslora"):
            return alpha * math.sqrt(rank)
        return alpha

    def _value(self, part: str, name: str) -> Any:
        return self.values.get(name if self.place == _CONFIG else f"{part}.{name}")


def _parsed(text: str, path: str | Path) -> dict[str, Any]:
    try:
        values = json.loads(text)
    except (ValueError, RecursionError):
        values = None
    refuse_if(
        not isinstance(values, dict), f"{path}: its metadata {_METADATA} is damaged; save the file again without it"
    )
    return values
