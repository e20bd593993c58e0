"""The warning before a training begins that will not fit its GPU."""

from __future__ import annotations

import logging

import torch
from omegaconf import DictConfig
from pytorch_lightning.strategies import Strategy

from ldm.planning.card import AS_GIVEN, GIB, needed, tiers, with_tier
from ldm.planning.step import peak_of_step
from ldm.training.strategies import ShardedStrategy
from ldm.util import UserError

log = logging.getLogger(__name__)


def warn_if_too_large(config: DictConfig, strategy: Strategy) -> None:
    """On a CUDA device, warn if a training step of `config` will not fit what is free there, and say what would.

    The prediction is for a device that holds all of the weights: none is made where they are sharded.
    """
    if strategy.root_device.type != "cuda" or isinstance(strategy, ShardedStrategy):
        return
    free, _ = torch.cuda.mem_get_info(strategy.root_device)
    try:
        compare(config, free)
    except Exception as error:  # a forecast that fails must not keep a run from starting
        log.info("The memory of a step is not known beforehand (%s)", str(error).partition("\n")[0])


def compare(config: DictConfig, free: int) -> None:
    """Warn if a step of `config` needs more than `free` bytes; name the first batch or tier that does not.

    Raises:
        UserError: see `peak_of_step`.
    """
    needs = _needs(config)
    log.info("A training step is predicted to need %.1f GiB of the GPU; %.1f GiB are free", needs / GIB, free / GIB)
    if needs <= free:
        return
    pictures = config.data.params.batch_size
    advice = "nothing here fits: train smaller pictures, or on a larger GPU"
    for tier in (AS_GIVEN, *tiers()):
        described = with_tier(config, tier)
        batch = 1 if tier == AS_GIVEN else described.data.params.batch_size
        try:
            needs_less = _needs(described, batch)
        except UserError:  # the tier does not go over this config, as no other does over minimal.yaml
            continue
        if needs_less <= free:
            named = f"data.params.batch_size={batch}" if tier == AS_GIVEN else f"--base ... {tier}, batch {batch},"
            advice = f"{named} would need {needs_less / GIB:.1f} GiB"
            if batch < pictures:
                advice += f"; --accumulate_grad_batches {-(-pictures // batch)} keeps the images of a step"
            break
    log.warning("This will run out of memory: %.1f GiB are needed and %.1f free. %s", needs / GIB, free / GIB, advice)


def _needs(config: DictConfig, pictures: int | None = None) -> int:
    return needed(sum(peak_of_step(config, pictures).values()))
