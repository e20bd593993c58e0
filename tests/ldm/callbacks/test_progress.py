"""Tests of the numbers on the progress bar, and of the reported memory."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from ldm.callbacks.device import peak_memory
from ldm.callbacks.progress import LatestNumber, ProgressBar, batch_size


@pytest.mark.parametrize(
    "batch",
    [
        {"f8": torch.zeros(3, 4), "txt": ["a", "b", "c"]},
        {"txt": ["a", "b", "c"]},
        [torch.zeros(3, 2), torch.zeros(3)],
        torch.zeros(3, 1),
    ],
)
def test_batch_size(batch):
    assert batch_size(batch) == 3


def test_peak_memory_of_the_process_includes_allocations():
    before = peak_memory(torch.device("cpu"))
    assert before > 50 * 2**20
    held = np.ones(before + 2**26, dtype=np.uint8)  # the peak may lie above what is held now
    assert peak_memory(torch.device("cpu")) >= before + 2**26 - 2**22
    del held


def test_peak_memory_of_cuda_is_that_of_its_allocator(monkeypatch):
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 7)
    assert peak_memory(SimpleNamespace(type="cuda")) == 7


@pytest.mark.parametrize(("first", "max_steps", "total"), [(0, -1, 6), (0, 100, 6), (0, 12, 4), (2, 12, 6), (1, 11, 3)])
def test_the_bar_ends_where_the_epoch_does(first, max_steps, total):
    bar = ProgressBar()
    bar._trainer = SimpleNamespace(
        num_training_batches=6, max_steps=max_steps, global_step=10, accumulate_grad_batches=2
    )
    bar._first_batch = first
    assert bar.total_train_batches == total


def test_the_bar_shows_the_last_loss_that_has_arrived(monkeypatch):
    sent = []

    def copy(number):
        sent.append(SimpleNamespace(has_arrived=False, get=lambda: number))
        return sent[-1]

    monkeypatch.setattr("ldm.callbacks.progress.HostCopy", copy)
    latest = LatestNumber()
    latest.fetch(torch.tensor(1.0))
    assert latest.read() is None
    sent[-1].has_arrived = True
    latest.fetch(torch.tensor(2.0))
    assert latest.read() == 1.0
    assert latest.read(wait=True) == 2.0
