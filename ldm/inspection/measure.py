"""What is in a set of shards: counts, captions, duplicates, sizes, and the statistics of its latents."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ldm.modules.distributions.distributions import DiagonalGaussianDistribution
from ldm.modules.encoders.tokenizer import ClipTokenizer
from ldm.shards.index import read_index
from ldm.shards.open import open_shards
from ldm.shards.reader import ShardDataset
from ldm.shards.sample import CAPTION, LATENT, ORIGIN

_SIDES = (0, 256, 512, 768, 1024, 1536, 2048)  # pixels: where the classes of an original's shorter side begin
# Tokens: where the classes of caption lengths begin; all that is beyond CLIP's 77 is one.
_LENGTHS = (0, 10, 20, 30, 40, 50, 60, 70, 78)


def open_to_inspect(urls: str | Sequence[str]) -> ShardDataset:
    """The samples without the text encodings, which nothing here looks at; what is there of an unfinished set too.

    Raises:
        UserError: as `open_shards`.
    """
    return open_shards(urls, LATENT, None, [ORIGIN], unfinished=True)


def is_complete(dataset: ShardDataset) -> bool:
    """Whether all of the sets that the shards are of are finished, as far as their indexes tell."""
    folders = {path.parent for path in dataset.paths}
    return all((read_index(folder) or {}).get("complete", True) for folder in folders)


def read_about(dataset: ShardDataset) -> dict[str, Any]:
    """The index beside the first shard; empty if there is none."""
    return read_index(dataset.paths[0].parent) or {}


def latent_channels(dataset: ShardDataset) -> int:
    """Channels of a latent, as far as the shapes tell: more than 4, if even, are taken for mean and log-variance."""
    channels = next(iter(dataset.shapes[LATENT]))[0]
    return channels // 2 if channels > 4 and channels % 2 == 0 else channels


@dataclass
class Moments:
    """Mean and standard deviation, by channel, of latents drawn from posteriors; computed, not drawn.

    For a draw z = μ + σ ε, E[z] = E[μ] and E[z²] = E[μ² + σ²].
    """

    channels: int
    count: int = 0  # values a channel
    first: Tensor = field(default_factory=lambda: torch.zeros(1))  # sums of z
    second: Tensor = field(default_factory=lambda: torch.zeros(1))  # sums of z²

    def add(self, stored: np.ndarray) -> None:
        """Take a posterior's parameters (2C, h, w), or a latent (C, h, w)."""
        mean, variance = torch.from_numpy(stored.astype(np.float64)), torch.zeros(())
        if len(stored) > self.channels:
            posterior = DiagonalGaussianDistribution(mean[None])
            mean, variance = posterior.mean[0], posterior.var[0]
        self.count += mean[0].numel()
        self.first = self.first + mean.sum((1, 2))
        self.second = self.second + (mean.square() + variance).sum((1, 2))

    def described(self) -> dict[str, Any]:
        """`mean` and `std` overall, and by channel."""
        mean, square = self.first / self.count, self.second / self.count
        return {
            "mean": float(mean.mean()),
            "std": float((square.mean() - mean.mean().square()).sqrt()),
            "channel_mean": mean.tolist(),
            "channel_std": (square - mean.square()).sqrt().tolist(),
        }


def inspect(dataset: ShardDataset, channels: int, scale_factor: float | None) -> dict[str, Any]:
    """All that there is to say of the set, for JSON; its latents have `channels`.

    Mirror images are left out where captions are compared: an image and its mirror image share theirs by design.
    """
    captions: Counter[str] = Counter()
    latents: dict[bytes, list[str]] = {}
    sizes: Counter[str] = Counter()
    origins = _Origins()
    moments = Moments(channels)
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
    return {
        "shards": len(dataset.paths),
        "samples": len(dataset),
        "mirrored": flipped,
        "bytes": sum(path.stat().st_size for path in dataset.paths),
        "shapes": dict(sizes.most_common()),
        "originals": origins.described(),
        "captions": _described_captions(captions),
        "duplicates": {
            "captions": [{"caption": text, "samples": n} for text, n in captions.most_common() if n > 1],
            "latents": [keys for keys in latents.values() if len(keys) > 1],
        },
        "latents": {**moments.described(), "expected_std": 1 / scale_factor if scale_factor else None},
    }


class _Origins:
    """Sizes of the images that the samples were made of, as their `json` tells."""

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
        # The crop's height, or the side of a square one, as sets of format 1 have it.
        self.enlarged += origin["crop"][2] < (size[0] if isinstance(size, list) else size)

    def described(self) -> dict[str, Any]:
        """Originals by their shorter side, and how many had to be enlarged."""
        bounds = [*map(str, _SIDES[1:]), ""]
        classes = {f"{side}-{end}": self.sides[side] for side, end in zip(_SIDES, bounds, strict=True)}
        return {"known": self.known, "shorter_side": classes, "enlarged": self.enlarged}


def _described_captions(captions: Mapping[str, int]) -> dict[str, Any]:
    """Lengths in tokens, start and end not counted, and how many captions are longer than CLIP reads."""
    tokenizer = ClipTokenizer()
    room = tokenizer.max_length - 2
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
        "tokens_most": longest[0],
        "longest": longest[1],
        "tokens": {f"{start}-{ends.get(start, '')}": count for start, count in histogram.items()},
        "room": room,
        "cut": sum(count for length, count in lengths.items() if length > room),
    }
