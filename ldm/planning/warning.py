"""Warning at the start of a training that does not fit its GPU."""

from __future__ import annotations

import logging
import subprocess

import torch
from omegaconf import DictConfig
from pytorch_lightning.strategies import Strategy

from ldm.distributed.ranks import is_first_process
from ldm.planning.card import AS_GIVEN, GIB, needed_bytes, tiers, with_tier
from ldm.planning.forecast import forecast, start_forecast
from ldm.training.strategies import ShardedStrategy
from ldm.util import UserError

log = logging.getLogger(__name__)


def begin_forecast(config: DictConfig) -> subprocess.Popen | None:
    """Start the forecast of a step of `config` in a separate process; return None if it is not needed.

    Only the first process of a run needs it, and only on a machine with a CUDA device.
    """
    return start_forecast(config) if torch.cuda.is_available() and is_first_process() else None


def warn_if_too_large(config: DictConfig, strategy: Strategy, begun: subprocess.Popen | None = None) -> None:
    """Warn if a training step of `config` does not fit the free memory of a CUDA device, and name a setting that does.

    The forecast assumes one device with all weights, so there is no warning if they are partitioned. `begun` is the
    process of `begin_forecast`.
    """
    if strategy.root_device.type != "cuda" or isinstance(strategy, ShardedStrategy) or not is_first_process():
        return
    free, _ = torch.cuda.mem_get_info(strategy.root_device)
    try:
        if begun is not None:
            begun.wait()
        compare(config, free)
    except Exception as error:  # a forecast that fails must not keep a run from starting
        log.info("The memory of a step cannot be predicted (%s)", str(error).partition("\n")[0])


def compare(config: DictConfig, free: int) -> None:
    """Warn if a step of `config` needs more than `free` bytes; name the first batch size or tier that fits.

    Raises:
        UserError: see `peak_of_step`.
    """
    needs = _needs(config)
    log.info("A training step is predicted to need %.1f GiB of the GPU; %.1f GiB are free", needs / GIB, free / GIB)
    if needs <= free:
        return
    images = config.data.params.batch_size
    advice = "nothing fits; train on smaller images or on a larger GPU"
    for tier in (AS_GIVEN, *tiers()):
        described = with_tier(config, tier)
        batch = 1 if tier == AS_GIVEN else described.data.params.batch_size
        try:
            needs_less = _needs(described, batch)
        except UserError:  # this tier cannot be merged over the config; none can over minimal.yaml
            continue
        if needs_less <= free:
            named = f"data.params.batch_size={batch}" if tier == AS_GIVEN else f"--base ... {tier}, batch {batch},"
            advice = f"{named} would need {needs_less / GIB:.1f} GiB"
            if batch < images:
                advice += f"; --accumulate_grad_batches {-(-images // batch)} keeps the number of images per step"
            break
    log.warning("This will run out of memory: %.1f GiB needed, %.1f GiB free; %s", needs / GIB, free / GIB, advice)


def _needs(config: DictConfig, images: int | None = None) -> int:
    return needed_bytes(sum(forecast(config, images).values()))
