from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from ldm.callbacks.timestep_losses import TimestepLosses
from ldm.util import UserError


class Logger:
    def __init__(self) -> None:
        self.logged: list[tuple[int, dict[str, float]]] = []

    def log_metrics(self, values: dict[str, float], step: int) -> None:
        self.logged.append((step, values))


def test_timestep_losses_logs_the_mean_of_each_band_since_the_last_log() -> None:
    logger = Logger()
    trainer = SimpleNamespace(global_step=0, is_global_zero=True, loggers=[logger], log_every_n_steps=2)
    callback = TimestepLosses(bands=3)
    callback.on_train_start(trainer, None)
    batches = [(1, [0, 3], [1.0, 3.0]), (2, [9, 4], [5.0, 2.0]), (2, [9, 9], [7.0, 9.0]), (4, [6, 7], [4.0, 6.0])]
    for step, timesteps, losses in batches:  # the third batch accumulates gradients
        trainer.global_step = step
        model = SimpleNamespace(num_timesteps=10, sample_losses=(torch.tensor(timesteps), torch.tensor(losses)))
        callback.on_train_batch_end(trainer, model, None, None, 0)
    assert logger.logged == [
        (1, {"train/loss_t0_3": 2.0, "train/loss_t4_6": 2.0, "train/loss_t7_9": 5.0}),
        (3, {"train/loss_t4_6": 4.0, "train/loss_t7_9": pytest.approx(22 / 3)}),
    ]


def test_timestep_losses_logs_the_mean_of_each_band_over_a_validation() -> None:
    logged: list[dict[str, float]] = []
    trainer = SimpleNamespace(sanity_checking=False)
    model = SimpleNamespace(num_timesteps=10, sample_losses=None, log_dict=lambda values, **_: logged.append(values))
    callback = TimestepLosses(bands=3)
    for losses in ([1.0, 3.0, 5.0], [2.0, 2.0, 4.0]):
        callback.on_validation_epoch_start(trainer, model)
        model.sample_losses = torch.tensor([0, 9]), torch.tensor(losses[:2])
        callback.on_validation_batch_end(trainer, model, None, None, 0)
        model.sample_losses = torch.tensor([7]), torch.tensor(losses[2:])
        callback.on_validation_batch_end(trainer, model, None, None, 1)
        callback.on_validation_epoch_end(trainer, model)
    assert logged == [{"val/loss_t0_3": 1.0, "val/loss_t7_9": 4.0}, {"val/loss_t0_3": 2.0, "val/loss_t7_9": 3.0}]


def test_timestep_losses_leaves_out_samples_of_a_prior() -> None:
    logger = Logger()
    trainer = SimpleNamespace(global_step=1, is_global_zero=True, loggers=[logger], log_every_n_steps=1)
    model = SimpleNamespace(num_timesteps=10, sample_losses=(torch.tensor([0, 1, 9]), torch.tensor([1.0, 5.0, 7.0])))
    batch = {"is_prior": torch.tensor([False, True, True])}
    TimestepLosses(bands=2).on_train_batch_end(trainer, model, None, batch, 0)
    assert logger.logged == [(0, {"train/loss_t0_4": 1.0})]


def test_timestep_losses_refuses_no_bands() -> None:
    with pytest.raises(UserError, match="bands"):
        TimestepLosses(bands=0)
