"""Labels `y` that a UNet takes besides text: classes, a number, a timestep, or a vector of features.

B batch, E features of the time embedding, to which the label's embedding is added.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ldm.modules.diffusionmodules.util import embedding_mlp, timestep_embedding
from ldm.util import UserError

_KINDS = ("continuous", "timestep", "sequential")


def label_embedding(num_classes: int | str, model_channels: int, adm_in_channels: int | None) -> nn.Module:
    """Return the layers from `label_features` to (B, E), with E = 4 · model_channels.

    Raises:
        UserError: `num_classes` is neither a number nor a known word, or its `adm_in_channels` is missing.
    """
    features = 4 * model_channels
    if isinstance(num_classes, int) and not isinstance(num_classes, bool) and num_classes > 0:
        return nn.Embedding(num_classes, features)
    if num_classes == "continuous":
        return nn.Linear(1, features)
    if num_classes == "timestep":  # in the released keys the sinusoidal embedding is the first layer
        return nn.Sequential(nn.Identity(), embedding_mlp(model_channels, features))
    if num_classes == "sequential":
        if not isinstance(adm_in_channels, int) or adm_in_channels < 1:
            raise UserError(
                f"adm_in_channels {adm_in_channels!r}: num_classes 'sequential' needs the number of features of y"
            )
        return nn.Sequential(embedding_mlp(adm_in_channels, features))
    raise UserError(f"num_classes {num_classes!r} is unknown; give a number of classes, or one of {', '.join(_KINDS)}")


def check_labels(y: Tensor | None, batch: int, num_classes: int | str | None, adm_in_channels: int | None) -> None:
    """Raise `ValueError` unless `y` fits a UNet with these arguments and `batch` samples."""
    if (y is None) != (num_classes is None):
        raise ValueError(f"class labels y={y} do not fit a UNetModel with num_classes={num_classes}")
    if y is None:
        return
    if y.shape[:1] != (batch,):
        raise ValueError(f"labels y of shape {tuple(y.shape)} for a batch of {batch}: give one per sample")
    if adm_in_channels is not None and y.shape[1:] != (adm_in_channels,):
        raise ValueError(f"the vector y has shape {tuple(y.shape)}; adm_in_channels asks for (B, {adm_in_channels})")


def label_features(y: Tensor, num_classes: int | str, model_channels: int, dtype: torch.dtype) -> Tensor:
    """Return the input of `label_embedding`: class numbers unchanged, all else as features of type `dtype`."""
    if num_classes == "timestep":
        y = timestep_embedding(y, model_channels)  # (B,) → (B, model_channels)
    return y.to(dtype) if isinstance(num_classes, str) else y
