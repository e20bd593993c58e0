"""Tensors that the device sends to the host."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ldm.host_copy import HostCopy


def test_what_is_on_the_host_has_arrived() -> None:
    copy = HostCopy(torch.tensor([1.0, 2.0], requires_grad=True))
    assert copy.has_arrived
    assert copy.get().tolist() == [1.0, 2.0] and not copy.get().requires_grad


def test_a_gpu_sends_to_pinned_memory_and_says_when_it_has(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    event = SimpleNamespace(query=lambda: bool(done), synchronize=lambda: done.append("waited"))
    empty, asked = torch.empty, []

    def made(shape: Any, **options: Any) -> torch.Tensor:
        asked.append(options.pop("pin_memory"))
        return empty(shape, **options)

    monkeypatch.setattr(torch, "empty", made)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(record_event=lambda: event))
    number: Any = SimpleNamespace(
        device=torch.device("cuda", 0), shape=(), dtype=torch.float32, detach=lambda: torch.tensor(3.0)
    )
    copy = HostCopy(number)
    assert asked == [True] and not copy.has_arrived
    assert copy.get().item() == 3.0
    assert copy.has_arrived and done == ["waited"]
