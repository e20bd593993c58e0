"""Tests of the strategy for weights that stay on the host."""

from __future__ import annotations

import copy

import pytest
import torch
from omegaconf import OmegaConf
from pytorch_lightning.strategies import SingleDeviceStrategy

from ldm.config.load import build_model
from ldm.training.strategies import HostStateStrategy, choose_strategy, host_state_strategy, streams_weights
from ldm.util import UserError
from tests.training_runs import CONFIG


def resumed(strategy: SingleDeviceStrategy) -> torch.device:
    """Return the device of the optimizer state of a host parameter after a resume with `strategy`."""
    parameter = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([parameter])
    parameter.grad = torch.ones(3)
    optimizer.step()
    strategy._optimizers = [optimizer]
    strategy.load_optimizer_state_dict({"optimizer_states": [copy.deepcopy(optimizer.state_dict())]})
    return optimizer.state[parameter]["exp_avg"].device


def test_a_resume_keeps_the_state_on_the_device_of_its_parameter() -> None:
    assert resumed(SingleDeviceStrategy("meta")).type == "meta"
    assert resumed(HostStateStrategy("meta")).type == "cpu"


def test_streams_weights() -> None:
    config = OmegaConf.create(CONFIG)
    assert not streams_weights(build_model(config))
    target = "ldm.modules.diffusionmodules.streamed.StreamedUNetModel"
    OmegaConf.update(config, "model.params.unet_config.target", target)
    model = build_model(config)
    assert streams_weights(model)
    assert isinstance(choose_strategy({"devices": 1}, model, "auto", has_cuda=False), HostStateStrategy)


@pytest.mark.parametrize(
    ("arguments", "has_cuda", "device"),
    [
        ({"devices": [1], "accelerator": "gpu"}, True, "cuda:1"),
        ({"devices": 1}, True, "cuda:0"),
        ({"devices": 1, "accelerator": "cpu"}, True, "cpu"),
        ({"devices": 1}, False, "cpu"),
    ],
)
def test_the_device_follows_from_the_arguments(arguments: dict, has_cuda: bool, device: str) -> None:
    assert host_state_strategy(arguments, has_cuda).root_device == torch.device(device)


@pytest.mark.parametrize(
    "arguments", [{"devices": [0, 1]}, {"devices": 1, "num_nodes": 2}, {"devices": 1, "strategy": "ddp"}]
)
def test_several_devices_are_refused(arguments: dict) -> None:
    with pytest.raises(UserError, match="need one device"):
        host_state_strategy(arguments, has_cuda=True)
