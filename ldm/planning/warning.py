"""Warning at the start of a training that does not fit its GPU."""

from __future__ import annotations

import logging
import os
import subprocess

import torch
from omegaconf import DictConfig
from pytorch_lightning.strategies import Strategy

from ldm.distributed.ranks import is_first_process
from ldm.events import FORECAST, EventLog
from ldm.planning import AS_GIVEN
from ldm.planning.card import GIB, needed_bytes, needed_host_bytes, tiers, with_tier
from ldm.planning.forecast import forecast, start_forecast
from ldm.planning.ledger import HOST
from ldm.planning.step import on_device
from ldm.training.strategies import PartitionedStrategy
from ldm.util import UserError

log = logging.getLogger(__name__)


def begin_forecast(config: DictConfig) -> subprocess.Popen | None:
    """Start the forecast of a step of `config` in a separate process; return None if it is not needed.

    Only the first process of a run needs it, and only on a machine with a CUDA device.
    """
    return start_forecast(config) if torch.cuda.is_available() and is_first_process() else None


def warn_if_too_large(
    config: DictConfig, strategy: Strategy, begun: subprocess.Popen | None = None, events: EventLog | None = None
) -> None:
    """Warn if a training step of `config` does not fit the free memory of a CUDA device, and name a setting that does.

    The forecast assumes one device with all weights. With partitioned weights, nothing is checked.

    Args:
        begun: process that `begin_forecast` started.
        events: record of the run that gets the forecast.
    """
    if strategy.root_device.type != "cuda" or isinstance(strategy, PartitionedStrategy) or not is_first_process():
        return
    free, _ = torch.cuda.mem_get_info(strategy.root_device)
    try:
        if begun is not None:
            begun.wait()
        needs, on_host = compare(config, free, _installed_memory())
        if events is not None:
            events.add(FORECAST, device_bytes=needs, host_bytes=on_host)
    except Exception as error:  # a forecast that fails must not keep a run from starting
        log.info("The memory of a step cannot be predicted (%s)", str(error).partition("\n")[0])


def compare(config: DictConfig, free: int, ram: int | None = None) -> tuple[int, int]:
    """Warn if a step of `config` needs more than `free` bytes of the device, or more than `ram` bytes of the host.

    The warning names the first batch size or tier that fits. Return the bytes needed on the device and on the host.

    Raises:
        UserError: see `Simulation.memory`.
    """
    needs, on_host = _needs(config)
    log.info("A training step is predicted to need %.1f GiB of the GPU; %.1f GiB are free", needs / GIB, free / GIB)
    lacks_ram = ram is not None and on_host > ram
    if needs <= free and not lacks_ram:
        return needs, on_host
    images = config.data.params.batch_size
    advice = "nothing fits; train on smaller images or on a larger GPU"
    for tier in (AS_GIVEN, *tiers()):
        described = with_tier(config, tier)
        batch = 1 if tier == AS_GIVEN else described.data.params.batch_size
        try:
            less, less_on_host = _needs(described, batch)
        except UserError:  # this tier cannot be merged over the config; none can over minimal.yaml
            continue
        if less <= free and (ram is None or less_on_host <= ram):
            named = f"data.params.batch_size={batch}" if tier == AS_GIVEN else f"--base ... {tier}, batch {batch},"
            advice = f"{named} would need {less / GIB:.1f} GiB"
            if batch < images:
                advice += f"; --accumulate_grad_batches {-(-images // batch)} keeps the number of images per step"
            break
    lacking = (
        f"{on_host / GIB:.1f} GiB of host memory needed, {ram / GIB:.1f} GiB installed"
        if lacks_ram
        else f"{needs / GIB:.1f} GiB needed, {free / GIB:.1f} GiB free"
    )
    log.warning("This will run out of memory: %s; %s", lacking, advice)
    return needs, on_host


def _needs(config: DictConfig, images: int | None = None) -> tuple[int, int]:
    """Return the bytes that a run needs on the device, and on the host."""
    peak = forecast(config, images)
    return needed_bytes(on_device(peak)), needed_host_bytes(peak.get(HOST, 0))


def _installed_memory() -> int | None:
    """Return the bytes of the machine's memory; None where the system does not tell."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):  # Windows has no sysconf
        return None
