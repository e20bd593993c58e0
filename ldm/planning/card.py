"""Tiers of memory and batch sizes that fit a card."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from omegaconf import DictConfig

from ldm.config.load import find_config, load_config
from ldm.config.merge import merge_configs
from ldm.planning.step import peak_of_step
from ldm.util import UserError

GIB = 2**30
# Memory that a run takes besides its tensors: context, kernels and library workspaces, and a share for fragmentation.
ALLOWANCE = int(0.6 * GIB)
GAPS = 0.03
AS_GIVEN = "as given"
# Overlays that lower memory, the fastest first.
_TIERS = ("fast.yaml", "lean.yaml", "minimal.yaml")


@dataclass(frozen=True)
class Fit:
    """Largest batch of a tier that fits a card.

    `images` is 0 where not even one fits. `peak` is the bytes of tensors at the peak of a step with that batch, or of a
    step with one image.
    """

    tier: str
    images: int
    peak: int


def needed(peak: int) -> int:
    """Return the bytes of a card that a run takes if its tensors take `peak`."""
    return int(peak * (1 + GAPS)) + ALLOWANCE


def tiers() -> list[str]:
    """Return the names of the tier configs that exist."""
    return [name for name in _TIERS if _is_there(name)]


def is_tier(name: str) -> bool:
    """Return True if the config `name` is a tier."""
    return name.rpartition("/")[2] in _TIERS


def with_tier(config: DictConfig, tier: str) -> DictConfig:
    """Return `config` with the config of `tier` laid over it."""
    return config if tier == AS_GIVEN else merge_configs(config, load_config([tier]), trusted=True)


def fits(config: DictConfig, card: int, size: int | None = None) -> list[Fit]:
    """Return, for `config` as it is and under every tier, the largest batch that a card of `card` bytes holds.

    Raises:
        UserError: see `peak_of_step`.
    """
    found = []
    for tier in (AS_GIVEN, *tiers()):
        described = with_tier(config, tier)
        peaks: dict[int, int] = {}

        def takes(images: int, described: DictConfig = described, peaks: dict[int, int] = peaks) -> int:
            if images not in peaks:
                peaks[images] = sum(peak_of_step(described, images, size).values())
            return needed(peaks[images])

        largest = largest_batch(takes, card)
        found.append(Fit(tier, largest, peaks[max(largest, 1)]))
    return found


def largest_batch(takes: Callable[[int], int], room: int) -> int:
    """Return the largest n with `takes(n)` ≤ `room`, or 0. `takes` must be convex, as the peak of a step is.

    A step peaks at one of several moments, and the memory of each is linear in the batch. A line through two points is
    therefore a lower bound outside them and an upper bound between them, so that few calls are needed.
    """
    fits, before, above = (1, takes(1)), None, None
    if fits[1] > room:
        return 0
    guess, stride = 4, 3
    while above is None or above[0] - fits[0] > 1:
        tried = guess, takes(guess)
        if tried[1] > room:
            above = tried
        else:
            before, fits = fits, tried
        other = above or before
        growth = (other[1] - fits[1]) / (other[0] - fits[0])  # bytes per image
        further = int((room - fits[1]) / growth) if growth else 3 * fits[0]
        if above is None and further == 0:
            break
        crawls = stride == 1 and tried is fits  # a line to a distant point gives steps that are too short
        if above is None:
            stride = min(further, 3 * fits[0])
        else:
            gap = above[0] - fits[0]
            stride = max(gap // 2, 1) if crawls else min(max(further, 1), gap - 1)
        guess = fits[0] + stride
    return fits[0]


def _is_there(name: str) -> bool:
    try:
        find_config(name)
    except UserError:
        return False
    return True
