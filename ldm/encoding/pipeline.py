"""Encoding of images into shards, with decoding, computation on the device, and writing in parallel."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from itertools import islice, tee
from pathlib import Path
from typing import Any

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from ldm.encoding.encoded_shard import EncodedShard
from ldm.encoding.encoder import CaptionEncoding, SampleEncoder
from ldm.encoding.jobs import ImageJob, Record
from ldm.encoding.kinds import ImageSamples
from ldm.encoding.read import FittedImage, batches, read_images
from ldm.host_copy import HostCopy
from ldm.images.buckets import Size

_READ = 2  # batches decoded ahead of the device
_AHEAD = 16  # batches after which an image no longer waits for others of its size
_UNWRITTEN = 2  # batches that are encoded but not yet written


class _WriterThread:
    """Background thread that calls functions in order. An error in the thread is raised in the caller."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1)
        self._waiting: deque[Future] = deque()

    def __enter__(self) -> _WriterThread:
        return self

    def __exit__(self, *exception: Any) -> None:
        try:
            if exception[0] is None:
                self._wait(0)
        finally:
            self._pool.shutdown(cancel_futures=True)

    def submit(self, function: Callable[..., Any], *arguments: Any) -> None:
        """Queue a call of `function`. Wait while the queue is longer than `_UNWRITTEN`."""
        self._waiting.append(self._pool.submit(function, *arguments))
        self._wait(_UNWRITTEN)

    def _wait(self, left: int) -> None:
        while len(self._waiting) > left:
            self._waiting.popleft().result()


def encode_shards(
    encoder: SampleEncoder,
    kind: ImageSamples,
    jobs: Iterable[ImageJob],
    several: bool,
    sizes: Sequence[Size],
    batch_size: int,
    flip: bool,
    workers: int,
    prepare: Callable[[], None],
    keep: Callable[[Path, Record], None],
) -> None:
    """Encode the images of `jobs`, fitted to `sizes`, into their shards.

    While the device encodes a batch, `workers` processes decode the next images and a thread writes the previous ones.
    Memory holds a few batches at a time, and the jobs that are being read and written.

    Args:
        kind: kind of the samples.
        several: images may have several captions.
        prepare: called in the thread before each file is opened.
        keep: called in the thread with the path and the record of each finished shard.
    """
    count = sum(len(job.numbers) for job in jobs) if isinstance(jobs, Sequence) else None
    jobs, ahead = tee(jobs)
    numbered = (numbered for job in ahead for numbered in zip(job.numbers, job.items, strict=True))
    results = read_images(numbered, partial(kind.read, sizes=sizes), workers, _READ * batch_size)
    open_shards: list[EncodedShard] = []
    try:
        with logging_redirect_tqdm(), tqdm(total=count, unit="img", desc="encoding") as bar, _WriterThread() as thread:
            for path, numbers, _ in jobs:
                shard = EncodedShard(path, prepare, several)
                open_shards = [*open_shards[-1:], shard]  # the previous shard may not be written yet
                encoder.forget_captions()
                images = shard.skip_unreadable(_counted(islice(results, len(numbers)), bar))
                for batch in batches(images, batch_size, _AHEAD * batch_size):
                    contexts = encoder.captions_later([text for _, image in batch for text in image.captions])
                    read = [image for _, image in batch]
                    encoded = [kind.encode(encoder, read, flipped) for flipped in ((False, True) if flip else (False,))]
                    views = [{key: HostCopy(values) for key, values in view.items()} for view in encoded]
                    thread.submit(_write, shard, batch, views, contexts)  # the thread waits for the device
                thread.submit(lambda shard=shard: keep(shard.path, shard.finish()))
    except BaseException as error:
        for shard in open_shards:
            shard.abandon(error)
        raise


def _write(
    shard: EncodedShard,
    batch: Sequence[tuple[int, FittedImage]],
    views: Sequence[Mapping[str, HostCopy]],
    contexts: Callable[[], Sequence[CaptionEncoding]],
) -> None:
    shard.add(batch, [{key: values.get().numpy() for key, values in view.items()} for view in views], contexts())


def _counted(results: Iterable[Any], bar: tqdm) -> Iterable[Any]:
    for result in results:
        bar.update()
        yield result
