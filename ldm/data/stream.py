"""Pre-encoded samples from shards that can only be read front to back (`pipe:`, URLs), opened by WebDataset."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import webdataset
from torch.utils.data import IterableDataset, get_worker_info

from ldm.data.dropout import Change
from ldm.shards.reader import check_map, check_shape, decode_member, find_member, numbered_keys
from ldm.shards.sample import CAPTION, CONTEXT, LATENT, MAPS, is_array, member_extension, plain
from ldm.shards.tar import stream_tar
from ldm.util import UserError


class ShardStream(IterableDataset):
    """Samples as `ShardDataset` gives them. Shards are split by rank, then by worker; a buffer of samples is shuffled.

    The order depends on the seed, the epoch and the number of workers. A stream has no length, and cannot be resumed
    in the middle: an epoch that was cut short starts again. Ranks may find different numbers of batches, so on
    several ranks set the trainer's `limit_train_batches` to what every rank has; under `--strategy fsdp`, where no rank
    computes alone, `limit_val_batches` and `limit_test_batches` too.
    """

    def __init__(
        self,
        urls: Sequence[str],
        first_stage_key: str = LATENT,
        cond_stage_key: str = CONTEXT,
        *,
        extra: Sequence[str] = (),
        shuffle_buffer: int = 0,
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
        change: Change | None = None,
    ) -> None:
        self.urls = list(urls)[rank::world]
        if not self.urls:
            raise UserError(f"{len(urls)} streamed shards are too few for {world} ranks")
        self.first_stage_key = first_stage_key
        self.keys = list(dict.fromkeys([first_stage_key, cond_stage_key, CAPTION, *extra]))
        self.optional = {CAPTION} - {first_stage_key, cond_stage_key}
        self.shuffle_buffer = shuffle_buffer
        self.seed = seed
        self.change = change
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
        samples = (sample for url in urls for sample in self._read(url))
        if self.shuffle_buffer:
            rng = random.Random(f"{self.seed}/{self.epoch}/{number}")
            samples = webdataset.shuffle(self.shuffle_buffer, rng=rng)(samples)
        for url, sample, members in samples:
            decoded = self._decode(url, sample, members)
            yield self.change(decoded, self.epoch, decoded["__key__"]) if self.change else decoded

    @staticmethod
    def _read(url: str) -> Iterator[tuple[str, str, dict[str, bytes]]]:
        """URL, key and members of each sample of a shard."""
        try:
            with webdataset.gopen(url) as file:
                for key, members in stream_tar(file, url):
                    yield url, key, members
        except (UserError, GeneratorExit):
            raise
        except Exception as error:  # a command that fails, a tar cut short: whatever WebDataset and tarfile raise
            reason = " ".join(str(error.args[0] if error.args else type(error).__name__).split())
            raise UserError(f"{url}: cannot be read: {reason}") from error

    def _decode(self, url: str, sample: str, members: dict[str, bytes]) -> dict[str, Any]:
        result: dict[str, Any] = {"__key__": sample}
        if not self.shapes:
            self.keys = numbered_keys(self.keys, members)
        for key in self.keys:
            name = f"{url}: {sample}.{member_extension(key)}"
            data = find_member(key, members, self.optional, sample, url) or b""
            result[key] = decode_member(key, bytearray(data), name)
            if is_array(key):
                known = self.shapes.setdefault(key, {})
                shape = result[key].shape
                image = key == self.first_stage_key or plain(key) in MAPS
                check_shape(key, shape, next(iter(known), shape), image, name)
                check_map(key, shape, result[self.first_stage_key].shape, name)
                known[shape] = result[key].dtype.name
        return result
