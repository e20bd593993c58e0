"""Exponential moving average of a module's weights."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ldm.modules.diffusionmodules.layers import KeepsTypes, StaysOnHost
from ldm.util import check_number


def shadow_name(parameter_path: str) -> str:
    """Return the name of the buffer that shadows the parameter at `parameter_path`: the path without its dots."""
    return parameter_path.replace(".", "")


class LitEma(StaysOnHost, KeepsTypes, nn.Module):
    """Shadow buffers θ' ← θ' − (1 − d)(θ' − θ) of every trainable parameter of `model`.

    With `use_num_updates`, d is at most (1 + n) / (10 + n) after n updates, to forget the initial weights.
    The shadows of a model that stays on the host also stay there. `paths`, if given, name the parameters instead.

    Raises:
        UserError: `decay` is outside [0, 1].
    """

    def __init__(
        self,
        model: nn.Module,
        decay: float = 0.9999,
        use_num_updates: bool = True,
        paths: Iterable[str] | None = None,
    ) -> None:
        super().__init__()
        check_number("EMA decay", decay, least=0, most=1, whole=False)
        self.stays_on_host = any(isinstance(part, StaysOnHost) for part in model.modules())
        if paths is None:
            paths = (path for path, parameter in model.named_parameters() if parameter.requires_grad)
        self.m_name2s_name = {path: shadow_name(path) for path in paths}
        self.register_buffer("decay", torch.tensor(decay, dtype=torch.float32))
        self.register_buffer("num_updates", torch.tensor(0 if use_num_updates else -1, dtype=torch.int))
        for path, name in self.m_name2s_name.items():
            self.register_buffer(name, model.get_parameter(path).detach().clone())
        self.collected_params: list[Tensor] = []

    def _pairs(self, model: nn.Module) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield each shadow and its parameter of `model`."""
        # All names in one walk: a lookup of each path by itself takes 7 times as long, in every step.
        parameters = dict(model.named_parameters(remove_duplicate=False))
        return ((self._buffers[name], parameters[path]) for path, name in self.m_name2s_name.items())

    @torch.no_grad()
    def forward(self, model: nn.Module) -> None:
        """Update the shadows from `model`."""
        # Only tensor arithmetic: reading a value back would stall a GPU at every step.
        counting = self.num_updates >= 0
        self.num_updates += counting.to(self.num_updates.dtype)
        warm = (1 + self.num_updates) / (10 + self.num_updates)
        weight = 1 - torch.where(counting, torch.minimum(self.decay, warm), self.decay)
        for shadow, parameter in self._pairs(model):
            shadow.lerp_(parameter.to(shadow.dtype), weight.to(shadow.dtype))

    @torch.no_grad()
    def copy_to(self, model: nn.Module) -> None:
        """Overwrite the trainable parameters of `model` with the shadows."""
        for shadow, parameter in self._pairs(model):
            parameter.copy_(shadow)

    @contextmanager
    def applied_to(self, model: nn.Module) -> Iterator[None]:
        """Give `model` the averaged weights in this context. A nested context changes nothing."""
        if self.collected_params:
            yield
            return
        self.store(model.parameters())
        try:
            self.copy_to(model)
            yield
        finally:
            self.restore(model.parameters())

    def store(self, parameters: Iterable[nn.Parameter]) -> None:
        """Store a copy of `parameters` for `restore`."""
        self.collected_params = [parameter.detach().clone() for parameter in parameters]

    @torch.no_grad()
    def restore(self, parameters: Iterable[nn.Parameter]) -> None:
        """Restore the values of `parameters` from `store`, and drop the copy."""
        for kept, parameter in zip(self.collected_params, parameters, strict=True):
            parameter.copy_(kept)
        self.collected_params = []
