"""Encoding the images of shards, with the device, the decoding and the writing at work at the same time."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from ldm.encoding.encoded_shard import EncodedShard
from ldm.encoding.encoder import CaptionEncoding, Encoder
from ldm.encoding.jobs import Record
from ldm.encoding.read import FittedImage, batches, read_images
from ldm.host_copy import HostCopy
from ldm.images.buckets import Size
from ldm.images.find import ImageItem

_READ = 2  # batches that are decoded before the device is free for them
_AHEAD = 16  # batches that may overtake an image that waits for more of its size
_BEHIND = 2  # batches that are encoded but not yet written


class _Behind:
    """Does things in a thread of its own, in order, a few behind who asks; an error there is raised here."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1)
        self._waiting: deque[Future] = deque()

    def __enter__(self) -> _Behind:
        return self

    def __exit__(self, *exception: Any) -> None:
        try:
            if exception[0] is None:
                self._wait(0)
        finally:
            self._pool.shutdown(cancel_futures=True)

    def do(self, function: Callable[..., Any], *arguments: Any) -> None:
        """Call `function` when its turn comes; wait as long as more than a few others are before it."""
        self._waiting.append(self._pool.submit(function, *arguments))
        self._wait(_BEHIND)

    def _wait(self, left: int) -> None:
        while len(self._waiting) > left:
            self._waiting.popleft().result()


def encode_shards(
    encoder: Encoder,
    items: Sequence[ImageItem],
    shards: Sequence[tuple[Path, range]],
    sizes: Sequence[Size],
    batch_size: int,
    flip: bool,
    workers: int,
    prepare: Callable[[], None],
    keep: Callable[[Path, Record], None],
) -> None:
    """Make each of `shards`, of the images among `items` with its numbers, fitted to `sizes`.

    While the device encodes a batch, `workers` processes decode the next images and a thread writes the last ones.
    Memory holds no more than a few batches of them, whatever the number of images.

    Args:
        prepare: called before each file is opened, by the thread.
        keep: called with the path and the record of each finished shard, by the thread.
    """
    numbered = ((number, items[number]) for _, numbers in shards for number in numbers)
    results = read_images(numbered, sizes, workers, _READ * batch_size)
    count = sum(len(numbers) for _, numbers in shards)
    open_shards: list[EncodedShard] = []
    try:
        with logging_redirect_tqdm(), tqdm(total=count, unit="img", desc="encoding") as bar, _Behind() as behind:
            for path, numbers in shards:
                shard = EncodedShard(path, prepare)
                open_shards = [*open_shards[-1:], shard]  # the one before may have to be written yet
                encoder.forget_captions()
                images = shard.readable(_counted(islice(results, len(numbers)), bar))
                for batch in batches(images, batch_size, _AHEAD * batch_size):
                    contexts = encoder.captions_later([image.caption for _, image in batch])
                    pixels = torch.stack([torch.from_numpy(image.pixels) for _, image in batch])
                    both = [pixels, pixels.flip(-1)] if flip else [pixels]
                    views = [HostCopy(encoder.images(view)) for view in both]
                    behind.do(_write, shard, batch, views, contexts)  # which waits for the device in this one's place
                behind.do(lambda shard=shard: keep(shard.path, shard.finish()))
    except BaseException as error:
        for shard in open_shards:
            shard.abandon(error)
        raise


def _write(
    shard: EncodedShard,
    batch: Sequence[tuple[int, FittedImage]],
    views: Sequence[HostCopy],
    contexts: Callable[[], Sequence[CaptionEncoding]],
) -> None:
    shard.add(batch, [view.get().numpy() for view in views], contexts())


def _counted(results: Iterable[Any], bar: tqdm) -> Iterable[Any]:
    for result in results:
        bar.update()
        yield result
