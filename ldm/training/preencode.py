"""Pictures and captions to shards of posteriors and text embeddings.

A sample `<key>` is `<key>.f8.npy`, the posterior's parameters float16 (2C, size/8, size/8), unscaled;
`<key>.t5.npy`, the text encoder's output float16 (77, 768); `<key>.txt`; and `<key>.json`, where it comes from.
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from ldm.checkpoint import weights_digest
from ldm.data import npy
from ldm.data.images import ImageItem
from ldm.data.index import FORMAT_VERSION, write_index
from ldm.data.transforms import centre_square, fit_square
from ldm.data.writer import ShardWriter
from ldm.files import atomic_write
from ldm.models.diffusion.latent import check_reads_captions
from ldm.training.shard_set import NULL, begin, check_out, stop
from ldm.util import UserError

logger = logging.getLogger(__name__)

_CACHED_CAPTIONS = 2048  # 118 KB each at (77, 768) float16


class Encoder:
    """The two halves of a `LatentDiffusion` that pre-encoding needs, moved to `device` and `dtype`; the UNet stays.

    `digests` tells their weights, as they are given, from others.

    Raises:
        UserError: the model has no text encoder.
    """

    def __init__(self, model: Any, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> None:
        check_reads_captions(model.cond_stage_model)
        self.digests = {
            "autoencoder": weights_digest(model.first_stage_model.state_dict()),
            "text_tower": weights_digest(model.cond_stage_model.state_dict()),
        }  # before the weights are rounded to `dtype`
        model.first_stage_model.to(device, dtype)
        model.cond_stage_model.to(device, dtype)
        self.model = model
        self.device = torch.device(device)
        self.dtype = dtype
        self._captions: OrderedDict[str, np.ndarray] = OrderedDict()

    def check_size(self, size: int) -> None:
        """Raise `UserError` unless the autoencoder and the UNet can halve pictures of `size` pixels evenly."""
        unet = getattr(self.model.model.diffusion_model, "downsampling", 1)
        multiple = self.model.first_stage_model.downsampling * unet
        if size % multiple:
            raise UserError(f"--size {size}: this model takes pictures in multiples of {multiple} pixels")

    @torch.inference_mode()
    def pictures(self, batch: Tensor) -> np.ndarray:
        """Pictures (B, 3, H, W) in [-1, 1] to posterior parameters, or latents, float16 (B, 2C or C, h, w)."""
        encoded = self.model.first_stage_model.encode(batch.to(self.dtype))
        values = encoded if isinstance(encoded, Tensor) else encoded.parameters
        values = values.float()
        if not isinstance(encoded, Tensor):
            mean, logvar = values.chunk(2, dim=1)
            # The posterior clamps it so when it is read; unclamped it need not fit in float16.
            values = torch.cat([mean, logvar.clamp(-30.0, 20.0)], dim=1)
        return values.half().cpu().numpy()

    @torch.inference_mode()
    def captions(self, texts: Sequence[str]) -> list[np.ndarray]:
        """The encodings, float16 (77, 768), of `texts`; each text is encoded once as long as it is remembered."""
        new = [text for text in dict.fromkeys(texts) if text not in self._captions]
        if new:
            encoded = self.model.get_learned_conditioning(new)
            for text, value in zip(new, encoded.float().half().cpu().numpy(), strict=True):
                if not np.isfinite(value).all():
                    raise UserError(f"the caption {text!r} encodes to NaN or infinity; try --precision fp32")
                self._captions[text] = value
        for text in texts:
            self._captions.move_to_end(text)
        found = [self._captions[text] for text in texts]
        while len(self._captions) > _CACHED_CAPTIONS:
            self._captions.popitem(last=False)
        return found


@dataclass
class Report:
    """What became of the pictures."""

    samples: int = 0
    pictures: int = 0
    without_caption: int = 0
    failed: list[dict[str, str]] = field(default_factory=list)  # name and reason
    shards: list[dict[str, Any]] = field(default_factory=list)  # name, samples, bytes, sha256
    shape: tuple[int, ...] = ()  # of one f8


class _Decoding(Dataset):
    """Pictures decoded in worker processes: `(number, uint8 (H, W, 3) or None, reason or None)`."""

    def __init__(self, items: Sequence[ImageItem]) -> None:
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, number: int) -> tuple[int, Tensor | None, str | None]:
        try:
            return number, torch.from_numpy(self.items[number].read()), None
        except UserError as error:
            return number, None, str(error)


def default_workers() -> int:
    """Decoding processes where nothing is said: up to four, and a core is left for the encoder."""
    return min(4, (os.cpu_count() or 1) - 1)


def sample_key(number: int, name: str) -> str:
    """A key that is unique, sorts by number, and has no dot, at which WebDataset would cut it."""
    return f"{number:06d}_" + re.sub(r"[^A-Za-z0-9-]+", "_", PurePosixPath(name).stem)[:60]


@dataclass
class _Picture:
    number: int
    item: ImageItem
    fitted: Tensor  # 3 size size
    height: int  # of the original
    width: int

    def sample(self, values: np.ndarray, context: np.ndarray, flip: bool) -> tuple[str, dict[str, bytes]]:
        """Key and members of the picture's sample, or of its mirror image's."""
        caption = self.item.caption or ""
        origin = {
            "source": self.item.name,
            "height": self.height,
            "width": self.width,
            "crop": centre_square(self.height, self.width),  # top, left, side in the original's pixels
            "size": self.fitted.shape[-1],
            "flip": flip,
        }
        members = {
            "f8.npy": npy.encode(values),
            "t5.npy": npy.encode(context),
            "txt": caption.encode(),
            "json": json.dumps(origin).encode(),
        }
        return sample_key(self.number, self.item.name) + ("_flip" if flip else ""), members


def _fitted(
    items: Sequence[ImageItem], device: torch.device, size: int, workers: int, report: Report
) -> Iterator[_Picture]:
    """The readable pictures, in order, fitted to `size` on the device; the others go to the report."""
    loader = DataLoader(_Decoding(items), batch_size=None, num_workers=min(workers, len(items)))
    with logging_redirect_tqdm(), tqdm(total=len(items), unit="img", desc="encoding") as bar:
        for number, pixels, reason in loader:
            item = items[number]
            if pixels is None:
                logger.warning("left out: %s", reason)
                report.failed.append({"name": item.name, "reason": reason})
            else:
                fitted = fit_square(pixels.to(device), size)
                yield _Picture(number, item, fitted, *pixels.shape[:2])
            bar.update()


def _batched(pictures: Iterator[_Picture], size: int) -> Iterator[list[_Picture]]:
    batch: list[_Picture] = []
    for picture in pictures:
        batch.append(picture)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


def _encoded(
    encoder: Encoder, batch: Sequence[_Picture], flip: bool, report: Report
) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Key and members of the samples of a batch, each picture's mirror image behind it."""
    contexts = encoder.captions([picture.item.caption or "" for picture in batch])
    pictures = torch.stack([picture.fitted for picture in batch])
    views = [encoder.pictures(pictures)] + ([encoder.pictures(pictures.flip(-1))] if flip else [])
    report.shape = views[0].shape[1:]
    for i, (picture, context) in enumerate(zip(batch, contexts, strict=True)):
        for flipped, values in enumerate(views):
            if not np.isfinite(values[i]).all():
                raise UserError(f"{picture.item.name}: encodes to NaN or infinity; try --precision fp32")
            yield picture.sample(values[i], context, bool(flipped))
        report.without_caption += picture.item.caption is None


