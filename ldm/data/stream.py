"""Pre-encoded samples from shards that can only be read front to back (`pipe:`, URLs), by WebDataset's pipeline."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import webdataset
from torch.utils.data import IterableDataset, get_worker_info

from ldm.data.dropout import CaptionDropout
from ldm.data.shards import CAPTION, TEXT_KEYS, check_shape, decode_member, find_member, member_extension
from ldm.data.tar import check_name
from ldm.util import UserError


class ShardStream(IterableDataset):
    """Samples as `ShardDataset` gives them. Shards are split by rank, then by worker; a buffer of samples is shuffled.

    The order depends on the seed, the epoch and the number of workers. A stream has no length, and cannot be resumed
    in the middle: an epoch that was cut short starts again. Ranks may find different numbers of batches, so on
    several ranks set the trainer's `limit_train_batches` to what every rank has.
    """

    def __init__(
        self,
        urls: Sequence[str],
        first_stage_key: str = "f8",
        cond_stage_key: str = "t5",
        *,
        shuffle_buffer: int = 0,
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
        dropout: CaptionDropout | None = None,
    ) -> None:
        self.urls = list(urls)[rank::world]
        if not self.urls:
            raise UserError(f"{len(urls)} streamed shards are too few for {world} ranks")
        self.first_stage_key = first_stage_key
        self.keys = list(dict.fromkeys([first_stage_key, cond_stage_key, CAPTION]))
        self.optional = {CAPTION} - {first_stage_key, cond_stage_key}
        self.shuffle_buffer = shuffle_buffer
        self.seed = seed
        self.dropout = dropout
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()  # workers that persist see it change
        self.shapes: dict[str, dict[tuple[int, ...], str]] = {}  # shape -> type, as found

    def set_epoch(self, epoch: int) -> None:
        """The epoch that the next iteration shuffles for."""
        self._epoch.fill_(epoch)

    @property
    def epoch(self) -> int:
        return int(self._epoch)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        worker = get_worker_info()
        urls = list(self.urls)
        number, count = (worker.id, worker.num_workers) if worker else (0, 1)
        if self.shuffle_buffer:
            random.Random(f"{self.seed}/{self.epoch}").shuffle(urls)
        urls = urls[number::count]
        if not urls:
            return
        stages = [webdataset.SimpleShardList(urls), webdataset.tarfile_to_samples()]
        if self.shuffle_buffer:
            rng = random.Random(f"{self.seed}/{self.epoch}/{number}")
            stages.append(webdataset.shuffle(self.shuffle_buffer, rng=rng))
        samples = iter(webdataset.DataPipeline(*stages))
        while (sample := self._next(samples, urls)) is not None:
            decoded = self._decode(sample)
            yield self.dropout(decoded, self.epoch, decoded["__key__"]) if self.dropout else decoded

    @staticmethod
    def _next(samples: Iterator[dict[str, Any]], urls: list[str]) -> dict[str, Any] | None:
        try:
            return next(samples, None)
        except Exception as error:  # a command that fails, a tar cut short: whatever WebDataset and tarfile raise
            # WebDataset appends the URL to the exception's arguments.
            url = next((arg for arg in error.args if arg in urls), urls[0])
            reason = " ".join(str(error.args[0] if error.args else type(error).__name__).split())
            raise UserError(f"{url}: cannot be read: {reason}") from error

    def _decode(self, sample: dict[str, Any]) -> dict[str, Any]:
        where = f"{sample['__url__']}: {sample['__key__']}"
        check_name(sample["__key__"], sample["__url__"])
        result: dict[str, Any] = {"__key__": sample["__key__"]}
        members = {extension: data for extension, data in sample.items() if not extension.startswith("__")}
        for key in self.keys:
            name = f"{where}.{member_extension(key)}"
            data = find_member(key, members, self.optional, sample["__key__"], sample["__url__"]) or b""
            result[key] = decode_member(key, bytearray(data), name)
            if key not in TEXT_KEYS:
                known = self.shapes.setdefault(key, {})
                shape = result[key].shape
                picture = key == self.first_stage_key
                check_shape(key, shape, next(iter(known), shape), picture, name)
                known[shape] = result[key].dtype.name
        return result
