"""Tests of quantised numbers: the codes are torchao's in every bit."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torchao.optim.subclass_4bit import OptimState4bit
from torchao.optim.subclass_8bit import OptimState8bit

from ldm.optim.quantised import Quantised, dequantised

STATES = {8: OptimState8bit, 4: OptimState4bit}
KINDS = pytest.mark.parametrize(("bits", "signed"), [(8, True), (8, False), (4, True), (4, False)])


def numbers(signed: bool, values: Tensor, count: int = 1 << 16) -> Tensor:
    """Numbers in [-1, 1] or [0, 1]: random ones of all sizes, the table's values, and the limits between them."""
    generator = torch.Generator().manual_seed(0)
    random = torch.rand(count, generator=generator)
    random = torch.cat([random, random**8, random * 1e-6])
    limits = (values[:-1] + values[1:]) / 2
    near = torch.cat([limits, values])
    for _ in range(2):
        near = torch.cat([near, torch.nextafter(near, torch.tensor(2.0)), torch.nextafter(near, torch.tensor(-2.0))])
    found = torch.cat([random, -random if signed else random, near.clamp(-1.0 if signed else 0.0, 1.0)])
    return torch.cat([found, torch.tensor([1.0, 0.0, -0.0])])


def blocks(found: Tensor, block: int) -> Tensor:
    """`found` in blocks that have a 1 each, so that their scale is 1."""
    length = block - 1
    padded = torch.cat([found, torch.zeros(-len(found) % length)]).view(-1, length)
    return torch.cat([padded, torch.ones(len(padded), 1)], dim=1).view(-1)


@KINDS
def test_codes_and_scales_are_those_of_torchao(bits: int, signed: bool) -> None:
    block = {8: 256, 4: 128}[bits]
    found = numbers(signed, STATES[bits].zeros((2,), signed, 2).qmap)
    values = blocks(found, block).view(-1, block)
    values = (values * 10.0 ** (torch.arange(len(values)) % 13 - 9)[:, None]).view(-1)  # other scales too
    state = STATES[bits].zeros(values.shape, signed, block)
    state.copy_(values)
    own = STATES[bits].zeros(values.shape, signed, block)
    quantised = Quantised(own.codes, own.scale, signed, bits)
    quantised.write(0, values)
    assert own.codes.equal(state.codes) and own.scale.equal(state.scale)
    assert quantised.read(0, len(values)).equal(state.dequantize())
    saved = {"codes": own.codes, "scale": own.scale, "signed": signed}
    assert dequantised(saved, values.view(-1, 2).shape).equal(state.dequantize().view(-1, 2))


@KINDS
def test_a_number_that_is_none_has_the_code_of_torchao(bits: int, signed: bool) -> None:
    values = torch.full((256,), float("nan"))
    state, own = (STATES[bits].zeros(values.shape, signed, 128) for _ in range(2))
    state.copy_(values)
    Quantised(own.codes, own.scale, signed, bits).write(0, values)
    assert own.codes.equal(state.codes)


def test_a_part_is_read_and_written_alone() -> None:
    state = OptimState8bit.zeros((1024,), True, 256)
    quantised = Quantised(state.codes, state.scale, True, 8)
    quantised.write(256, torch.linspace(-1, 1, 512))
    torch.testing.assert_close(quantised.read(256, 768), torch.linspace(-1, 1, 512), rtol=0, atol=0.01)
    assert not quantised.read(0, 256).any() and not quantised.read(768, 1024).any()


@pytest.mark.parametrize(("codes", "scales"), [(1000, 4), (1024, 0), (1024, 7)])
def test_a_state_of_another_size_is_refused(codes: int, scales: int) -> None:
    saved = {"codes": torch.zeros(codes, dtype=torch.uint8), "scale": torch.ones(scales), "signed": True}
    with pytest.raises(ValueError, match=f"loaded state dict has {codes} codes and {scales} scales for a parameter of"):
        dequantised(saved, torch.Size([32, 32]))