def preencode(
    encoder: Encoder,
    items: Sequence[ImageItem],
    out: str,
    *,
    size: int = 512,
    batch_size: int = 8,
    shard_size: int = 1000,
    flip: bool = False,
    workers: int = 0,
    overwrite: bool = False,
) -> Report:
    """Write the shards of `out`, and beside them the empty caption's encoding and `index.json`, last.

    Raises:
        UserError: shards are there already, no picture can be read, or a value does not fit in float16.
    """
    check_out(out, overwrite)
    encoder.check_size(size)
    null = encoder.captions([""])[0]
    report, writer = Report(), ShardWriter(out, shard_size)
    try:
        with writer:
            for batch in _batched(_fitted(items, encoder.device, size, workers, report), batch_size):
                samples = list(_encoded(encoder, batch, flip, report))
                if not report.pictures:  # only now it is sure that there will be a set to replace the old one
                    begin(out)
                for key, members in samples:
                    writer.write(key, members)
                report.samples += len(samples)
                report.pictures += len(batch)
            if not report.pictures:
                raise UserError(f"none of {len(items)} pictures can be read; the first: {report.failed[0]['reason']}")
    except BaseException as error:
        stop(out, interrupted=isinstance(error, KeyboardInterrupt))
        raise
    report.shards = writer.shards
    folder = Path(out).parent
    with atomic_write(folder / NULL) as path:
        path.write_bytes(npy.encode(null))
    index = {
        "format": FORMAT_VERSION,
        "out": Path(out).name,
        "complete": True,
        "samples": report.samples,
        "pictures": report.pictures,
        "without_caption": report.without_caption,
        "failed": report.failed,
        "size": size,
        "flip": flip,
        "f8": list(report.shape),
        "t5": list(null.shape),
        "scale_factor": float(encoder.model.scale_factor),
        **encoder.digests,
        "shards": report.shards,
    }
    write_index(folder, index)
    return report
