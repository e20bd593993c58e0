"""The moving average against the golden case, and swapping it in and out."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
import torch
from torch import nn

from ldm.modules.ema import LitEma
from ldm.util import UserError
from tests.golden_data import case, fill_seeded, relative_error, tensors


def linears() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))


def equal(first: Iterable[torch.Tensor], second: Iterable[torch.Tensor]) -> bool:
    return all(torch.equal(p, q) for p, q in zip(first, second, strict=True))


def test_golden() -> None:
    spec = case("ema")
    model = fill_seeded(linears(), "ema/0/")
    ema = LitEma(model, decay=spec["decay"])
    for update in range(1, spec["updates"] + 1):
        ema(fill_seeded(model, f"ema/{update}/"))
    state = ema.state_dict()
    assert list(state) == spec["state_dict_keys"]
    for key, value in state.items():
        assert relative_error(value, tensors("cases")[f"ema/{key}"]) < 1e-5, key


def test_store_copy_restore() -> None:
    model = fill_seeded(linears(), "a")
    ema = LitEma(model)
    fill_seeded(model, "b")
    trained = [parameter.clone() for parameter in model.parameters()]
    ema.store(model.parameters())
    ema.copy_to(model)
    assert equal(model.parameters(), fill_seeded(linears(), "a").parameters())
    ema.restore(model.parameters())
    assert equal(model.parameters(), trained)


def test_a_scope_ends_with_the_weights_as_they_were_whatever_happens() -> None:
    model = fill_seeded(linears(), "a")
    ema = LitEma(model)
    trained = [parameter.clone() for parameter in fill_seeded(model, "b").parameters()]
    averaged = list(fill_seeded(linears(), "a").parameters())
    with pytest.raises(ZeroDivisionError), ema.applied_to(model):
        with ema.applied_to(model):
            assert equal(model.parameters(), averaged)
        assert equal(model.parameters(), averaged)
        raise ZeroDivisionError
    assert equal(model.parameters(), trained)


def test_without_counting_the_decay_is_constant() -> None:
    model = fill_seeded(linears(), "a")
    ema = LitEma(model, decay=0.5, use_num_updates=False)
    start = ema.get_buffer("0weight").clone()
    ema(fill_seeded(model, "b"))
    torch.testing.assert_close(ema.get_buffer("0weight"), (start + model[0].weight) / 2)
    assert ema.num_updates == -1


def test_frozen_parameters_have_no_shadow() -> None:
    model = linears()
    model[0].requires_grad_(False)
    assert list(LitEma(model).state_dict()) == ["decay", "num_updates", "1weight", "1bias"]


def test_decay_must_be_a_fraction() -> None:
    with pytest.raises(UserError, match="decay"):
        LitEma(linears(), decay=1.5)
