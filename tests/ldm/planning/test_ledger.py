"""Tests of the ledger on cases small enough to count by hand."""

from __future__ import annotations

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from ldm.planning.ledger import CATEGORIES, HOST, Ledger, Timeline


def counted(**categories: int) -> dict[str, int]:
    return dict.fromkeys(CATEGORIES, 0) | categories


def test_peak_is_the_largest_sum_of_live_storages() -> None:
    with FakeTensorMode(), Ledger() as ledger:
        a = torch.empty(1024)  # 4096 bytes
        b = a + 1
        del a
        c = b[:2].view(2, 1)  # a view allocates nothing
        d = torch.empty(2048)  # 8192, beside b's 4096
        del b, c, d
    assert ledger.timeline().peak() == counted(temporaries=4096 + 8192)


def test_sizes_are_multiples_of_the_allocators_block() -> None:
    with FakeTensorMode(), Ledger() as ledger:
        kept = [torch.empty(1), torch.empty(129)]  # 4 and 516 bytes
    assert ledger.timeline().peak() == counted(temporaries=512 + 1024)
    del kept


def test_sizes_on_the_host_are_not_rounded_as_on_cuda() -> None:
    with FakeTensorMode(), Ledger() as ledger, ledger.naming(HOST):
        kept = [torch.empty(1), torch.empty(129)]
        del kept
        later = torch.empty(1)
    assert ledger.timeline().host_peak() == 64 + 576 and ledger.timeline().peak() == counted()
    del later


def test_name_applies_from_allocation_and_excludes_the_host() -> None:
    with FakeTensorMode(), Ledger() as ledger:
        weight, elsewhere = torch.empty(1024), torch.empty(4096)
        gradient = torch.empty(1024)
        ledger.name([weight, None], "weights")
        ledger.name([elsewhere], HOST)
        ledger.name([gradient], "gradients")
        with ledger.naming(HOST):
            there = weight * 2
    assert ledger.timeline().peak() == counted(weights=4096, gradients=4096)
    del there, gradient


def test_name_survivors_names_live_temporaries() -> None:
    with FakeTensorMode(), Ledger() as ledger:
        before = torch.empty(128)
        began = ledger.now
        saved, named, gone = torch.empty(128), torch.empty(128), torch.empty(128)
        ledger.name([named], "optimizer")
        del gone
        ledger.name_survivors(began, "activations")
        torch.empty(1024)
    assert ledger.timeline().peak() == counted(temporaries=512 + 4096, activations=512, optimizer=512)
    del before, saved


def test_peak_since_a_moment() -> None:
    with FakeTensorMode(), Ledger() as ledger:
        torch.empty(1024)
        began = ledger.now
        kept = torch.empty(128)
    assert ledger.timeline().peak() == counted(temporaries=4096)
    assert ledger.timeline(began).peak() == counted(temporaries=512)
    del kept


def test_extended_adds_a_difference_for_each_further_image() -> None:
    def step(images: int, *, further: bool = False) -> Timeline:
        with FakeTensorMode(), Ledger() as ledger:
            weight = torch.empty(1024)
            ledger.name([weight], "weights")
            kept = torch.empty(images, 1000)
            others = [torch.empty(images, 1000) for _ in range(1 + further)]
            del kept, others
            return ledger.timeline()

    two, three = step(2), step(3)
    for images in (2, 3, 4, 100):
        assert two.extended(three, images - 2).peak() == step(images).peak()
    assert two.extended(step(3, further=True), 1) is None


def test_host_memory_has_a_peak_of_its_own() -> None:
    with FakeTensorMode(), Ledger() as ledger:
        with ledger.naming(HOST):
            torch.empty(1024)
        began = ledger.now
        kept = torch.empty(256)
        ledger.name([kept], HOST)
        on_device = torch.empty(128)
    assert (ledger.timeline().host_peak(), ledger.timeline(began).host_peak()) == (4096, 1024)
    assert ledger.timeline().peak() == counted(temporaries=512)
    del on_device


def test_a_quantised_tensor_counts_as_its_parts() -> None:
    from torchao.optim.subclass_8bit import OptimState8bit

    moment = OptimState8bit.zeros((64, 64), block_size=256)
    ledger = Ledger()
    ledger.name([moment], "optimizer")
    assert ledger.timeline().peak() == counted(optimizer=4096 + 512 + 1024)  # codes, scales, the table
