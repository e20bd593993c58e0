"""Shards that a run trains and validates on: counts and sizes, and samples with their captions."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ldm.reporting.settings import params_of
from ldm.reporting.strips import Shown, show
from ldm.shards.index import FAMILY, read_index
from ldm.shards.sample import CAPTION, LATENT
from ldm.shards.urls import expand_urls, is_stream, without_weights
from ldm.util import UserError

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image
    from torch import nn

log = logging.getLogger(__name__)

_URLS = "_urls"  # ending of the keys of sets in data.params
_MOST_INSPECTED = 5000  # samples of a set whose captions are counted
_MOST_LETTERS = 2000  # of a caption in a page
_BYTES_PER_PIXEL = 1 << 12  # of memory, which Stable Diffusion's autoencoder takes to decode an image


class TrainingSet(NamedTuple):
    """Set of shards by its name in the config. Unknown values are None."""

    name: str
    urls: str
    shards: int
    size: int  # bytes
    samples: int | None
    family: str | None
    failed: list[str]  # images that could not be read when the set was made
    complete: bool


class Contents(NamedTuple):
    """Decoded samples of the training set with their captions, and lines about all samples."""

    images: list[Shown]  # their names are the captions
    lines: list[str]


class SampleLimits(NamedTuple):
    """Largest number of decoded samples per run, and the time and the memory that their decoding may take."""

    count: int
    seconds: float = math.inf
    memory: float = math.inf  # bytes

    @property
    def are_open(self) -> bool:
        return math.isinf(self.seconds) and math.isinf(self.memory)


NO_SAMPLES = SampleLimits(0)


def read_training_sets(config: Mapping[str, Any], problems: list[str]) -> list[TrainingSet]:
    """Return the sets of shards that the section `data` of `config` names."""
    sets = []
    for key, urls in params_of(config, "data").items():
        if str(key).endswith(_URLS) and urls:
            try:
                sets.append(_read_set(str(key).removesuffix(_URLS), urls))
            except OSError as error:
                problems.append(f"data.params.{key}: {error.filename}: {error.strerror}")
            except UserError as error:
                problems.append(f"data.params.{key}: {error}")
    return sets


def _read_set(name: str, urls: Any) -> TrainingSet:
    shown = ", ".join(map(_shown, urls if isinstance(urls, list) else [urls]))
    urls = without_weights(urls)
    shards = expand_urls(urls)
    if any(map(is_stream, shards)):
        return TrainingSet(name, shown, len(shards), 0, None, None, [], True)
    paths = [Path(shard) for shard in shards]
    indices = {folder: read_index(folder) for folder in dict.fromkeys(path.parent for path in paths)}
    known = {
        folder / shard["name"]: shard.get("samples") for folder, index in indices.items() if index
        for shard in index["shards"]
    }  # fmt: skip
    counts = [known.get(path) for path in paths]
    found = [index for index in indices.values() if index]
    families = dict.fromkeys(str(index[FAMILY]) for index in found if index.get(FAMILY))
    return TrainingSet(
        name,
        shown,
        len(paths),
        sum(path.stat().st_size for path in paths),
        None if None in counts else sum(count for count in counts if count is not None),
        ", ".join(families) or None,
        [entry["reason"] for index in found for entry in index.get("failed") or []],
        all(index.get("complete", True) for index in found),
    )


def _shown(entry: Any) -> str:
    return f"{entry.get('urls')} ({entry.get('weight', 1):g} times)" if isinstance(entry, dict) else str(entry)


def read_contents(contents: Contents, urls: Any, first_stage: nn.Module | None, limits: SampleLimits) -> None:
    """Add lines about the shards at `urls` to `contents`, and then samples if there is an autoencoder `first_stage`.

    Raises:
        UserError: the shards are missing, streamed or damaged.
    """
    from ldm.evaluation.protocol import spread
    from ldm.inspection.measure import inspect, latent_channels, open_to_inspect

    dataset = open_to_inspect(without_weights(urls))
    channels = latent_channels(dataset)
    if len(dataset) <= _MOST_INSPECTED:
        contents.lines.extend(_lines(inspect(dataset, channels, None)))
    else:
        contents.lines.append(f"Captions are not counted in a set of more than {_MOST_INSPECTED} samples; "
                              "tools/inspect_shards.py counts them.")  # fmt: skip
    if first_stage is None or next(first_stage.parameters(), None) is None:
        return
    count = limits.count if limits.are_open else _fitting(first_stage, dataset[0], channels, limits)
    if not count:
        contents.lines.append("No samples are shown: their decoding would take too long, or too much memory, at the "
                              "end of a run. tools/report.py shows them.")  # fmt: skip
    for number in spread(len(dataset), count).tolist():
        contents.images.append(_show_sample(first_stage, dataset[number], channels))


def _fitting(first_stage: nn.Module, sample: Mapping[str, Any], channels: int, limits: SampleLimits) -> int:
    """Return how many samples can be decoded within `limits`, judged by a sixteenth of `sample`."""
    height, width = sample[LATENT].shape[1:]
    part = sample[LATENT][:, : max(height // 4, 2), : max(width // 4, 2)]
    times = height * width / part[0].size
    image = _decode(first_stage, part, channels)  # the first call takes longer
    start = time.monotonic()
    _decode(first_stage, part, channels)
    seconds = (time.monotonic() - start) * times
    if image.width * image.height * times * _BYTES_PER_PIXEL > limits.memory:
        return 0
    return int(min(limits.count, limits.seconds / max(seconds, 1e-6)))


def _show_sample(first_stage: nn.Module, sample: Mapping[str, Any], channels: int) -> Shown:
    """Return a thumbnail of a decoded sample. Its name is the caption."""
    image = _decode(first_stage, sample[LATENT], channels)
    image.thumbnail((256, 256))
    return show(image, sample[CAPTION][:_MOST_LETTERS])


def _decode(first_stage: nn.Module, stored: np.ndarray, channels: int) -> Image.Image:
    """Decode the parameters (2C, h, w) of a posterior, or a latent (C, h, w)."""
    import torch

    from ldm.images.grid import to_images

    latent = torch.from_numpy(stored)[None, :channels]  # (1, C, h, w): the mean of a posterior
    with torch.no_grad():
        [image] = to_images(first_stage.decode(latent.to(next(first_stage.parameters()))))
    return image


def _lines(found: Mapping[str, Any]) -> list[str]:
    captions, originals, duplicates = found["captions"], found["originals"], found["duplicates"]
    shapes = ", ".join(f"{shape}: {count}" for shape, count in found["shapes"].items())
    lines = [
        f"Captions: median {captions['tokens_median']:g} tokens, {captions['empty']} empty, {captions['truncated']} "
        f"truncated to {captions['token_limit']} tokens.",
        f"Stored shapes: {shapes}. {found['mirrored']} mirror images.",
        f"Used more than once: {len(duplicates['captions'])} captions, {len(duplicates['latents'])} latents.",
    ]
    if found["loss_masks"]:
        lines.append(f"Loss masks: {found['loss_masks']['mean']:.0%} white, on average.")
    if originals["known"]:
        lines.append(f"Originals: {originals['enlarged']} of {originals['known']} were enlarged.")
    return lines


def load_first_stage(checkpoint: Path, configs: list[Path]) -> nn.Module | None:
    """Return the autoencoder of a training `checkpoint`, built from the saved `configs`; None if it has none.

    Raises:
        UserError: a file cannot be read, or a config needs trust.
    """
    from ldm.checkpoint import load_into, open_checkpoint, weights_of
    from ldm.checkpoint.keys import FIRST_STAGE
    from ldm.config.load import load_config, plain
    from ldm.util import instantiate_from_config

    section = ((plain(load_config(configs)).get("model") or {}).get("params") or {}).get("first_stage_config")
    weights = {
        key.removeprefix(FIRST_STAGE): value
        for key, value in weights_of(open_checkpoint(checkpoint).content, checkpoint).items()
        if key.startswith(FIRST_STAGE)
    }
    if not section or not weights:
        return None
    model = instantiate_from_config(section)
    load_into(model, weights, source=str(checkpoint))
    return model.float().eval()
