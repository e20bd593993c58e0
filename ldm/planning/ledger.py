"""Ledger of tensor storages: sizes, lifetimes and categories."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves

TEMPORARIES = "temporaries"  # category of all storages without another one
CATEGORIES = ("weights", "gradients", "optimizer", "activations", TEMPORARIES)
HOST = "host"  # category of storages in host memory

# Bytes to whose multiples an allocator rounds sizes up: CUDA's caching allocator, and torch's on the host.
_BLOCK, _HOST_BLOCK = 512, 64


@dataclass(frozen=True)
class Timeline:
    """Storages in the order in which they are allocated and freed.

    Args:
        entries: pairs of the number of a storage and its bytes, negative when it is freed.
        categories: category of each storage.
        since: number of the first entry that counts for a peak.
    """

    entries: Sequence[tuple[int, int]]
    categories: Sequence[str]
    since: int = 0

    def peak(self) -> dict[str, int]:
        """Return the bytes on the device per category, at the time when their sum is largest."""
        return self._peak(CATEGORIES, _BLOCK)

    def host_peak(self) -> int:
        """Return the largest number of bytes in host memory."""
        return self._peak((HOST,), _HOST_BLOCK)[HOST]

    def extended(self, other: Timeline, times: int) -> Timeline | None:
        """Return this timeline with `times` the difference of `other` added to each size.

        If this is of a batch of two and `other` of three, the result is of a batch of 2 + `times`, as far as each size
        is linear in the batch. Return None if the two differ in more than sizes.
        """
        same = [storage for storage, _ in self.entries] == [storage for storage, _ in other.entries]
        if not same or self.categories != other.categories or self.since != other.since:
            return None
        pairs = zip(self.entries, other.entries, strict=True)
        return replace(self, entries=[(storage, size + times * (more - size)) for (storage, size), (_, more) in pairs])

    def _peak(self, counted: Sequence[str], block: int) -> dict[str, int]:
        held = dict.fromkeys(counted, 0)
        total = most = 0
        at_peak = dict(held)
        for moment, (storage, size) in enumerate(self.entries):
            category = self.categories[storage]
            if category in held:
                taken = _rounded(size, block)
                held[category] += taken
                total += taken
            if moment >= self.since and total > most:
                most, at_peak = total, dict(held)
        return at_peak


class Mark(NamedTuple):
    """Moment of a ledger: how many entries and storages it has so far, and the numbers of the storages that exist."""

    entries: int
    storages: int
    existing: set[int]


class Ledger(TorchDispatchMode):
    """Context that records the size of every storage when an operation allocates it and when it is freed.

    Around a `FakeTensorMode`, nothing is computed and no memory is allocated. A category applies to the whole life of a
    storage, including the time before it was named. A storage that becomes a gradient thus counts as a gradient from
    the start.
    """

    def __init__(self) -> None:
        super().__init__()
        self._entries: list[tuple[int, int]] = []  # (storage, bytes), negative when freed, in order of time
        self._categories: list[str] = []  # category of each storage
        self._live: dict[int, tuple[int, weakref.ref]] = {}  # address → (storage, reference with a callback on its end)
        self._default = TEMPORARIES

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        if func is torch.ops.prim.device.default:  # two thirds of all calls, slow in FakeTensorMode
            return args[0].fake_device
        if func is torch.ops.aten._local_scalar_dense.default:
            return 1  # a fake tensor has no value, but optimizers read their step count
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._record(leaf)
        return result

    @property
    def now(self) -> int:
        """Number of entries so far, as a mark for `since`."""
        return len(self._entries)

    @contextmanager
    def naming(self, category: str) -> Iterator[None]:
        """Give `category` to all storages allocated inside the context, until `name` changes it."""
        before, self._default = self._default, category
        try:
            yield
        finally:
            self._default = before

    def name(self, tensors: Iterable[Any], category: str) -> None:
        """Give `tensors` a category. Entries that are not tensors are skipped."""
        for tensor in tensors:
            if isinstance(tensor, Tensor):
                for storage in self._record(tensor):
                    self._categories[storage] = category

    def name_survivors(self, since: int, category: str) -> None:
        """Give a category to the temporaries that were allocated after `since` and still exist."""
        made = {storage for storage, size in self._entries[since:] if size > 0}
        for storage, _ in self._live.values():
            if storage in made and self._categories[storage] == TEMPORARIES:
                self._categories[storage] = category

    def mark(self) -> Mark:
        """Return the present moment, for `rewind`."""
        return Mark(len(self._entries), len(self._categories), self._existing())

    def rewind(self, mark: Mark) -> bool:
        """Forget all that came after `mark`. Return False, and forget nothing, if other storages exist now."""
        if self._existing() != mark.existing:
            return False
        del self._entries[mark.entries :], self._categories[mark.storages :]
        return True

    def _existing(self) -> set[int]:
        return {number for number, _ in self._live.values()}

    def timeline(self, since: int = 0) -> Timeline:
        """Return all entries so far. Those after `since` count for a peak."""
        return Timeline(list(self._entries), list(self._categories), since)

    def _record(self, tensor: Tensor) -> list[int]:
        """Return the storages of `tensor`, and record new ones."""
        if is_traceable_wrapper_subclass(tensor):  # for example quantised optimizer state
            parts, _ = tensor.__tensor_flatten__()
            return [storage for part in parts for storage in self._record(getattr(tensor, part))]
        storage = tensor.untyped_storage()
        address = storage._cdata
        if address not in self._live:
            number, size = len(self._categories), storage.nbytes()
            self._categories.append(self._default)
            self._entries.append((number, size))

            def free(_: weakref.ref) -> None:
                self._entries.append((number, -size))
                del self._live[address]

            self._live[address] = (number, weakref.ref(storage, free))
        return [self._live[address][0]]


def _rounded(size: int, block: int) -> int:
    """Return `size`, which may be negative, rounded away from 0 to a multiple of `block`."""
    blocks = -(-abs(size) // block)
    return blocks * block if size > 0 else -blocks * block
