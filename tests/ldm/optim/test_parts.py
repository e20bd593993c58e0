"""Trained parts of a small module: the chosen parameters, their groups in the optimizer, and their steps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import nn

from ldm.optim import InBackward, build_optimizer
from ldm.optim.parts import parts_of
from ldm.util import UserError

ADAMW = {"target": "torch.optim.AdamW"}


class Module(nn.Module):
    """`unet.blocks.0`, `unet.blocks.1`, `unet.out`, `text.out` and a frozen `vae`, each a weight without bias."""

    def __init__(self) -> None:
        super().__init__()
        self.unet = nn.Module()
        self.unet.blocks = nn.ModuleList(nn.Linear(2, 3, bias=False) for _ in range(2))
        self.unet.out = nn.Linear(3, 2, bias=False)
        self.text = nn.ModuleDict({"out": nn.Linear(2, 2, bias=False)})
        self.vae = nn.Linear(2, 2, bias=False).requires_grad_(False)

    def trained_parameters(self) -> list[nn.Parameter]:
        return [parameter for parameter in self.parameters() if parameter.requires_grad]

    @property
    def trained(self) -> set[str]:
        return {name.removesuffix(".weight") for name, p in self.named_parameters() if p.requires_grad}


def chosen(**config: Any) -> tuple[Module, Any]:
    module, parts = Module(), parts_of(config)
    parts.freeze(module)
    return module, parts


@pytest.mark.parametrize(
    ("config", "trained"),
    [
        ({}, {"unet.blocks.0", "unet.blocks.1", "unet.out", "text.out"}),
        ({"train_only": ["out"]}, {"unet.out", "text.out"}),
        ({"train_only": ["unet"], "freeze": ["blocks.1"]}, {"unet.blocks.0", "unet.out"}),
        ({"freeze": ["unet.blocks"]}, {"unet.out", "text.out"}),
    ],
)
def test_frozen_parameters_have_no_gradient(config: dict, trained: set[str]) -> None:
    assert chosen(**config)[0].trained == trained


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"train_only": ["ouy"]}, "'ouy' matches no parameter; did you mean 'out'?"),
        ({"freeze": ["attn2"]}, "'attn2' matches no parameter; valid: blocks, out, text, unet, weight"),
        ({"train_only": ["vae"]}, "'vae' names frozen parameters only; see"),
        ({"train_only": ["text"], "rate_factors": {"blocks": 2}}, "'blocks' names frozen parameters only; see"),
        ({"train_only": []}, "leave nothing to train"),
        ({"freeze": ["unet", "text"]}, "leave nothing to train"),
        ({"train_only": "out"}, "train_only='out' in params of model.params.trained_parts: give a list of texts"),
        ({"only": ["out"]}, "unknown key 'only' in params of model.params.trained_parts"),
        ({"rate_factors": {"out": 0}}, "trained_parts.rate_factors.out 0: give a number above 0"),
        ({"from_step": {"out": 1.5}}, "trained_parts.from_step.out 1.5: give a whole number of at least 1"),
        ({"train_only": ["unet."]}, "'unet.': give parts of a parameter's name"),
        ({"from_step": {"unet": 3, "text": 2}}, "nothing to train after 0 steps"),
        ({"until_step": {"unet": 3, "text": 2}}, "nothing to train after 3 steps"),
        ({"until_step": {"text": 2}, "from_step": {"text": 2}}, "from step 2 until step 2; give a later until_step"),
    ],
)
def test_mistakes(config: dict, said: str) -> None:
    with pytest.raises(UserError) as refused:
        chosen(**config)
    assert said in str(refused.value)


def groups_of(module: Module, parts: Any, config: Mapping[str, Any] = ADAMW) -> dict[float, list[tuple[int, ...]]]:
    optimizer = build_optimizer(config, module.trained_parameters(), 0.5, "optimizer_config", parts.rates(module))
    return {round(float(group["lr"]), 6): [tuple(p.shape) for p in group["params"]] for group in optimizer.param_groups}


IN_BACKWARD = {"target": "ldm.optim.InBackward", "params": {"optimizer": ADAMW}}


@pytest.mark.parametrize("config", [ADAMW, IN_BACKWARD])
def test_rate_factors_multiply_the_learning_rate(config: dict) -> None:
    module, parts = chosen(rate_factors={"unet": 0.1, "blocks.1": 4, "vanished": None})
    assert groups_of(module, parts, config) == {0.05: [(3, 2), (2, 3)], 2.0: [(3, 2)], 0.5: [(2, 2)]}
    own = {"target": "torch.optim.AdamW", "params": {"lr": 2.0}}
    inner = {**IN_BACKWARD, "params": {"optimizer": own}}
    assert set(groups_of(module, parts, own)) == set(groups_of(module, parts, inner)) == {0.2, 8.0, 2.0}


def test_without_factors_there_is_one_group() -> None:
    module, parts = chosen(train_only=["text"])
    assert groups_of(module, parts) == {0.5: [(2, 2)]}
    assert groups_of(Module(), parts_of(None)) == {0.5: [(3, 2), (3, 2), (2, 3), (2, 2)]}


def test_prodigy_has_one_rate() -> None:
    pytest.importorskip("pytorch_optimizer")
    module, parts = chosen(rate_factors={"unet": 0.1})
    with pytest.raises(UserError, match="one learning rate for all parameters"):
        groups_of(module, parts, {"target": "pytorch_optimizer.Prodigy"})


@pytest.mark.parametrize("config", [ADAMW, IN_BACKWARD])
def test_a_part_trains_in_its_steps_only(config: dict) -> None:
    module, parts = chosen(from_step={"text": 1}, until_step={"blocks": 2, "text": 3})
    optimizer = build_optimizer(config, module.trained_parameters(), 0.1, "optimizer_config", parts.rates(module))
    moved = []
    for step in range(4):
        before = {name: p.detach().clone() for name, p in module.named_parameters()}
        parts.set_step(module, step)

        def loss() -> torch.Tensor:
            blocks = sum(block(module.text["out"](torch.ones(2))) for block in module.unet.blocks)
            value = module.unet.out(blocks).square().sum()
            value.backward()
            return value

        optimizer.step(loss)
        optimizer.zero_grad()
        moved.append({name for name, p in module.named_parameters() if not torch.equal(p, before[name])})
    blocks, out, text = {"unet.blocks.0.weight", "unet.blocks.1.weight"}, {"unet.out.weight"}, {"text.out.weight"}
    assert moved == [blocks | out, blocks | out | text, out | text, out]
    steps = [float(optimizer.state[p]["step"]) for p in (module.text["out"].weight, module.unet.out.weight)]
    assert steps == [2, 4]
    assert isinstance(optimizer, InBackward) is (config is IN_BACKWARD)


def test_an_optimizer_state_of_other_parts_is_refused() -> None:
    def saved(**config: Any) -> dict[str, Any]:
        checkpoint: dict[str, Any] = {"optimizer_states": [{}]}
        chosen(**config)[1].save(checkpoint)
        return checkpoint

    first, second = {"train_only": ["blocks.0"]}, {"train_only": ["blocks.1"]}  # of equal shapes
    for one, other in ((first, second), ({}, first), (first, {}), ({"rate_factors": {"blocks.0": 2}}, {})):
        module, parts = chosen(**one)
        with pytest.raises(UserError, match=r"optimizer trained other parts; keep model\.params\.trained_parts"):
            parts.check(saved(**other), module)
        parts.check({**saved(**other), "optimizer_states": []}, module)  # of a start checkpoint
    for one, other in ((first, first), ({}, {}), ({"rate_factors": {"text": 2}}, {"rate_factors": {"text": 3}})):
        module, parts = chosen(**one)
        parts.set_step(module, 0)
        parts.check(saved(**other), module)
