"""Tests of layers with a low-rank branch, against hand-computed values and merged weights."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from ldm.modules.diffusionmodules.convolution import Conv2d
from ldm.modules.lora import AdaptedConv2d, AdaptedConvolution, adapt, branches_of, start_branches
from ldm.util import UserError


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn1 = nn.ModuleDict({"to_q": nn.Linear(2, 2, bias=False), "norm": nn.LayerNorm(2)})
        self.blocks = nn.ModuleList([nn.Conv2d(3, 4, 1), Conv2d(4, 4, 3, stride=2, padding=1)])
        self.blocks.append(nn.Conv2d(4, 4, 3, groups=2))


def adapted(**settings: object) -> Network:
    torch.manual_seed(0)
    network = Network()
    adapt(network, {"rank": 1, "targets": ["*"], **settings})
    return network


def fill(network: Network) -> None:
    torch.manual_seed(1)
    for branch in branches_of(network):
        nn.init.normal_(branch.up)


def test_a_linear_layer_adds_alpha_over_r_times_b_a_x() -> None:
    layer = adapted(alpha=4, rank=2, targets=["to_q"]).attn1["to_q"]
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[1.0, 2], [3, 4]]))
        layer.lora.down.copy_(torch.tensor([[1.0, 0], [1, 1]]))
        layer.lora.up.copy_(torch.tensor([[1.0, 0], [0, 10]]))
    # W x = (5, 11); A x = (1, 3); B A x = (1, 30); α/r = 2
    assert layer(torch.tensor([1.0, 2])).tolist() == [7, 71]


@pytest.mark.parametrize(("number", "channels"), [(0, 3), (1, 4)])
def test_a_convolution_with_a_branch_is_one_with_the_merged_weight(number: int, channels: int) -> None:
    network = adapted(rank=3, alpha=1.5)
    fill(network)
    layer = network.blocks[number]
    x = torch.randn(2, channels, 6, 6)
    down, up = layer.lora.down, layer.lora.up
    merged = layer.weight + 0.5 * (up.flatten(1) @ down.flatten(1)).view_as(layer.weight)
    expected = nn.functional.conv2d(x, merged, layer.bias, layer.stride, layer.padding)
    torch.testing.assert_close(layer(x), expected)


def test_adapt_keeps_places_and_keys_and_trains_the_factors_alone() -> None:
    plain, network = Network().state_dict(), adapted()
    keys = network.state_dict().keys()
    assert list(plain) == [key for key in keys if ".lora." not in key]
    layers = ("attn1.to_q", "blocks.0", "blocks.1")  # not a norm, nor a grouped convolution
    own = {f"{layer}.lora.{name}" for layer in layers for name in ("down", "up", "alpha")}
    assert keys - plain.keys() == own
    trained = {name for name, parameter in network.named_parameters() if parameter.requires_grad}
    assert trained == {key for key in own if not key.endswith("alpha")}
    assert [type(block) for block in network.blocks] == [AdaptedConvolution, AdaptedConv2d, nn.Conv2d]


def test_a_new_branch_changes_no_bit_and_start_branches_begins_again() -> None:
    torch.manual_seed(0)
    plain, network, x = Network(), adapted(), torch.randn(3, 2)
    assert torch.equal(network.attn1["to_q"](x), plain.attn1["to_q"](x))
    fill(network)
    assert not torch.equal(network.attn1["to_q"](x), plain.attn1["to_q"](x))
    start_branches(network)
    assert torch.equal(network.attn1["to_q"](x), plain.attn1["to_q"](x))
    assert 0 < network.attn1["to_q"].lora.down.abs().max() <= 2**-0.5  # 1/√in


def test_factors_stay_float32_and_compute_in_the_type_of_the_input() -> None:
    network = adapted().to(torch.bfloat16)
    fill(network)
    layer = network.attn1["to_q"]
    types: dict[str, Tensor] = {key: value.dtype for key, value in layer.state_dict().items()}
    assert types.pop("weight") == torch.bfloat16 and set(types.values()) == {torch.float32}
    out = layer(torch.randn(3, 2, dtype=torch.bfloat16))
    assert out.dtype == torch.bfloat16
    out.sum().backward()
    assert layer.lora.down.grad.dtype == torch.float32 and layer.weight.grad is None


def test_dropout_acts_on_the_branch_in_training_alone() -> None:
    network = adapted(dropout=0.99)
    fill(network)
    layer, x = network.attn1["to_q"], torch.ones(100, 2)
    kept = nn.functional.linear(x, layer.weight)
    assert (layer(x) == kept).all(1).float().mean() > 0.9
    assert not torch.isclose(layer.eval()(x), kept).any()


@pytest.mark.parametrize(
    ("targets", "found"),
    [
        (["attn1"], ["attn1.to_q"]),
        (["blocks"], ["blocks.0", "blocks.1"]),
        (["blocks.1"], ["blocks.1"]),
        (["to_*", "blocks.0"], ["attn1.to_q", "blocks.0"]),
    ],
)
def test_targets_name_parts_of_paths(targets: list[str], found: list[str]) -> None:
    network = adapted(targets=targets)
    assert [
        path.removesuffix(".lora") for path, part in network.named_modules() if part in branches_of(network)
    ] == found


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": 0}, r"model.params.lora.rank 0: give a whole number of at least 1"),
        ({"rank": None}, r"rank None: give a whole number"),
        ({"alpha": 0}, r"alpha 0: give a number above 0"),
        ({"dropout": 1}, r"dropout 1: drops all inputs"),
        ({"dropout": -0.5}, r"dropout -0.5: give a number from 0 to 1"),
        ({"targets": []}, r"targets \[\]: give a list of names, such as \[attn1, attn2\]"),
        ({"targets": "attn1"}, r"targets 'attn1': give a list"),
        ({"targets": ["attn3"]}, r"targets 'attn3': matches no layer of the UNet; did you mean 'attn1'\?"),
        ({"targets": ["attn1", "xyz"]}, r"targets 'xyz': matches no layer of the UNet; valid: attn1, blocks, to_q"),
        ({"targets": ["norm"]}, r"targets 'norm': matches no layer"),
        ({"ranks": 3}, r"unknown key 'ranks' in model.params.lora; did you mean 'rank'\?"),
    ],
)
def test_adapt_refuses(settings: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        adapted(**settings)


def test_another_alpha_in_a_checkpoint_is_refused() -> None:
    with pytest.raises(RuntimeError, match=r"to_q.lora.alpha is 2, the config's is 1; set model.params.lora.alpha=2"):
        adapted().load_state_dict(adapted(alpha=2).state_dict())
