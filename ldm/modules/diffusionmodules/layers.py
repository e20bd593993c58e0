"""Shared layers and small functions of the diffusion models."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import TypeVar

import torch
import torch.utils.checkpoint
from torch import Tensor, nn

from ldm.modules.diffusionmodules.convolution import Conv2d

# These functions are also public under this module's name.
from ldm.modules.diffusionmodules.schedule import (  # noqa: F401
    extract_into_tensor,
    make_beta_schedule,
    make_ddim_timesteps,
)

ModuleT = TypeVar("ModuleT", bound=nn.Module)

_CONVOLUTIONS = {1: nn.Conv1d, 2: Conv2d, 3: nn.Conv3d}
_AVERAGE_POOLS = {1: nn.AvgPool1d, 2: nn.AvgPool2d, 3: nn.AvgPool3d}


class KeepsTypes:
    """Mixin for a module whose own buffers and parameters stay float32 when the module is cast to bfloat16.

    Submodules are cast. In bfloat16 the early steps of a noise schedule have ᾱ = 1, a moving average never changes,
    and a learned log variance changes too little.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], *args: bool) -> nn.Module:
        before = dict(self._buffers)
        values = {name: parameter.data for name, parameter in self._parameters.items() if parameter is not None}
        super()._apply(fn, *args)
        for name, buffer in before.items():
            after = self._buffers[name]
            if buffer is not None and after.dtype != buffer.dtype:
                self._buffers[name] = buffer.to(after.device)
        for name, value in values.items():
            after = self._parameters[name]
            if after.dtype != value.dtype:
                after.data = value.to(after.device)
        return self


class StaysOnHost:
    """Mixin for a module whose tensors stay in host memory when the model is moved; they are cast as others are."""

    stays_on_host = True

    def _apply(self, fn: Callable[[Tensor], Tensor], *args: bool) -> nn.Module:
        if not self.stays_on_host:
            return super()._apply(fn, *args)
        # The type that `fn` gives is that of an empty tensor, which goes where the others do not.
        return super()._apply(lambda tensor: tensor.to(fn(tensor.new_empty(0)).dtype), *args)


def conv_nd(dims: int, *args: int, **kwargs: int) -> nn.Module:
    """Return a convolution over `dims` (1, 2 or 3) spatial dimensions."""
    return _CONVOLUTIONS[dims](*args, **kwargs)


def avg_pool_nd(dims: int, *args: int, **kwargs: int) -> nn.Module:
    """Return average pooling over `dims` (1, 2 or 3) spatial dimensions."""
    return _AVERAGE_POOLS[dims](*args, **kwargs)


def normalization(channels: int, eps: float = 1e-5) -> nn.GroupNorm:
    """Return a group norm with 32 groups. Its kernel sums half-precision inputs in float32."""
    return nn.GroupNorm(32, channels, eps=eps)


def zero_module(module: ModuleT) -> ModuleT:
    """Return `module` with every parameter set to zero, so that a residual branch starts as the identity."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


def embedding_mlp(in_features: int, features: int) -> nn.Sequential:
    """Return two linear layers around a SiLU, to embed timesteps and labels: (B, in_features) → (B, features)."""
    return nn.Sequential(nn.Linear(in_features, features), nn.SiLU(), nn.Linear(features, features))


# Operations with nearly all of a forward's cost: convolutions, matrix products, and each attention kernel.
_COSTLY = [
    torch.ops.aten.convolution.default,
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten.bmm.default,
    torch.ops.aten.baddbmm.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
]
_keep_costly = functools.partial(torch.utils.checkpoint.create_selective_checkpoint_contexts, _COSTLY)


def checkpoint(function: Callable[..., Tensor], *args: Tensor | None, enabled: bool | str) -> Tensor:
    """Return `function(*args)`; if `enabled`, backward recomputes its activations instead of keeping them.

    `"selective"` keeps the results of convolutions, matrix products and attention, and recomputes only cheap operations
    (norms, activations, sums). The non-reentrant form leaves frozen parameters alone. It works under autocast and
    `torch.compile`.
    """
    if not enabled or not torch.is_grad_enabled():
        return function(*args)
    contexts = {"context_fn": _keep_costly} if enabled == "selective" else {}
    return torch.utils.checkpoint.checkpoint(function, *args, use_reentrant=False, **contexts)


def timestep_embedding(timesteps: Tensor, dim: int, max_period: float = 10000.0) -> Tensor:
    """Return the sinusoidal embedding (N,) → (N, dim), cosines first, in float32 (arXiv:1706.03762, section 3.5).

    `timesteps` may be fractional. An odd `dim` ends with a zero.
    """
    half = dim // 2
    frequencies = torch.exp(
        -math.log(max_period) / half * torch.arange(half, dtype=torch.float32, device=timesteps.device)
    )
    angles = timesteps.float()[:, None] * frequencies[None]
    return nn.functional.pad(torch.cat([angles.cos(), angles.sin()], dim=1), (0, dim % 2))
