"""Contract between loss weightings and the models whose losses they weight. T: timesteps of the schedule."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor, nn


class Weighted(Protocol):
    """Parts of a model that weightings read, or register in `attach`."""

    parameterization: str
    loss_type: str
    num_timesteps: int
    alphas_cumprod: Tensor  # (T,)
    lvlb_weights: Tensor  # (T,)

    def register_buffer(self, name: str, tensor: Tensor | None, persistent: bool = True) -> None: ...

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None: ...
