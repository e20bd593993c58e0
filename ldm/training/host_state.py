"""Training on one device what stays on the host."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from omegaconf import DictConfig
from pytorch_lightning.strategies import SingleDeviceStrategy

from ldm.modules.diffusionmodules.util import StaysOnHost
from ldm.training.trainer_2022 import is_single
from ldm.util import UserError, get_obj_from_str


class HostStateStrategy(SingleDeviceStrategy):
    """One device, where a resume leaves the optimizer's state beside the parameters instead of moving it there."""

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        # A hacked checkpoint has no states.
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=False):
            optimizer.load_state_dict(state)


def streams_weights(config: DictConfig) -> bool:
    """Whether the weights of the UNet that `config` describes stay on the host."""
    target = ((config.model.get("params") or {}).get("unet_config") or {}).get("target")
    unet = get_obj_from_str(target) if target else None
    return isinstance(unet, type) and issubclass(unet, StaysOnHost)


def host_state_strategy(arguments: Mapping[str, Any], has_cuda: bool) -> HostStateStrategy:
    """The strategy of a model whose weights stay on the host, under the Trainer's `arguments`.

    Raises:
        UserError: there are several devices or machines, or a strategy is asked for.
    """
    devices = arguments["devices"]
    if not is_single(arguments) or arguments.get("strategy", "auto") != "auto":
        raise UserError(
            f"weights that stay on the host train on one device, without a strategy; given: devices={devices!r}, "
            f"num_nodes={arguments.get('num_nodes', 1)!r}, strategy={arguments.get('strategy')!r}"
        )
    number = devices[0] if isinstance(devices, list) else 0
    on_gpu = has_cuda and arguments.get("accelerator", "auto") in ("auto", "gpu", "cuda")
    return HostStateStrategy(torch.device("cuda", number) if on_gpu else torch.device("cpu"))
