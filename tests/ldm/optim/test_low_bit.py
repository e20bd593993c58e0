"""AdamW with quantised moments: what checkpoints hold of it, rounding, and what it takes."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from ldm.checkpoint import load_checkpoint, save_checkpoint
from ldm.optim import InBackward, build_optimizer
from ldm.optim.low_bit import AdamW4bit, AdamW8bit
from ldm.util import UserError
from tests.ldm.optim.tiny_training import tiny_unet, train

FUSED = {"target": "torch.optim.AdamW", "params": {"fused": True}}
BITS = pytest.mark.parametrize("bits", [AdamW8bit, AdamW4bit], ids=lambda bits: bits.__name__)


def lean(module: nn.Module, bits: type) -> InBackward:
    target = f"ldm.optim.low_bit.{bits.__name__}"
    return InBackward(module.parameters(), lr=1e-3, optimizer={"target": target}, bucket_mb=0.1)


def leaves(value: Any) -> Iterator[Any]:
    """Yield the leaves of a nested dict or list."""
    if isinstance(value, (dict, list)):
        for part in value.values() if isinstance(value, dict) else value:
            yield from leaves(part)
    else:
        yield value


def halving(optimizer: torch.optim.Optimizer) -> LambdaLR:
    return LambdaLR(optimizer, lambda step: 0.5**step)


@BITS
def test_a_lean_training_goes_on_from_a_checkpoint_bit_for_bit(bits: type, tmp_path: Path) -> None:
    straight, stopped, resumed = (tiny_unet().bfloat16() for _ in range(3))
    optimizer = lean(straight, bits)
    schedule = halving(optimizer)
    torch.manual_seed(0)
    train(straight, optimizer, range(2), schedule=schedule)
    torch.manual_seed(1)
    train(straight, optimizer, range(2, 4), schedule=schedule)

    torch.manual_seed(0)
    first = lean(stopped, bits)
    schedule = halving(first)
    train(stopped, first, range(2), schedule=schedule)
    parts = {"weights": stopped, "optimizer": first, "schedule": schedule}
    save_checkpoint({name: part.state_dict() for name, part in parts.items()}, tmp_path / "lean.ckpt")

    saved = load_checkpoint(tmp_path / "lean.ckpt")
    second = lean(resumed, bits)
    schedule = halving(second)
    for name, part in {"weights": resumed, "optimizer": second, "schedule": schedule}.items():
        part.load_state_dict(saved[name])
    torch.manual_seed(1)
    train(resumed, second, range(2, 4), schedule=schedule)
    assert all(torch.equal(a, b) for a, b in zip(straight.parameters(), resumed.parameters(), strict=True))
    assert second.param_groups[0]["lr"].item() == pytest.approx(1e-3 / 16)
    moments, others = optimizer.state_dict()["state"], second.state_dict()["state"]
    for a, b in zip(leaves([moments[index] for index in others]), leaves(others), strict=True):
        assert a.equal(b) if isinstance(a, Tensor) else a == b


@BITS
def test_its_state_is_plain_data_that_a_strict_reader_takes(bits: type, tmp_path: Path) -> None:
    module = tiny_unet().bfloat16()
    optimizer = lean(module, bits)
    train(module, optimizer, range(1))
    content = optimizer.state_dict()
    assert {type(leaf) for leaf in leaves(content["state"])} == {Tensor, bool}
    save_checkpoint(content, tmp_path / "state.ckpt")
    torch.load(tmp_path / "state.ckpt", weights_only=True)
    quantised = [state for state in content["state"].values() if isinstance(state["exp_avg"], dict)]
    assert sum(state["exp_avg"]["codes"].nbytes for state in quantised) * {AdamW8bit: 1, AdamW4bit: 2}[bits] > 200_000
    assert all(state["exp_avg"]["signed"] and not state["exp_avg_sq"]["signed"] for state in quantised)


def test_small_parameters_have_moments_in_float32_before_and_after_a_resume() -> None:
    module = tiny_unet().bfloat16()
    optimizer = lean(module, AdamW8bit)
    train(module, optimizer, range(1))
    resumed = lean(module, AdamW8bit)
    resumed.load_state_dict(optimizer.state_dict())
    for state in (optimizer.state, resumed.state):
        small = [moments for parameter, moments in state.items() if parameter.numel() < 4096]
        assert len(small) > 20
        assert {moments[name].dtype for moments in small for name in ("exp_avg", "exp_avg_sq")} == {torch.float32}


def test_it_goes_on_from_a_plain_adamw() -> None:
    module = tiny_unet()
    plain = torch.optim.AdamW(module.parameters(), lr=1e-3)
    train(module, plain, range(2))
    optimizer = AdamW8bit(module.parameters(), lr=1e-3)
    optimizer.load_state_dict(plain.state_dict())
    for parameter, moments in plain.state.items():
        for name in ("exp_avg", "exp_avg_sq"):
            own, expected = optimizer.state[parameter][name], moments[name]
            own = own.dequantize() if own.numel() >= 4096 else own
            torch.testing.assert_close(own, expected, rtol=0, atol=max(0.02 * expected.abs().max().item(), 1e-12))
    train(module, optimizer, range(2, 3))
    assert optimizer.state[next(module.parameters())]["step"] == 3


def test_a_state_of_other_bits_is_refused() -> None:
    module = tiny_unet()
    eight = AdamW8bit(module.parameters())
    train(module, eight, range(1))
    with pytest.raises(ValueError, match="loaded state dict has codes of shape"):
        AdamW4bit(module.parameters()).load_state_dict(eight.state_dict())


@pytest.mark.parametrize("stochastic", [True, False])
def test_updates_below_the_resolution_of_bfloat16_are_kept_on_average(stochastic: bool) -> None:
    weights = nn.Parameter(torch.ones(4096, dtype=torch.bfloat16))  # the next ones below are 2⁻⁸ away
    optimizer = AdamW8bit([weights], lr=2.0**-13, weight_decay=0.0, bf16_stochastic_round=stochastic)
    torch.manual_seed(0)
    for _ in range(16):
        weights.grad = torch.ones_like(weights)  # AdamW then steps by lr
        optimizer.step()
    moved = 1 - weights.float().mean().item()
    assert moved == (pytest.approx(16 * 2.0**-13, rel=0.1) if stochastic else 0.0)


def test_without_torchao_one_line_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "torchao"]:
        monkeypatch.setitem(sys.modules, name, None)
    for name in ("low_bit", "host_step", "quantised"):
        monkeypatch.delitem(sys.modules, f"ldm.optim.{name}")
    config = {"target": "ldm.optim.low_bit.AdamW8bit"}
    with pytest.raises(
        UserError, match=r"optimizer_config: .* torchao, .*: pip install -c constraints.txt '.\[lean\]'"
    ):
        build_optimizer(config, nn.Linear(2, 2).parameters(), 1e-3, "optimizer_config")
    monkeypatch.undo()
    assert importlib.import_module("ldm.optim.low_bit").AdamW8bit is AdamW8bit


def test_torchaos_own_classes_are_refused() -> None:
    with pytest.raises(UserError, match=r"torchao.optim.AdamW8bit: .* use ldm.optim.low_bit.AdamW8bit"):
        build_optimizer({"target": "torchao.optim.AdamW8bit"}, nn.Linear(2, 2).parameters(), 1e-3, "optimizer_config")


def test_keyed_rounding_depends_on_seed_step_and_parameter_alone() -> None:
    def trained(order: Sequence[int], seeds: Sequence[int] = (4, 5), keyed: bool = True) -> list[Tensor]:
        """Two steps of three parameters, one at a time in the given order, as `InBackward` may take them."""
        parameters = [nn.Parameter(torch.ones(4096, dtype=torch.bfloat16)) for _ in range(3)]
        optimizer = AdamW8bit(parameters, lr=1e-3, keyed_rounding=keyed)
        (group,) = optimizer.param_groups
        for seed in seeds:
            torch.manual_seed(seed)
            for number in order:
                group["params"] = [parameters[number]]
                parameters[number].grad = torch.ones_like(parameters[number])
                optimizer.step()
        return [parameter.detach() for parameter in parameters]

    def equal(one: list[Tensor], other: list[Tensor]) -> bool:
        return all(a.equal(b) for a, b in zip(one, other, strict=True))

    assert equal(trained([0, 1, 2]), trained([2, 0, 1]))
    assert not equal(trained([0, 1, 2], keyed=False), trained([2, 0, 1], keyed=False))
    assert not equal(trained([0, 1, 2]), trained([0, 1, 2], seeds=(4, 6)))
    first, second, third = trained([0, 1, 2])
    assert not (first.equal(second) or second.equal(third))
    before = torch.get_rng_state()
    trained([0], seeds=())
    assert torch.get_rng_state().equal(before)


@BITS
def test_a_plain_adamw_goes_on_from_its_state(bits: type) -> None:
    module = tiny_unet()
    optimizer = bits(module.parameters(), lr=1e-3)
    train(module, optimizer, range(2))
    plain = build_optimizer(FUSED, module.parameters(), 1e-3, "optimizer_config")
    plain.load_state_dict(optimizer.state_dict())
    (group,) = plain.param_groups
    assert group["fused"] is True and type(group["lr"]) is float
    for parameter, moments in optimizer.state.items():
        for name in ("exp_avg", "exp_avg_sq"):
            own = moments[name]
            own = own.dequantize() if type(own) is not Tensor else own
            assert plain.state[parameter][name].equal(own) and plain.state[parameter]["step"] == 2
    train(module, plain, range(2, 3))


def test_a_state_of_another_model_is_refused_by_a_plain_adamw() -> None:
    module, other = nn.Linear(128, 128), nn.Linear(128, 64)
    optimizer = AdamW8bit(module.parameters())
    optimizer.step(lambda: module(torch.ones(1, 128)).sum().backward())
    with pytest.raises(ValueError, match="loaded state dict has 16384 codes and 64 scales for a parameter of shape"):
        build_optimizer(FUSED, other.parameters(), 1e-3, "optimizer_config").load_state_dict(optimizer.state_dict())
    with pytest.raises(ValueError, match="loaded state dict contains a parameter group that doesn't match the size"):
        build_optimizer(FUSED, [module.weight], 1e-3, "optimizer_config").load_state_dict(optimizer.state_dict())


def test_amsgrad_is_refused() -> None:
    module = nn.Linear(2, 2)
    with pytest.raises(UserError, match="amsgrad: leave it out"):
        AdamW8bit(module.parameters(), amsgrad=True)
    plain = torch.optim.AdamW(module.parameters(), amsgrad=True)
    with pytest.raises(ValueError, match="loaded state dict has amsgrad"):
        AdamW8bit(module.parameters()).load_state_dict(plain.state_dict())
