"""Which tier of memory, and which batch, fits a card."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from omegaconf import DictConfig

from ldm.config.load import find_config, load_config
from ldm.config.merge import laid_over
from ldm.planning.step import peak_of_step
from ldm.util import UserError

GIB = 2**30
# What a run takes beside its tensors: context, kernels and workspaces of libraries; and, in proportion, gaps between
# blocks of memory.
ALLOWANCE = int(0.6 * GIB)
GAPS = 0.03
AS_GIVEN = "as given"
# Configs that lower the memory of the one before them on the command line, the fastest first.
_TIERS = ("fast.yaml", "lean.yaml", "minimal.yaml")


@dataclass(frozen=True)
class Fit:
    """The largest batch of a tier that fits, 0 for none, and bytes of tensors at its peak (or at that of batch 1)."""

    tier: str
    pictures: int
    peak: int


def needed(peak: int) -> int:
    """Bytes of a card that a run takes whose tensors take `peak`."""
    return int(peak * (1 + GAPS)) + ALLOWANCE


def tiers() -> list[str]:
    """The configs of the tiers that are there."""
    return [name for name in _TIERS if _is_there(name)]


def is_tier(name: str) -> bool:
    """Whether the config `name` is a tier's."""
    return name.rpartition("/")[2] in _TIERS


def with_tier(config: DictConfig, tier: str) -> DictConfig:
    """`config` with what the tier's config changes of it."""
    return config if tier == AS_GIVEN else laid_over(config, load_config([tier]), trusted=True)


def fits(config: DictConfig, card: int, size: int | None = None) -> list[Fit]:
    """For `config` as it is given, and under every tier, the largest batch that a card of `card` bytes holds.

    Raises:
        UserError: see `peak_of_step`.
    """
    found = []
    for tier in (AS_GIVEN, *tiers()):
        described = with_tier(config, tier)
        peaks: dict[int, int] = {}

        def takes(pictures: int, described: DictConfig = described, peaks: dict[int, int] = peaks) -> int:
            if pictures not in peaks:
                peaks[pictures] = sum(peak_of_step(described, pictures, size).values())
            return needed(peaks[pictures])

        largest = largest_batch(takes, card)
        found.append(Fit(tier, largest, peaks[max(largest, 1)]))
    return found


def largest_batch(takes: Callable[[int], int], room: int) -> int:
    """The largest n with `takes(n)` ≤ `room`; 0 if there is none. `takes` is convex, as the peak of a step is.

    A step takes most at one of several moments, each linear in the batch. So a line through two points lies below what
    comes after them and above what is between, and few tries are needed.
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
        growth = (other[1] - fits[1]) / (other[0] - fits[0])  # bytes a picture
        further = int((room - fits[1]) / growth) if growth else 3 * fits[0]
        if above is None and further == 0:
            break
        crawls = stride == 1 and tried is fits  # the line to a point far above gives steps that are too short
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
