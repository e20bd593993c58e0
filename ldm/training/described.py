"""Objects that the section `lightning` describes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pytorch_lightning.utilities.exceptions import MisconfigurationException

from ldm.util import UserError, instantiate_from_config

# Classes of 2022 that Lightning no longer has, and one that ranks by scores of weights that are gone.
MOVED = {
    "pytorch_lightning.callbacks.ModelCheckpoint": "ldm.callbacks.kept.KeptCheckpoints",
    "lightning.pytorch.callbacks.ModelCheckpoint": "ldm.callbacks.kept.KeptCheckpoints",
    "pytorch_lightning.loggers.TestTubeLogger": "pytorch_lightning.loggers.TensorBoardLogger",
    "pytorch_lightning.plugins.DDPPlugin": "pytorch_lightning.strategies.DDPStrategy",
}


def instantiate_described(described: Mapping[str, Any], where: str) -> Any:
    """`instantiate_from_config` that knows what moved, and names the place in the config in its errors."""
    target = described.get("target")
    try:
        return instantiate_from_config({**described, "target": MOVED.get(target, target)} if target else described)
    except (UserError, MisconfigurationException) as error:
        raise UserError(f"{where}: {error}") from error
