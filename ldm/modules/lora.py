"""Low-rank adaptation (LoRA, arXiv:2106.09685) of a frozen network, of which only small factors are trained.

A layer computes W x + α/r · B A x, with A (r, in) and B (out, r) (section 4.1). For a convolution, A has its kernel and
its stride, and B is 1×1. B starts at zero, so that a new LoRA changes nothing.

The package peft is not used: it puts each layer inside another one, which renames `to_q.weight` to
`to_q.base_layer.weight` in checkpoints. Here a layer keeps its place and its keys, and `to_q.lora.down`, `to_q.lora.up`
and `to_q.lora.alpha` stand beside them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.modules.diffusionmodules.convolution import Conv2d
from ldm.modules.diffusionmodules.layers import KeepsTypes
from ldm.modules.name_patterns import matches
from ldm.util import UserError, check_keys, check_number, nearest, refuse_if

_WHERE = "model.params.lora"
_KEYS = ("rank", "alpha", "targets", "dropout")


class LowRankBranch(KeepsTypes, nn.Module):
    """Factors A and B of a layer, float32 in every precision. They compute in the type of the input.

    Args:
        layer: layer beside which the branch stands.
        rank: r.
        alpha: α, a number above 0.
        dropout: rate at which inputs of the branch are dropped in training.
    """

    def __init__(self, layer: nn.Linear | nn.Conv2d, rank: int, alpha: float, dropout: float) -> None:
        super().__init__()
        outputs, inputs, *kernel = layer.weight.shape
        self.down = nn.Parameter(torch.empty(rank, inputs, *kernel))
        self.up = nn.Parameter(torch.empty(outputs, rank, *(1 for _ in kernel)))
        self.register_buffer("alpha", torch.tensor(float(alpha)))  # for those who read the checkpoint
        self.scale = alpha / rank
        self.dropout = nn.Dropout(dropout)
        self.geometry = (layer.stride, layer.padding, layer.dilation) if isinstance(layer, nn.Conv2d) else None
        self.start()

    def start(self) -> None:
        """Sample A uniformly from ± 1/√(inputs of an output), and set B to zero."""
        nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))
        nn.init.zeros_(self.up)

    def forward(self, x: Tensor) -> Tensor:
        """Return α/r · B A x, with the shape of the layer's output."""
        down, up = self.down.to(x.dtype), self.up.to(x.dtype)
        x = self.dropout(x)
        if self.geometry is None:
            return F.linear(self.scale * F.linear(x, down), up)
        return F.conv2d(self.scale * F.conv2d(x, down, None, *self.geometry), up)

    def _load_from_state_dict(self, state_dict: Mapping[str, Tensor], prefix: str, *args: Any) -> None:
        saved, errors = state_dict.get(f"{prefix}alpha"), args[-1]
        if saved is not None and float(saved) != float(self.alpha):
            errors.append(
                f"{prefix}alpha is {float(saved):g}, the config's is {float(self.alpha):g}; set "
                f"{_WHERE}.alpha={float(saved):g}"
            )
        super()._load_from_state_dict(state_dict, prefix, *args)


class _Adapted:
    """Mixin of a layer with a branch."""

    lora: LowRankBranch

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.lora(x)


class AdaptedLinear(_Adapted, nn.Linear):
    """Linear layer with a branch."""


class AdaptedConvolution(_Adapted, nn.Conv2d):
    """Convolution with a branch."""


class AdaptedConv2d(_Adapted, Conv2d):
    """`Conv2d` of this package with a branch."""


_ADAPTED: dict[type, type] = {nn.Linear: AdaptedLinear, nn.Conv2d: AdaptedConvolution, Conv2d: AdaptedConv2d}


def adapt(network: nn.Module, settings: Mapping[str, Any]) -> None:
    """Freeze `network`, and add a branch to each linear layer and convolution that `settings` name.

    The settings are `rank`, `targets`, and optionally `alpha` (default: the rank) and `dropout` (default: 0). Targets
    are patterns of layer names, as in `ldm.modules.name_patterns`: `attn2`, `attn2.to_k`, `output_blocks.*`.

    Raises:
        UserError: a setting is unknown, missing or out of range, or a target matches no layer.
    """
    check_keys(_WHERE, settings, _KEYS)
    rank, targets = settings.get("rank"), settings.get("targets")
    alpha, dropout = settings.get("alpha"), settings.get("dropout") or 0.0
    check_number(f"{_WHERE}.rank", rank, least=1)
    check_number(f"{_WHERE}.alpha", alpha, above=0, whole=False, optional=True)
    check_number(f"{_WHERE}.dropout", dropout, least=0, most=1, whole=False)
    is_list = isinstance(targets, Sequence) and not isinstance(targets, str)
    refuse_if(dropout == 1, f"{_WHERE}.dropout {dropout!r}: drops all inputs; give less than 1")
    refuse_if(not is_list or not targets, f"{_WHERE}.targets {targets!r}: give a list of names, such as [attn1, attn2]")
    chosen = _matching(network, list(map(str, targets)))
    network.requires_grad_(False)
    for layer in chosen:
        branch = LowRankBranch(layer, rank, rank if alpha is None else alpha, dropout)
        # In place, because other parts of a network may refer to the layer.
        layer.__class__ = _ADAPTED[type(layer)]
        layer.lora = branch


def start_branches(network: nn.Module) -> None:
    """Start all branches of `network` again, without a change of its output."""
    for branch in branches_of(network):
        branch.start()


def branches_of(network: nn.Module) -> list[LowRankBranch]:
    """Return the branches of `network`; none if it has no LoRA."""
    return [module for module in network.modules() if isinstance(module, LowRankBranch)]


def _matching(network: nn.Module, targets: Sequence[str]) -> list[nn.Module]:
    """Return the layers of `network` that match one of `targets`."""
    layers = {path: module for path, module in network.named_modules() if _can_adapt(module)}
    chosen: dict[str, nn.Module] = {}
    for target in targets:
        found = [path for path in layers if matches(target, path)]
        if not found:
            parts = {part for path in layers for part in path.split(".") if not part.isdecimal()}
            raise UserError(f"{_WHERE}.targets {target!r}: matches no layer of the UNet{nearest(target, parts)}")
        chosen |= {path: layers[path] for path in found}
    return list(chosen.values())


def _can_adapt(module: nn.Module) -> bool:
    is_plain = getattr(module, "groups", 1) == 1 and getattr(module, "padding_mode", "zeros") == "zeros"
    return type(module) in _ADAPTED and is_plain
