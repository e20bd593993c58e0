"""Data loaders whose order and randomness depend only on (seed, epoch, sample), for exact resumption."""

from __future__ import annotations

import logging
import os
import random
import signal
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset

from ldm.data.batch_sampler import EpochBatchSampler, Item, held_out_entries, stream_name
from ldm.distributed.collectives import in_all_processes
from ldm.shards.sample import STREAM
from ldm.util import UserError

logger = logging.getLogger(__name__)


@contextmanager
def seeded(seed: int, epoch: int, number: int) -> Iterator[None]:
    """Seed the CPU generators of Python, numpy and torch in this context, and restore their state afterwards."""
    saved = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002  (datasets draw from it)
    value = int(np.random.SeedSequence([seed, epoch, number]).generate_state(1)[0])
    random.seed(value)
    np.random.seed(value)  # noqa: NPY002
    torch.default_generator.manual_seed(value)  # torch.manual_seed would also seed the device's generators
    try:
        yield
    finally:
        random.setstate(saved[0])
        np.random.set_state(saved[1])  # noqa: NPY002
        torch.set_rng_state(saved[2])


class SeededDataset(Dataset):
    """Dataset with `len` and `[i]` whose augmentations are seeded by (seed, epoch, i).

    Samples that are dicts get the entry `STREAM`, the name of their random stream, from `stream_seed`; without it, they
    get `held_out_entries`.
    """

    def __init__(self, dataset: Any, seed: int, stream_seed: int | None = None) -> None:
        self.dataset = dataset
        self.seed = seed
        self.stream_seed = stream_seed

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, item: Item) -> Any:
        epoch, number = item
        with seeded(self.seed, epoch, number):
            sample = self.dataset[number]
        if not isinstance(sample, dict):
            return sample
        if self.stream_seed is None:
            return {**sample, **held_out_entries(number)}
        return {**sample, STREAM: stream_name(self.stream_seed, epoch, number)}


_TOGETHER = 16  # samples that a process reads at a time from a server
_POOLS: dict[int, ThreadPoolExecutor] = {}  # by process; threads do not survive a fork


class ReadTogether(Dataset):
    """Dataset whose samples of a batch are read at the same time, so that a distant server is not waited for in turn.

    The samples of `dataset` must not depend on those that were read before.
    """

    def __init__(self, dataset: Dataset) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, item: Item) -> Any:
        return self.dataset[item]

    def __getitems__(self, items: Sequence[Item]) -> list[Any]:
        """Return the samples of a batch, in the order of `items`. torch's loader calls this."""
        process = os.getpid()
        if process not in _POOLS:
            _POOLS[process] = ThreadPoolExecutor(_TOGETHER)
        return list(_POOLS[process].map(self.dataset.__getitem__, items))


# torch's messages for samples of unequal sizes, in this process and in a worker.
_UNEQUAL = ("stack expects each tensor to be equal size", "Trying to resize storage that is not resizable")


def _raise_in_one_line(error: UserError) -> None:
    """Raise `error`. In an error from a worker, the last line of the traceback is the message."""
    last = str(error.args[0]).strip().splitlines()[-1]
    kind = type(error)  # UserError, or a subclass
    raise UserError(last.removeprefix(f"{kind.__module__}.{kind.__qualname__}: ")) from None


class SampleLoader(DataLoader):
    """DataLoader over (epoch, number) items or a stream, with its own generator and one-line errors.

    Args:
        together: all processes take the same number of batches. A batch that fails in one process then raises the
            same `FailedTogether` in all.
    """

    def __init__(self, dataset: Dataset, *, num_workers: int = 0, together: bool = False, **options: Any) -> None:
        self.together = together
        super().__init__(
            dataset,
            num_workers=num_workers,
            persistent_workers=num_workers > 0,
            pin_memory=torch.cuda.is_available(),
            # The default would sample from the global generator at each epoch, which would differ after a resume.
            generator=torch.Generator().manual_seed(0),
            **options,
        )

    def __iter__(self) -> Iterator[Any]:
        """Yield batches. As a generator, it starts at the first `next`, after Lightning has set the epoch."""
        batches = self._batches()
        return in_all_processes(batches) if self.together else batches

    def _batches(self) -> Iterator[Any]:
        batches = super().__iter__()
        if self.num_workers and threading.current_thread() is threading.main_thread():
            # If a worker dies, torch's handler raises at once, even in the middle of an optimizer step. Without the
            # handler, `next` finds the dead worker a few seconds later.
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        try:
            yield from batches
        except UserError as error:
            _raise_in_one_line(error)
        except OSError as error:  # a file removed during training; from a worker, the error has no errno
            first = f"{error.filename}: {error.strerror}" if error.filename else str(error).strip().splitlines()[-1]
            raise UserError(f"the training data cannot be read: {first}") from None
        except MemoryError:
            raise UserError(
                "out of memory while loading data; lower data.params.num_workers or data.params.batch_size"
            ) from None
        except RuntimeError as error:
            if any(words in str(error) for words in _UNEQUAL):
                raise UserError(
                    "samples of one batch differ in size: crop them to one size, as with RandomCrop after Resize, or "
                    "set data.params.batch_size=1"
                ) from error
            if not str(error).startswith("DataLoader worker"):
                raise
            raise UserError(f"{error}: probably killed for lack of memory; lower data.params.num_workers") from error


class StreamLoader(SampleLoader):
    """Loader of an `IterableDataset`, which passes it the epoch. A resumed run restarts the epoch."""

    def __init__(self, dataset: IterableDataset, batch_size: int, **options: Any) -> None:
        super().__init__(dataset, batch_size=batch_size, **options)
        if hasattr(dataset, "set_epoch"):
            self.sampler.set_epoch = dataset.set_epoch  # Lightning calls it here

    def state_dict(self) -> dict[str, Any]:
        """Return an empty state, so that a resumed run may change between streamed and local shards."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        logger.info("streamed data cannot be resumed within an epoch; the epoch restarts")


class ResumableLoader(SampleLoader):
    """Loader of training data. Its state is the epoch and the number of batches delivered, without prefetched ones.

    Lightning saves `state_dict()` with a checkpoint and calls `load_state_dict` when it resumes.
    """

    def __init__(self, dataset: Dataset, batch_sampler: EpochBatchSampler, **options: Any) -> None:
        super().__init__(dataset, batch_sampler=batch_sampler, **options)

    def __iter__(self) -> Iterator[Any]:
        sampler: EpochBatchSampler = self.batch_sampler
        sampler.handed = sampler.start
        for batch in super().__iter__():
            sampler.handed += 1
            sampler.start = 0  # the next iteration starts at the first batch
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """Return the epoch, the number of batches delivered, and a description of the set, as plain values."""
        return {"epoch": self.batch_sampler.epoch, "batch": self.batch_sampler.handed, **self.batch_sampler.described()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue after the batch of `state`, or at the start of its epoch if the data differ."""
        sampler: EpochBatchSampler = self.batch_sampler
        sampler.set_epoch(state.get("epoch", 0))
        described = sampler.described()
        not_told = {
            key: described[key] for key in ("data", "prior_data") if key in described
        }  # missing in older checkpoints
        state = {"weights": "", **not_told, **state}
        changed = {key: (state.get(key), value) for key, value in described.items() if state.get(key) != value}
        if changed:
            what = ", ".join(f"{key} was {old}, is {new}" for key, (old, new) in changed.items())
            logger.warning("the training data changed since the checkpoint (%s); the epoch restarts", what)
        else:
            sampler.start = sampler.handed = state["batch"]
