"""AdamW with 8-bit or 4-bit moments and stochastically rounded bfloat16 weights. Needs torchao.

torchao quantises in blocks with one scale each (8 bits: arXiv:2110.02861; 4 bits: arXiv:2309.01507). An update of a
bfloat16 weight is usually smaller than half the distance to the next value, so that rounding to nearest would lose it.
Stochastic rounding rounds up with a probability equal to the remainder's share of that distance, which keeps the update
on average.

This module changes the content of checkpoints, the moments of small parameters, and the computation on a CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from ldm.util import UserError

try:
    from torchao import optim as torchao
except ModuleNotFoundError as error:
    raise UserError(
        "the low-bit optimizers need torchao, which is not installed: pip install -c constraints.txt '.[lean]'"
    ) from error

# Parts of torchao's quantised tensors that change. All other parts follow from the parameter and from "signed".
_PARTS = ("codes", "scale")


class _LowBit:
    """Changes to torchao's optimizers that the classes below share.

    - `state_dict` holds plain tensors. A quantised moment is the dict `{"codes", "scale", "signed"}`, which a safe
      reader of checkpoints accepts. `load_state_dict` takes it back bit for bit. It also takes the moments of another
      AdamW and quantises them.
    - Parameters too small to quantise have float32 moments. torchao gives them the parameter's type. A bfloat16 second
      moment does not move, because 1 − β₂ is below its resolution.
    - On the CPU nothing is compiled, because that takes a C++ compiler and minutes.

    Args:
        params: parameters, or parameter groups.
        lr: learning rate; kept as a tensor, as torchao does.
        bf16_stochastic_round: round bfloat16 weights stochastically; no effect on others.
        kwargs: torchao's arguments: betas, eps, weight_decay, amsgrad, block_size.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        lr: float = 1e-3,
        bf16_stochastic_round: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(params, lr, bf16_stochastic_round=bf16_stochastic_round, **kwargs)

    def _new_buffer(self, p: Tensor, signed: bool) -> Tensor:
        buffer = super()._new_buffer(p, signed)
        return buffer if _is_quantised(buffer) else buffer.float()

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Step the parameters that have a gradient. Return the result of the closure."""
        result = None
        if closure is not None:
            with torch.enable_grad():
                result = closure()
        on_cpu = all(p.device.type == "cpu" for group in self.param_groups for p in group["params"])
        with torch.compiler.set_stance("force_eager") if on_cpu else nullcontext():
            super().step()
        return result

    def state_dict(self) -> dict[str, Any]:
        """Return the state as plain tensors and numbers, which share memory with it."""
        content = super().state_dict()
        content["state"] = {
            index: {name: _plain(value) for name, value in moments.items()}
            for index, moments in content["state"].items()
        }
        return content

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Load a result of `state_dict`, or the state dict of another AdamW.

        Raises:
            ValueError: the state belongs to other parameters, or is quantised in another way.
        """
        super().load_state_dict({**state_dict, "state": {}})
        for group in self.param_groups:
            group["lr"] = torch.as_tensor(group["lr"], dtype=torch.float32)  # a number in the state of another AdamW
        indices = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
        parameters = chain.from_iterable(group["params"] for group in self.param_groups)
        for index, parameter in zip(indices, parameters, strict=True):
            for name, saved in state_dict["state"].get(index, {}).items():
                self.state[parameter][name] = saved if name == "step" else self._restored(parameter, name, saved)

    def _restored(self, parameter: nn.Parameter, name: str, saved: Any) -> Tensor:
        if isinstance(saved, Tensor):
            return self._new_buffer(parameter, signed=name == "exp_avg").copy_(saved)
        buffer = self._new_buffer(parameter, saved["signed"])
        for part in _PARTS:
            shape = tuple(getattr(buffer, part).shape) if _is_quantised(buffer) else None
            if shape != tuple(saved[part].shape):
                raise ValueError(
                    f"loaded state dict has {part} of shape {tuple(saved[part].shape)} where this optimizer has {shape}"
                    ": other parameters, bits or block_size"
                )
            setattr(buffer, part, saved[part].to(parameter.device))
        return buffer


def _is_quantised(tensor: Tensor) -> bool:
    return type(tensor) is not Tensor


def _plain(value: Any) -> Any:
    if not isinstance(value, Tensor) or not _is_quantised(value):
        return value
    return {part: getattr(value, part) for part in _PARTS} | {"signed": value.signed}


class AdamW8bit(_LowBit, torchao.AdamW8bit):
    """AdamW with 8-bit moments, in blocks of 256 values by default."""


class AdamW4bit(_LowBit, torchao.AdamW4bit):
    """AdamW with 4-bit moments, in blocks of 128 values by default."""
