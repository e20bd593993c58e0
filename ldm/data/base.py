"""Base class of iterable datasets of images and captions, under its public name."""

from __future__ import annotations

import logging
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any

from torch.utils.data import IterableDataset, get_worker_info

from ldm.util import refuse_if

logger = logging.getLogger(__name__)


class Txt2ImgIterableBaseDataset(IterableDataset):
    """Iterable dataset of dicts. Subclasses yield the samples of `sample_ids` in `__iter__`.

    The loader sets `sample_ids` to a different part of `valid_ids` for each process and worker.

    Args:
        num_records: samples per epoch over all processes.
        valid_ids: ids of all samples. If it is empty, the samples are not divided.
        size: side in pixels, for subclasses.
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
        """Keep the part of `valid_ids` for process `rank` of `world`.

        Raises:
            UserError: there are fewer ids than processes.
        """
        if self.valid_ids is None:
            return
        refuse_if(
            len(self.valid_ids) < world,
            f"{type(self).__name__}: {len(self.valid_ids)} ids are too few for {world} processes; "
            "list more, or use fewer processes",
        )
        self._world = world
        self.sample_ids = part_of(self.valid_ids, rank, world)


def part_of(ids: Sequence[Any], part: int, parts: int) -> Sequence[Any]:
    """Return piece `part` of `parts` contiguous pieces of `ids`. Their lengths differ by at most 1."""
    return ids[len(ids) * part // parts : len(ids) * (part + 1) // parts]


def share_among_workers(worker: int) -> None:
    """Set `sample_ids` of the dataset in a worker process to its part. For `worker_init_fn`."""
    info = get_worker_info()
    if info is not None and isinstance(info.dataset, Txt2ImgIterableBaseDataset) and info.dataset.valid_ids is not None:
        info.dataset.sample_ids = part_of(info.dataset.sample_ids, worker, info.num_workers)
