"""Labels `y` of a UNet, in addition to text: classes, a number, a timestep, or a vector of features.

The embedding of the label is added to that of the time. B: batch. E: features of the time embedding.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ldm.modules.diffusionmodules.layers import embedding_mlp, timestep_embedding
from ldm.util import UserError, check_number

_KINDS = ("continuous", "timestep", "sequential")


def label_embedding(num_classes: int | str, model_channels: int, adm_in_channels: int | None) -> nn.Module:
    """Return the layers from `label_features` to (B, E), with E = 4 · model_channels.

    Raises:
        UserError: `num_classes` is neither a number nor a known kind, or `adm_in_channels` is missing.
    """
    features = 4 * model_channels
    if isinstance(num_classes, int) and not isinstance(num_classes, bool) and num_classes > 0:
        return nn.Embedding(num_classes, features)
    if num_classes == "continuous":
        return nn.Linear(1, features)
    if num_classes == "timestep":  # in the released keys, the sinusoidal embedding is layer 0
        return nn.Sequential(nn.Identity(), embedding_mlp(model_channels, features))
    if num_classes == "sequential":
        check_number("adm_in_channels", adm_in_channels, least=1, unit="features of y")
        return nn.Sequential(embedding_mlp(adm_in_channels, features))
    raise UserError(f"num_classes {num_classes!r} is unknown; give a number of classes, or one of {', '.join(_KINDS)}")


def check_labels(y: Tensor | None, batch: int, num_classes: int | str | None, adm_in_channels: int | None) -> None:
    """Raise `ValueError` unless `y` matches a UNet with these arguments and `batch` samples."""
    fault = None
    if (y is None) != (num_classes is None):
        fault = f"class labels y={y} do not match a UNetModel with num_classes={num_classes}"
    elif y is not None and y.shape[:1] != (batch,):
        fault = f"labels y of shape {tuple(y.shape)} for a batch of {batch}: give one per sample"
    elif y is not None and adm_in_channels is not None and y.shape[1:] != (adm_in_channels,):
        fault = f"the vector y has shape {tuple(y.shape)}; adm_in_channels requires (B, {adm_in_channels})"
    if fault is not None:
        raise ValueError(fault)


def label_features(y: Tensor, num_classes: int | str, model_channels: int, dtype: torch.dtype) -> Tensor:
    """Return the input of `label_embedding`: class numbers unchanged, other labels as features of type `dtype`."""
    if num_classes == "timestep":
        y = timestep_embedding(y, model_channels)  # (B,) → (B, model_channels)
    return y.to(dtype) if isinstance(num_classes, str) else y
