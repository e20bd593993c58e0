"""Ledger of tensor storages: sizes, lifetimes and categories."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves

TEMPORARIES = "temporaries"  # everything without another name
CATEGORIES = ("weights", "gradients", "optimizer", "activations", TEMPORARIES)
HOST = "host"  # not on the device, not counted

_BLOCK = 512  # bytes: CUDA's caching allocator hands out multiples of it


class Ledger(TorchDispatchMode):
    """Context in which every storage that an operation allocates is entered with its size, and again when it is freed.

    Around a `FakeTensorMode`, nothing is computed and no memory is allocated. A category holds for the whole life of a
    storage, including the time before it was named: a storage that becomes a gradient is a gradient from the start.
    """

    def __init__(self) -> None:
        super().__init__()
        self._entries: list[tuple[int, int]] = []  # (storage, bytes made or, negative, freed), in order
        self._categories: list[str] = []  # of each storage
        self._live: dict[int, tuple[int, weakref.ref]] = {}  # address → (storage, what tells of its end)
        self._fresh = TEMPORARIES

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            return 1  # a fake tensor has no value, and optimizers ask for the number of their step
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._enter(leaf)
        return result

    @property
    def now(self) -> int:
        """Number of entries so far."""
        return len(self._entries)

    @contextmanager
    def naming(self, category: str) -> Iterator[None]:
        """Give `category` to everything that is allocated inside the context, until it is named otherwise."""
        before, self._fresh = self._fresh, category
        try:
            yield
        finally:
            self._fresh = before

    def name(self, tensors: Iterable[Any], category: str) -> None:
        """Give `tensors` a category. Entries that are not tensors are passed over."""
        for tensor in tensors:
            if isinstance(tensor, Tensor):
                for storage in self._enter(tensor):
                    self._categories[storage] = category

    def name_survivors(self, since: int, category: str) -> None:
        """Give a category to the temporaries that were allocated after `since` and still exist."""
        made = {storage for storage, size in self._entries[since:] if size > 0}
        for storage, _ in self._live.values():
            if storage in made and self._categories[storage] == TEMPORARIES:
                self._categories[storage] = category

    def peak(self, since: int = 0) -> dict[str, int]:
        """Return the bytes of each category on the device at the moment, at or after `since`, when their sum was
        largest.
        """
        held = dict.fromkeys(CATEGORIES, 0)
        total = most = 0
        at_peak = dict(held)
        for moment, (storage, size) in enumerate(self._entries):
            category = self._categories[storage]
            if category != HOST:
                held[category] += size
                total += size
            if moment >= since and total > most:
                most, at_peak = total, dict(held)
        return at_peak

    def _enter(self, tensor: Tensor) -> list[int]:
        """Return the storages of `tensor`, and enter those that are new."""
        if is_traceable_wrapper_subclass(tensor):  # for example quantised optimizer state
            parts, _ = tensor.__tensor_flatten__()
            return [storage for part in parts for storage in self._enter(getattr(tensor, part))]
        storage = tensor.untyped_storage()
        address = storage._cdata
        if address not in self._live:
            number, size = len(self._categories), -(-storage.nbytes() // _BLOCK) * _BLOCK
            self._categories.append(self._fresh)
            self._entries.append((number, size))

            def free(_: weakref.ref) -> None:
                self._entries.append((number, -size))
                del self._live[address]

            self._live[address] = (number, weakref.ref(storage, free))
        return [self._live[address][0]]
