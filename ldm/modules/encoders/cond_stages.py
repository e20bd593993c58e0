"""Cond stages without a network, and the base class of all cond stages."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ldm.util import entry_of, refuse_if

logger = logging.getLogger(__name__)


class AbstractEncoder(nn.Module):
    """Cond stage whose `encode` returns the conditioning of a batch; by default it calls the module."""

    def encode(self, *args: Any, **kwargs: Any) -> Any:
        return self(*args, **kwargs)

    def freeze(self) -> None:
        """Set evaluation mode and turn gradients of the parameters off."""
        self.eval()
        self.requires_grad_(False)

    def put_on(self, device: str | torch.device | None) -> None:
        """Move to `device`; stay for None, or for a CUDA device on a machine without CUDA."""
        if device is not None and torch.device(device).type == "cuda" and not torch.cuda.is_available():
            logger.warning("device %s of the text tower: no CUDA here; the text tower stays on the CPU", device)
        elif device is not None:
            self.to(device)


class IdentityEncoder(AbstractEncoder):
    """Cond stage that returns the batch entry itself."""

    def forward(self, x: Any) -> Any:
        return x


class DummyEncoder(AbstractEncoder):
    """Cond stage that returns the batch entry `key`, such as stored text embeddings (B, 77, D)."""

    def __init__(self, key: str) -> None:
        super().__init__()
        self.key = key

    def forward(self, batch: Mapping[str, torch.Tensor] | torch.Tensor) -> torch.Tensor:
        """Return `batch[key]`, or `batch` itself if it is a tensor."""
        return _entry(batch, self.key)


class ClassEmbedder(AbstractEncoder):
    """Learned vector for each of `n_classes` labels; the labels are the batch entry `key`.

    Args:
        ucg_rate: share of labels that training replaces by the last class, which stands for no label.
    """

    def __init__(self, embed_dim: int, n_classes: int = 1000, key: str = "class", ucg_rate: float = 0.0) -> None:
        super().__init__()
        refuse_if(not 0 <= ucg_rate < 1, f"ucg_rate {ucg_rate}: give a number from 0 to below 1")
        self.key = key
        self.n_classes = n_classes
        self.ucg_rate = ucg_rate
        self.embedding = nn.Embedding(n_classes, embed_dim)

    def forward(
        self,
        batch: Mapping[str, torch.Tensor] | torch.Tensor,
        key: str | None = None,
        disable_dropout: bool = False,
    ) -> torch.Tensor:
        """Embed labels (B,), given directly or in a batch, to (B, 1, embed_dim)."""
        labels = _entry(batch, key or self.key)
        if self.ucg_rate and self.training and not disable_dropout:
            dropped = torch.rand(labels.shape, device=labels.device) < self.ucg_rate
            labels = labels.masked_fill(dropped, self.n_classes - 1)
        return self.embedding(labels[:, None])

    def get_unconditional_conditioning(
        self, bs: int, device: str | torch.device | None = None
    ) -> dict[str, torch.Tensor]:
        """Return a batch of `bs` labels of the last class, which means no label."""
        device = self.embedding.weight.device if device is None else device
        return {self.key: torch.full((bs,), self.n_classes - 1, device=device)}


def _entry(batch: Mapping[str, torch.Tensor] | torch.Tensor, key: str) -> torch.Tensor:
    return batch if isinstance(batch, torch.Tensor) else entry_of(batch, key, "cond_stage_config: key")
