"""AdamW with 8-bit or 4-bit moments and stochastically rounded bfloat16 weights. Needs torchao.

torchao quantises in blocks with one scale each (8 bits: arXiv:2110.02861; 4 bits: arXiv:2309.01507). An update of a
bfloat16 weight is usually smaller than half the distance to the next value, so that rounding to nearest would lose it.
Stochastic rounding rounds up with a probability equal to the remainder's share of that distance, which keeps the update
on average.

This module changes the content of checkpoints, the moments of small parameters, and the step of parameters on the host.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from ldm.modules.cpu import is_on_cpu
from ldm.optim.host_step import own_noise, shared_noise, step_on_host
from ldm.optim.quantised import torchao
from ldm.util import refuse_if

# Parts of torchao's quantised tensors that change. All other parts follow from the parameter and from "signed".
_PARTS = ("codes", "scale")


class _LowBit:
    """Changes to torchao's optimizers that the classes below share.

    - `state_dict` holds plain tensors. A quantised moment is the dict `{"codes", "scale", "signed"}`, which a safe
      reader of checkpoints accepts. `load_state_dict` takes it back bit for bit. It also takes the moments of another
      AdamW and quantises them.
    - Parameters too small to quantise have float32 moments. torchao gives them the parameter's type. A bfloat16 second
      moment does not move, because 1 − β₂ is below its resolution.
    - Parameters on the host are stepped in chunks, with the same results in less time and memory, and without a C++
      compiler.

    Args:
        params: parameters, or parameter groups.
        lr: learning rate; kept as a tensor, as torchao does.
        bf16_stochastic_round: round bfloat16 weights stochastically; no effect on others.
        keyed_rounding: take the random numbers of that rounding from a stream for each parameter and step, named by
            torch's seed, the parameter's position and its number of steps. The result then does not depend on the order
            in which parameters are stepped. No effect on parameters that are not on the host.
        kwargs: torchao's arguments: betas, eps, weight_decay, block_size; except `amsgrad`, which torchao takes and
            cannot compute.

    Raises:
        UserError: `amsgrad` is true.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        lr: float = 1e-3,
        bf16_stochastic_round: bool = True,
        keyed_rounding: bool = False,
        **kwargs: Any,
    ) -> None:
        refuse_if(kwargs.get("amsgrad"), "amsgrad: leave it out; torchao cannot quantise its third moment")
        self.keyed_rounding = keyed_rounding
        self._positions: dict[nn.Parameter, int] = {}
        super().__init__(params, lr, bf16_stochastic_round=bf16_stochastic_round, **kwargs)

    def _new_buffer(self, p: Tensor, signed: bool) -> Tensor:
        buffer = super()._new_buffer(p, signed)
        return buffer if _is_quantised(buffer) else buffer.float()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters; `Optimizer` calls this for the first ones too."""
        super().add_param_group(param_group)
        for parameter in self.param_groups[-1]["params"]:
            self._positions.setdefault(parameter, len(self._positions))

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Step the parameters that have a gradient. Return the result of the closure."""
        result = None
        if closure is not None:
            with torch.enable_grad():
                result = closure()
        everything = [group["params"] for group in self.param_groups]
        try:
            for group in self.param_groups:
                self._step_those_on_host(group)
                group["params"] = [parameter for parameter in group["params"] if not is_on_cpu(parameter)]
            super().step()
        finally:
            for group, params in zip(self.param_groups, everything, strict=True):
                group["params"] = params
        return result

    @torch.no_grad()
    def _step_those_on_host(self, group: Mapping[str, Any]) -> None:
        for parameter in group["params"]:
            if parameter.grad is None or not is_on_cpu(parameter):
                continue
            state = self.state[parameter]
            if not state:
                state["step"] = torch.tensor(0.0)
                for name in ("exp_avg", "exp_avg_sq"):
                    state[name] = self._new_buffer(parameter, signed=name == "exp_avg")
            state["step"] += 1
            noise = None
            if self.bf16_stochastic_round and self.keyed_rounding:
                noise = own_noise(torch.initial_seed(), self._positions[parameter], int(state["step"].item()))
            elif self.bf16_stochastic_round:
                noise = shared_noise
            step_on_host(parameter, state, group, noise)

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
            ValueError: the state belongs to other parameters, is quantised in another way, or has amsgrad.
        """
        if any(group.get("amsgrad") for group in state_dict["param_groups"]):
            raise ValueError("loaded state dict has amsgrad, and the low-bit optimizers cannot compute it")
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
    return hasattr(tensor, "codes")


def _plain(value: Any) -> Any:
    if not isinstance(value, Tensor) or not _is_quantised(value):
        return value
    return {part: getattr(value, part) for part in _PARTS} | {"signed": value.signed}


class AdamW8bit(_LowBit, torchao.AdamW8bit):
    """AdamW with 8-bit moments, in blocks of 256 values by default."""


class AdamW4bit(_LowBit, torchao.AdamW4bit):
    """AdamW with 4-bit moments, in blocks of 128 values by default."""
