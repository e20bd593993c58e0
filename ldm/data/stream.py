"""Pre-encoded samples from streamed shards (`pipe:`, URLs), opened by WebDataset."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import Any, BinaryIO

import torch
import webdataset
from torch.utils.data import IterableDataset, get_worker_info

from ldm.data.dropout import Change
from ldm.remote.path import as_path
from ldm.shards import npy
from ldm.shards.members import check_map, check_shape, decode_member, find_member, numbered_keys
from ldm.shards.sample import (
    CAPTION,
    CONTEXT,
    LATENT,
    OF_LATENT_SIZE,
    TEXT_ENCODINGS,
    caption_count,
    is_array,
    member_extension,
    one_caption,
    one_variant,
    plain,
    with_caption,
    with_variant,
)
from ldm.shards.tar import stream_tar
from ldm.util import UserError, refuse_if


class ShardStream(IterableDataset):
    """Iterable dataset with the samples of `ShardDataset`. Shards are divided by rank, then by worker.

    Samples are shuffled in a buffer. Their order depends on the seed, the epoch and the number of workers. A stream has
    no length and cannot be resumed within an epoch.

    Ranks may have different numbers of batches. With several ranks, set the trainer's `limit_train_batches` to the
    smallest number, and with `--strategy fsdp` also `limit_val_batches` and `limit_test_batches`.
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
        refuse_if(not self.urls, f"{len(urls)} streamed shards are too few for {world} ranks")
        self.first_stage_key = first_stage_key
        self.keys = list(dict.fromkeys([first_stage_key, cond_stage_key, CAPTION, *extra]))
        self.optional = {CAPTION} - {first_stage_key, cond_stage_key}
        self.shuffle_buffer = shuffle_buffer
        self.seed = seed
        self.change = change
        # Possibly: the index of streamed shards is unknown.
        self.reads_encodings = any(key in TEXT_ENCODINGS for key in self.keys)
        self.has_several_captions = cond_stage_key == CAPTION or self.reads_encodings
        self.has_several_variants = True
        self.keeps_captions = self.keeps_variants = False  # of several, a sample has the first, or all
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()  # shared with persistent workers
        self.shapes: dict[str, dict[tuple[int, ...], str]] = {}  # shape → dtype, in the order of the samples

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch, which seeds the next shuffling."""
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
            if not self.keeps_variants:
                decoded = with_variant(decoded, self.first_stage_key, lambda count: 0, f"{url}: {sample}")
            if self.has_several_captions and not self.keeps_captions:
                decoded = with_caption(decoded, lambda count: 0, f"{url}: {sample}")
            yield self.change(decoded, self.epoch, decoded["__key__"]) if self.change else decoded

    @staticmethod
    def _read(url: str) -> Iterator[tuple[str, str, dict[str, bytes]]]:
        """Yield URL, key and members of each sample of a shard."""
        try:
            with _open(url) as file:
                for key, members in stream_tar(file, url):
                    yield url, key, members
        except (UserError, GeneratorExit):
            raise
        except Exception as error:  # failed commands and damaged tars raise various exceptions
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
                image = key == self.first_stage_key or plain(key) in OF_LATENT_SIZE
                stored = result[key].shape
                shape = one_variant(stored) if image else one_caption(key, stored)
                check_shape(key, shape, next(iter(known), shape), image, name)
                check_map(key, stored, result[self.first_stage_key].shape, name)
                known[shape] = result[key].dtype.name
        if not self.reads_encodings and not _has_several_captions(members, f"{url}: {sample}"):
            result[CAPTION] = " ".join(result[CAPTION].split("\n"))  # the same tokens, and not one caption per line
        return result


def _has_several_captions(members: dict[str, bytes], name: str) -> bool:
    """Return True if a sample's stored encodings are of several captions."""
    extension = member_extension(CONTEXT)
    data = members.get(extension)
    if data is None:
        return False
    header = npy.read_header(data[: npy.HEADER_BYTES], len(data), f"{name}.{extension}")
    return caption_count(CONTEXT, header.shape) is not None


def _open(url: str) -> BinaryIO:
    if not url.startswith("s3://"):
        return webdataset.gopen(url)
    from ldm.remote.stores import StoreServer  # WebDataset does not read these

    return StoreServer(as_path(url)).open()
