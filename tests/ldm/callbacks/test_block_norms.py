from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from ldm.callbacks.block_norms import BlockNorms, grouped
from ldm.optim import InBackward
from ldm.util import UserError


class Logged(list):
    """A logger."""

    def log_metrics(self, values: dict[str, float], step: int) -> None:
        self.append((step, values))


def network() -> nn.Module:
    model = nn.Module()
    model.model = nn.Module()
    model.model.diffusion_model = nn.ModuleDict(
        {"input_blocks": nn.ModuleList([nn.Linear(1, 2)]), "out": nn.Linear(2, 1)}
    )
    model.frozen = nn.Linear(1, 1).requires_grad_(False)
    with torch.no_grad():
        model.model.diffusion_model["input_blocks"][0].weight.copy_(torch.tensor([[3.0], [4.0]]))
        model.model.diffusion_model["input_blocks"][0].bias.zero_()
        for parameter in model.model.diffusion_model["out"].parameters():
            parameter.zero_()
    return model


@pytest.mark.parametrize("in_backward", [False, True])
def test_block_norms_logs_gradients_and_updates_of_a_step(in_backward: bool) -> None:
    model, logged = network(), Logged()
    callback = BlockNorms(every_n_train_steps=2)
    trainer: Any = SimpleNamespace(
        global_step=0, loggers=[logged], world_size=1, strategy=SimpleNamespace(root_device=torch.device("cpu"))
    )
    sgd = {"target": "torch.optim.SGD"}
    optimizer: Any = InBackward(list(model.model.parameters()), lr=1.0, optimizer=sgd) if in_backward else None
    callback.on_train_start(trainer, model)
    first = model.model.diffusion_model["input_blocks"][0]
    for batch in range(6):  # three steps of two batches
        callback.on_train_batch_start(trainer, model, {}, batch)
        if batch % 2:
            first.weight.grad = torch.tensor([[0.6], [0.8]])  # in the backward pass, a part of the gradients
            callback.on_before_optimizer_step(trainer, model, optimizer)
            first.weight.data -= torch.tensor([[0.3], [0.4]])
            trainer.global_step += 1
        callback.on_train_batch_end(trainer, model, None, {}, batch)
    [(step, values)] = logged  # the weights were (2.7, 3.6); those of `out` are 0 and have no ratio
    expected = {"update_ratio/input_blocks": pytest.approx(0.5 / 4.5)}
    assert step == 1 and values == expected | ({} if in_backward else {"gradient_norm/input_blocks": pytest.approx(1)})


def test_the_ratio_uses_some_values_of_a_large_tensor() -> None:
    weight = nn.Parameter(torch.arange(10.0))
    assert BlockNorms(values=4)._some([weight])[0].tolist() == [0, 2, 4, 6, 8]


def test_groups_are_parts_of_the_unet_and_other_trained_modules() -> None:
    model = network()
    model.conditioner = nn.Linear(1, 1)
    assert {name: len(weights) for name, weights in grouped(model).items()} == {
        "input_blocks": 2, "out": 2, "conditioner": 2
    }  # fmt: skip


@pytest.mark.parametrize("name", ["every_n_train_steps", "values"])
def test_block_norms_refuses_none(name: str) -> None:
    with pytest.raises(UserError, match=f"{name} 0"):
        BlockNorms(**{name: 0})
