"""Base class of data modules: batch size, seed, and share of a rank."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytorch_lightning as pl

from ldm.data.batch_sampler import EpochBatchSampler
from ldm.util import UserError, check_number

logger = logging.getLogger(__name__)

MOST_WORKERS = 256  # a larger number, in a config from elsewhere, could stop the machine


class BaseDataModule(pl.LightningDataModule):
    """Base of data modules with batch size, workers, seed, and the share of this rank."""

    def __init__(self, batch_size: int, num_workers: int, seed: int | None, drop_last: bool) -> None:
        super().__init__()
        check_number("data.params.batch_size", batch_size, least=1)
        check_number("data.params.num_workers", num_workers, least=0, most=MOST_WORKERS)
        check_number("data.params.seed", seed, least=0, optional=True)
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.seed_is_given = seed is not None
        # `seed_everything` sets this variable to the run's seed, which also seeds the random streams of training.
        self.run_seed = int(os.environ.get("PL_GLOBAL_SEED", 0))
        self.seed = self.run_seed if seed is None else seed
        self.drop_last = drop_last

    def state_dict(self) -> dict[str, Any]:
        return {"seed": self.seed}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the seed, so that a resumed run keeps its sample order unless its config sets another seed."""
        if not self.seed_is_given:
            self.seed = state_dict["seed"]

    def _rank(self) -> dict[str, int]:
        if self.trainer is None:
            return {"rank": 0, "world": 1}
        return {"rank": self.trainer.global_rank, "world": self.trainer.world_size}

    def _is_shared(self) -> bool:
        """Return True if several processes train, each on its share."""
        return self._rank()["world"] > 1

    def _sampler(
        self,
        groups: list[np.ndarray],
        keys: Sequence[str],
        name: str,
        batch_size: int | None = None,  # default: that of the module
        weights: np.ndarray | None = None,
        **options: bool,
    ) -> EpochBatchSampler:
        batch_size = batch_size or self.batch_size
        sampler = EpochBatchSampler(groups, batch_size, keys, weights, seed=self.seed, **options, **self._rank())
        if len(sampler) == 0:
            counts = f"{sum(map(len, groups))} samples, batch_size {batch_size}, ranks {self._rank()['world']}"
            raise UserError(f"the {name} data give no batch: {counts}, drop_last {options.get('drop_last', False)}")
        self._say_never_seen(name, sampler)
        return sampler

    def _say_never_seen(self, name: str, sampler: EpochBatchSampler) -> None:
        missing = sampler.never_seen()
        if not any(missing) or self._rank()["rank"]:
            return
        drop_last = sampler.options.get("drop_last", False)
        remedy = "lower batch_size, or set drop_last to false" if drop_last else "use fewer processes"
        logger.warning(
            "%s data: %d of %d samples are unused, because they do not fill a batch (%d of %d sizes of image; "
            "batch_size %d, ranks %d, drop_last %s): %s",
            *(name, sum(missing), sum(map(len, sampler.groups)), sum(map(bool, missing)), len(missing)),
            *(sampler.batch_size, self._rank()["world"], drop_last, remedy),
        )

    def _shuffle_training(self, shuffle: bool) -> bool:
        # for overfitting, each epoch has the same batches
        return shuffle and not (self.trainer is not None and self.trainer.overfit_batches)
