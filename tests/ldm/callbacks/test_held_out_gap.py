from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ldm.callbacks.held_out_gap import HeldOutGap
from ldm.util import UserError

TRAINER: Any = SimpleNamespace(enable_validation=True, sanity_checking=False)


class Model(SimpleNamespace):
    """Model of 50 timesteps with the losses of its last batch."""

    def __init__(self) -> None:
        super().__init__(num_timesteps=50, sample_losses=None, logged=[])

    def log(self, name: str, value: torch.Tensor, **_: Any) -> None:
        self.logged.append((name, value.item()))


def train(callback: HeldOutGap, model: Model, pairs: list[tuple[int, float]], **batch: Any) -> None:
    model.sample_losses = tuple(map(torch.tensor, zip(*pairs, strict=True)))
    callback.on_train_batch_end(TRAINER, model, None, batch, 0)


def validate(callback: HeldOutGap, model: Model, pairs: list[tuple[int, float]]) -> list[tuple[str, float]]:
    callback.on_validation_epoch_start(TRAINER, model)
    for pair in pairs:
        model.sample_losses = tuple(torch.tensor([value]) for value in pair)
        callback.on_validation_batch_end(TRAINER, model, None, {}, 0)
    callback.on_validation_epoch_end(TRAINER, model)
    return model.logged


def test_the_gap_compares_losses_of_equal_timesteps() -> None:
    callback, model = HeldOutGap(bins=5), Model()
    train(callback, model, [(3, 0.5), (9, 1.5), (15, 2.0)])
    train(callback, model, [(15, 9.0), (16, float("nan"))], is_prior=torch.tensor([True, False]))
    resumed = HeldOutGap(bins=5)
    resumed.load_state_dict(callback.state_dict())
    # Means of training: 1 and 2 in the first bins. Nothing is known of the last.
    for one in (callback, resumed):
        model.logged = []
        assert validate(one, model, [(7, 1.5), (12, 2.25), (10, 1.5), (45, 9.0)]) == [
            ("val/gap", pytest.approx((0.5 + 0.25 - 0.5) / 3))
        ]


def test_older_losses_of_training_count_less() -> None:
    callback, model = HeldOutGap(bins=5), Model()
    callback.kept = 0.5
    for loss in (1.0, 2.0):
        train(callback, model, [(49, loss)])
    assert validate(callback, model, [(45, 9.0)]) == [("val/gap", pytest.approx(9 - (0.5 * 1 + 2) / 1.5))]


def test_no_gap_without_common_timesteps_or_losses() -> None:
    callback, model = HeldOutGap(bins=5), Model()
    assert validate(callback, model, [(7, 1.5)]) == []
    train(callback, model, [(30, 1.0)])
    assert validate(callback, model, [(7, 1.5)]) == []
    callback.on_train_batch_end(TRAINER, SimpleNamespace(), None, {}, 0)  # an autoencoder


@pytest.mark.parametrize("name", ["bins", "batches"])
def test_held_out_gap_refuses_none(name: str) -> None:
    with pytest.raises(UserError, match=f"{name} 0"):
        HeldOutGap(**{name: 0})
