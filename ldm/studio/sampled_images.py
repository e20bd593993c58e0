"""Samples of `tools/txt2img.py` in folders, ordered by prompt and seed. Imports no torch."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ldm.studio.commands import SampleSettings
from ldm.studio.fields import whole_number
from ldm.util import check_number, refuse_if

_MOST_IMAGES = 200


def read_sampling(prompts: str, seed: Any, count: Any, steps: Any, scale: Any, sampler: str) -> SampleSettings:
    """Return the settings of the fields.

    Raises:
        UserError: there is no prompt, or a number is out of range.
    """
    lines = tuple(filter(None, map(str.strip, prompts.splitlines())))
    refuse_if(not lines, "prompts: are empty; give one per line")
    check_number("scale of guidance", scale, whole=False)
    number, images = whole_number(seed, "seed"), whole_number(count, "images per prompt") or 1
    refuse_if(
        len(lines) * images > _MOST_IMAGES,
        f"{len(lines)} prompts with {images} images each: more than {_MOST_IMAGES} images; give fewer",
    )
    return SampleSettings(lines, number, images, whole_number(steps, "steps of sampling") or 50, scale, sampler)


def new_folder(parent: Path) -> Path:
    """Return the first of the folders `1`, `2`, ... in `parent` that does not exist."""
    return next(path for number in itertools.count(1) if not (path := parent / str(number)).exists())


def labels(prompts: Sequence[str], seed: int, count: int) -> list[str]:
    """Return a label for each sample, in the order of the files."""
    return [f"{prompt} (seed {seed + number})" for prompt in prompts for number in range(count)]


def sampled_files(folder: Path) -> list[Path]:
    """Return the samples in `folder` in their order."""
    return sorted(folder.glob("[0-9]*.png"))


def about_samples(sampling: SampleSettings, folders: Mapping[str, Path]) -> dict[str, Any]:
    """Return what a job notes about its samples, which lie in `folders` by name."""
    return {
        "labels": labels(sampling.prompts, sampling.seed, sampling.count),
        "folders": {name: str(folder) for name, folder in folders.items()},
    }
