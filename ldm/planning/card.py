"""Largest batch that fits a card, per memory tier."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from omegaconf import DictConfig

from ldm.config.load import find_config, load_config
from ldm.config.merge import merge_configs
from ldm.planning import AS_GIVEN, TIERS
from ldm.planning.ledger import CATEGORIES, HOST
from ldm.planning.step import Simulation, StepMemory, on_device
from ldm.util import UserError

GIB = 2**30
# Memory of a run besides its tensors: CUDA context, kernels and library workspaces; and a fraction for fragmentation.
ALLOWANCE = int(0.6 * GIB)
FRAGMENTATION = 0.03
# Host memory of a run besides its tensors: Python, libraries, the CUDA driver's share, and the data loader.
HOST_ALLOWANCE = int(1.5 * GIB)
_MOST_IMAGES = 1 << 20  # of an extrapolation


@dataclass(frozen=True)
class Fit:
    """Largest batch of a tier that fits a card.

    `images` is 0 if not even one image fits. `peak` and `host` are the sizes of the tensors on the device and on the
    host, in bytes, at the peak of a step with this batch; for `images` = 0, with one image. `parts` has those on the
    device by category.
    """

    tier: str
    images: int
    peak: int
    host: int = 0
    parts: Mapping[str, int] = field(default_factory=dict)


def needed_bytes(peak: int) -> int:
    """Return the bytes that a run takes on a card if its tensors take `peak` bytes."""
    return int(peak * (1 + FRAGMENTATION)) + ALLOWANCE


def needed_host_bytes(peak: int) -> int:
    """Return the bytes of host memory that a run takes if its tensors take `peak` bytes there."""
    return peak + HOST_ALLOWANCE


def tiers() -> list[str]:
    """Return the names of the tier configs that exist, the fastest first."""
    return [name for name in TIERS if _exists(name)]


def is_tier(name: str) -> bool:
    """Return True if the config `name` is a tier."""
    return name.rpartition("/")[2] in TIERS


def with_tier(config: DictConfig, tier: str) -> DictConfig:
    """Return `config` with the config of `tier` merged over it."""
    return config if tier == AS_GIVEN else merge_configs(config, load_config([tier]), trusted=True)


def fits(config: DictConfig, card: int, size: int | None = None) -> list[Fit]:
    """Return the largest batch that fits a card of `card` bytes, for `config` as given and with every tier.

    `size` is the side of an image in pixels.

    Raises:
        UserError: see `Simulation.memory`.
    """
    found = []
    for tier in (AS_GIVEN, *tiers()):
        steps = _Steps(with_tier(config, tier), size)
        largest = _extrapolated(steps, card) or largest_batch(steps.needed, card)
        peak = steps[max(largest, 1)].peak()
        parts = {name: peak[name] for name in CATEGORIES if name in peak}
        found.append(Fit(tier, largest, on_device(peak), peak.get(HOST, 0), parts))
    return found


class _Steps(dict[int, StepMemory]):
    """Memory of the step of a config by batch size, each simulated once."""

    def __init__(self, config: DictConfig, size: int | None) -> None:
        super().__init__()
        self._simulation = Simulation(config, size)

    def __missing__(self, images: int) -> StepMemory:
        self[images] = self._simulation.memory(images)
        return self[images]

    def needed(self, images: int) -> int:
        return _needed(self[images])


def _needed(step: StepMemory) -> int:
    return needed_bytes(on_device(step.peak()))


def _extrapolated(steps: _Steps, limit: int) -> int | None:
    """Return the largest batch that fits `limit` bytes, from two small ones; None if that cannot be told.

    The size of each storage is linear in the batch size, from a batch of two on. The result is simulated too, and is
    returned only if its memory is as expected.
    """
    if steps.needed(2) > limit or steps[2].extended(steps[3], 1) is None:
        return None

    def expected(images: int) -> int:
        return _needed(steps[2].extended(steps[3], images - 2))

    largest = bisect_right(range(_MOST_IMAGES), limit, lo=2, key=expected) - 1
    return largest if steps.needed(largest) == expected(largest) else None


def largest_batch(takes: Callable[[int], int], limit: int) -> int:
    """Return the largest n with `takes(n)` ≤ `limit`, or 0. `takes` must be convex.

    The peak of a step is convex in the batch size, because it is the maximum over several moments of a step, and the
    memory at each moment is linear in the batch size. A line through two points of a convex function is a lower bound
    outside them and an upper bound between them. The search follows such lines and needs few calls.
    """
    fits, before, above = (1, takes(1)), None, None
    if fits[1] > limit:
        return 0
    guess, stride = 4, 3
    while above is None or above[0] - fits[0] > 1:
        tried = guess, takes(guess)
        if tried[1] > limit:
            above = tried
        else:
            before, fits = fits, tried
        other = above or before
        growth = (other[1] - fits[1]) / (other[0] - fits[0])  # bytes per image
        further = int((limit - fits[1]) / growth) if growth else 3 * fits[0]
        if above is None and further == 0:
            break
        crawls = stride == 1 and tried is fits  # a line to a distant point can give steps that are too short
        if above is None:
            stride = min(further, 3 * fits[0])
        else:
            gap = above[0] - fits[0]
            stride = max(gap // 2, 1) if crawls else min(max(further, 1), gap - 1)
        guess = fits[0] + stride
    return fits[0]


def _exists(name: str) -> bool:
    try:
        find_config(name)
    except UserError:
        return False
    return True
