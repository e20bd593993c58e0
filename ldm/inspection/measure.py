"""Measurements of a set of shards: counts, captions, duplicates, sizes, and statistics of its latents."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ldm.modules.distributions.distributions import DiagonalGaussianDistribution
from ldm.modules.encoders.caption_settings import CHUNK, CaptionSettings
from ldm.modules.encoders.tokenizer import ClipTokenizer
from ldm.shards.index import MEMBERS, read_index
from ldm.shards.open import open_shards
from ldm.shards.reader import ShardDataset
from ldm.shards.sample import CAPTION, LATENT, LOSS_MASK, ORIGIN
from ldm.shards.urls import expand_urls, is_stream

_SIDES = (0, 256, 512, 768, 1024, 1536, 2048)  # lower bounds of the histogram of shorter sides, in pixels
# Lower bounds of the histogram of caption lengths, in tokens. The last ones are those of a further chunk.
_LENGTHS = (0, 10, 20, 30, 40, 50, 60, 70, *(chunks * CHUNK + 1 for chunks in (1, 2, 3)))
_SHARES = 4  # bins of the histogram of mask areas


def open_to_inspect(urls: str | Sequence[str]) -> ShardDataset:
    """Open the samples with their loss masks, if the index has them, and without their caption embeddings.

    An unfinished set opens too, with the samples that it has.

    Raises:
        UserError: the shards are missing, damaged, streamed or empty; see `open_shards`.
    """
    folders = {Path(path).parent for path in expand_urls(urls) if not is_stream(path)}
    has_masks = all(LOSS_MASK in (read_index(folder) or {}).get(MEMBERS, ()) for folder in folders)
    return open_shards(urls, LATENT, None, [ORIGIN, *([LOSS_MASK] if has_masks else [])], unfinished=True)


def is_complete(dataset: ShardDataset) -> bool:
    """Return False if the index beside any of the shards marks its set as unfinished."""
    folders = {path.parent for path in dataset.paths}
    return all((read_index(folder) or {}).get("complete", True) for folder in folders)


def read_first_index(dataset: ShardDataset) -> dict[str, Any]:
    """Read the index beside the first shard; return an empty dict if there is none."""
    return read_index(dataset.paths[0].parent) or {}


def latent_channels(dataset: ShardDataset) -> int:
    """Guess the channels of a latent from the stored shapes.

    An even number above 4 is taken for mean and log-variance, that is twice the channels.
    """
    channels = next(iter(dataset.shapes[LATENT]))[0]
    return channels // 2 if channels > 4 and channels % 2 == 0 else channels


@dataclass
class Moments:
    """Mean and standard deviation per channel of latents sampled from posteriors, computed without sampling.

    For z = μ + σ ε with standard normal ε, E[z] = E[μ] and E[z²] = E[μ² + σ²].
    """

    channels: int
    count: int = 0  # values per channel
    first: Tensor = field(default_factory=lambda: torch.zeros(1))  # sums of z
    second: Tensor = field(default_factory=lambda: torch.zeros(1))  # sums of z²

    def add(self, stored: np.ndarray) -> None:
        """Add the parameters (2C, h, w) of a posterior, or a latent (C, h, w)."""
        mean, variance = torch.from_numpy(stored.astype(np.float64)), torch.zeros(())
        if len(stored) > self.channels:
            posterior = DiagonalGaussianDistribution(mean[None])
            mean, variance = posterior.mean[0], posterior.var[0]
        self.count += mean[0].numel()
        self.first = self.first + mean.sum((1, 2))
        self.second = self.second + (mean.square() + variance).sum((1, 2))

    def to_dict(self) -> dict[str, Any]:
        """Return `mean` and `std` overall, and as lists per channel."""
        mean, square = self.first / self.count, self.second / self.count
        return {
            "mean": float(mean.mean()),
            "std": float((square.mean() - mean.mean().square()).sqrt()),
            "channel_mean": mean.tolist(),
            "channel_std": (square - mean.square()).sqrt().tolist(),
        }


def inspect(dataset: ShardDataset, channels: int, scale_factor: float | None) -> dict[str, Any]:
    """Measure a set whose latents have `channels`, and return the results for JSON.

    `scale_factor` is the model's, None if unknown. Mirror images are left out of the statistics of captions and
    originals, because an image and its mirror image share both.
    """
    captions: Counter[str] = Counter()
    latents: dict[bytes, list[str]] = {}
    sizes: Counter[str] = Counter()
    origins = _Origins()
    moments = Moments(channels)
    areas: list[float] = []
    flipped = 0
    for number in tqdm(range(len(dataset)), unit="sample", desc="reading", leave=False):
        sample = dataset[number]
        origin = sample[ORIGIN] if isinstance(sample[ORIGIN], dict) else {}
        mirrored = bool(origin.get("flip"))
        flipped += mirrored
        if not mirrored:
            captions[sample[CAPTION]] += 1
            origins.add(origin)
        latents.setdefault(hashlib.blake2b(sample[LATENT].tobytes(), digest_size=16).digest(), []).append(
            sample["__key__"]
        )
        sizes["x".join(map(str, sample[LATENT].shape))] += 1
        moments.add(sample[LATENT])
        if LOSS_MASK in sample:
            areas.append(float(sample[LOSS_MASK].mean(dtype=np.float64)))
    return {
        "shards": len(dataset.paths),
        "samples": len(dataset),
        "mirrored": flipped,
        "bytes": sum(path.stat().st_size for path in dataset.paths),
        "shapes": dict(sizes.most_common()),
        "loss_masks": _measure_areas(areas) if areas else None,
        "originals": origins.to_dict(),
        "captions": _measure_captions(captions, CaptionSettings.from_entries(read_first_index(dataset)).max_tokens),
        "duplicates": {
            "captions": [{"caption": text, "samples": n} for text, n in captions.most_common() if n > 1],
            "latents": [keys for keys in latents.values() if len(keys) > 1],
        },
        "latents": {**moments.to_dict(), "expected_std": 1 / scale_factor if scale_factor else None},
    }


def _measure_areas(areas: Sequence[float]) -> dict[str, Any]:
    """Measure the white shares of loss masks."""
    bins = Counter(min(int(area * _SHARES), _SHARES - 1) for area in areas)
    ends = [100 * number // _SHARES for number in range(_SHARES + 1)]
    return {
        "mean": float(np.mean(areas)),
        "white": areas.count(1.0),
        "black": areas.count(0.0),
        "areas": {f"{low}-{high} %": bins[number] for number, (low, high) in enumerate(pairwise(ends))},
    }


class _Origins:
    """Sizes of the original images, read from the `json` of the samples."""

    def __init__(self) -> None:
        self.sides: Counter[int] = Counter()
        self.known = self.enlarged = 0

    def add(self, origin: Mapping[str, Any]) -> None:
        if not {"height", "width", "crop", "size"} <= origin.keys():
            return
        self.known += 1
        shorter = min(origin["height"], origin["width"])
        self.sides[max(side for side in _SIDES if side <= shorter)] += 1
        size = origin["size"]
        # A pair of height and width; sets of format 1 store the side of a square.
        self.enlarged += origin["crop"][2] < (size[0] if isinstance(size, list) else size)

    def to_dict(self) -> dict[str, Any]:
        """Return a histogram of the shorter sides, and the number of enlarged originals."""
        bounds = [*map(str, _SIDES[1:]), ""]
        histogram = {f"{side}-{end}": self.sides[side] for side, end in zip(_SIDES, bounds, strict=True)}
        return {"known": self.known, "shorter_side": histogram, "enlarged": self.enlarged}


def _measure_captions(captions: Mapping[str, int], limit: int) -> dict[str, Any]:
    """Measure caption lengths in tokens without start and end tokens, and count the captions longer than `limit`."""
    tokenizer = ClipTokenizer()
    lengths: Counter[int] = Counter()
    longest = (-1, "")
    for text, count in captions.items():
        length = len(tokenizer.encode([text])[0])
        lengths[length] += count
        longest = max(longest, (length, text))
    total = sum(lengths.values())
    values = np.repeat(list(lengths), list(lengths.values()))
    histogram = dict.fromkeys((start for start in _LENGTHS if start <= max(lengths)), 0)
    for length, count in lengths.items():
        histogram[max(start for start in histogram if start <= length)] += count
    ends = {start: str(end - 1) for start, end in pairwise(_LENGTHS)}
    return {
        "captions": total,
        "empty": captions.get("", 0),
        "distinct": len(captions),
        "tokens_median": float(np.median(values)),
        "tokens_mean": float(values.mean()),
        "tokens_max": longest[0],
        "longest": longest[1],
        "tokens": {f"{start}-{ends.get(start, '')}": count for start, count in histogram.items()},
        "token_limit": limit,
        "truncated": sum(count for length, count in lengths.items() if length > limit),
    }
