"""Base class of streamed datasets of images and captions, under the name that public code inherits from."""

from __future__ import annotations

import logging
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any

from torch.utils.data import IterableDataset, get_worker_info

from ldm.util import UserError

logger = logging.getLogger(__name__)


class Txt2ImgIterableBaseDataset(IterableDataset):
    """A stream of dicts, which subclasses yield from `__iter__` for the ids in `sample_ids`.

    The loader gives each process, and each of its workers, its own part of `valid_ids` as `sample_ids`.

    Args:
        num_records: samples of an epoch, over all processes.
        valid_ids: ids of all samples; a subclass that has none gets no part.
        size: pixels of a side, for subclasses.
    """

    def __init__(self, num_records: int = 0, valid_ids: Sequence[Any] | None = None, size: int = 256) -> None:
        super().__init__()
        self.num_records = num_records
        self.valid_ids = valid_ids
        self.sample_ids = valid_ids
        self.size = size
        self._world = 1
        logger.info("%s: %d records", type(self).__name__, num_records)

    def __len__(self) -> int:
        return -(-self.num_records // self._world)

    @abstractmethod
    def __iter__(self) -> Iterator[Any]:
        """Yield the samples of `sample_ids`."""

    def share(self, rank: int, world: int) -> None:
        """Keep the part of process `rank` of `world`.

        Raises:
            UserError: there are fewer ids than processes.
        """
        if self.valid_ids is None:
            return
        if len(self.valid_ids) < world:
            raise UserError(f"{type(self).__name__}: {len(self.valid_ids)} ids are too few for {world} processes")
        self._world = world
        self.sample_ids = part_of(self.valid_ids, rank, world)


def part_of(ids: Sequence[Any], part: int, parts: int) -> Sequence[Any]:
    """The `part`-th of `parts` neighbouring pieces of `ids`, whose lengths differ by at most one."""
    return ids[len(ids) * part // parts : len(ids) * (part + 1) // parts]


def share_among_workers(worker: int) -> None:
    """Give the dataset of a loader's worker process its part of the process' ids."""
    info = get_worker_info()
    if info is not None and isinstance(info.dataset, Txt2ImgIterableBaseDataset) and info.dataset.valid_ids is not None:
        info.dataset.sample_ids = part_of(info.dataset.sample_ids, worker, info.num_workers)
