"""AdamW with moments in 8 or 4 bits, and bfloat16 weights that are rounded stochastically. Needs torchao.

torchao quantises in blocks with a scale each (8 bits: arXiv:2110.02861; 4 bits: arXiv:2309.01507). An update of a
bfloat16 weight is usually smaller than half the distance to the next one, so that rounding to the nearest would lose
it; rounding up with the probability that the remainder is of that distance keeps it on average.

Changed here is what torchao leaves to its users: what checkpoints hold, small parameters, and the CPU.
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

# The parts of torchao's quantised tensors that change. The rest of one follows from the parameter and from "signed".
_PARTS = ("codes", "scale")


class _LowBit:
    """What the classes below change of torchao's.

    - `state_dict` holds plain tensors: a quantised moment is the dict `{"codes", "scale", "signed"}`, which any safe
      reader of checkpoints takes. `load_state_dict` takes that back bit for bit, and the moments of any other AdamW,
      which it quantises.
    - Parameters too small to quantise have float32 moments. torchao gives them the parameter's type, in which a second
      moment stands still: 1 − β₂ is less than bfloat16 resolves.
    - On the CPU nothing is compiled: that would take a C++ compiler, and minutes.

    Args:
        params: parameters, or parameter groups.
        lr: learning rate; kept as a tensor, as torchao does.
        bf16_stochastic_round: round bfloat16 weights stochastically; without effect on others.
        kwargs: torchao's: betas, eps, weight_decay, amsgrad, block_size.
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
        """One step of the parameters that have a gradient; returns what the closure returns."""
        result = None
        if closure is not None:
            with torch.enable_grad():
                result = closure()
        on_cpu = all(p.device.type == "cpu" for group in self.param_groups for p in group["params"])
        with torch.compiler.set_stance("force_eager") if on_cpu else nullcontext():
            super().step()
        return result

    def state_dict(self) -> dict[str, Any]:
        """As of any optimizer, all of it plain tensors and numbers that share memory with the state."""
        content = super().state_dict()
        content["state"] = {
            index: {name: _plain(value) for name, value in moments.items()}
            for index, moments in content["state"].items()
        }
        return content

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take back what `state_dict` gave, or that of another AdamW.

        Raises:
            ValueError: it is the state of other parameters, or quantised in another way.
        """
        super().load_state_dict({**state_dict, "state": {}})
        for group in self.param_groups:
            group["lr"] = torch.as_tensor(group["lr"], dtype=torch.float32)  # another AdamW's is a number
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
