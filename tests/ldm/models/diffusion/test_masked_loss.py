"""Loss under a mask, by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from ldm.models.diffusion.batch_mean import EQUAL
from ldm.models.diffusion.masked_loss import Masked
from ldm.models.diffusion.preservation import Prior
from ldm.util import UserError
from tests.ldm.models.diffusion.conftest import batch_of

# Two samples with one row of two cells. The errors of their two channels are 1 and 3 in the first cell, 5 and 7 in the
# second. The mask of the first sample is 1 and 0, that of the second 0.5 and 0.
ERRORS = torch.tensor([[1.0, 5.0], [3.0, 7.0]]).view(1, 2, 1, 2).expand(2, 2, 1, 2)
MASKS = torch.tensor([[1.0, 0.0], [0.5, 0.0]]).view(2, 1, 1, 2)


def config(**params: Any) -> dict[str, Any]:
    return {"target": "ldm.models.diffusion.masked_loss.Masked", "params": params}


@pytest.mark.parametrize(
    ("outside", "by_area", "expected"),
    [
        (0.0, False, [(1 + 3) / 4, (0.5 + 1.5) / 4]),
        (0.0, True, [(1 + 3) / 2, (0.5 + 1.5) / 1]),
        (0.5, False, [(1 + 3 + 2.5 + 3.5) / 4, (0.75 + 2.25 + 2.5 + 3.5) / 4]),
        (0.5, True, [(1 + 3 + 2.5 + 3.5) / 3, (0.75 + 2.25 + 2.5 + 3.5) / 2.5]),
        (1.0, True, [4, 4]),
    ],
)
def test_masked_means_by_hand(outside: float, by_area: bool, expected: list[float]) -> None:
    samples = Masked(outside, by_area).samples({"loss_mask": MASKS.half()}, EQUAL)
    torch.testing.assert_close(samples.of_elements(ERRORS), torch.tensor(expected, dtype=torch.float32))


def test_an_empty_mask_trains_nothing() -> None:
    samples = Masked(0.0, by_area=True).samples({"loss_mask": torch.zeros(2, 1, 1, 2)}, EQUAL)
    assert samples.of_elements(ERRORS).tolist() == [0, 0]


def test_masked_keeps_the_weights_of_prior_samples() -> None:
    prior = Prior(torch.tensor([False, True]), 0.5)
    samples = Masked(0.0).samples({"loss_mask": torch.tensor([[1.0, 0], [1, 1]]).view(2, 1, 1, 2)}, prior)
    values = samples.of_elements(ERRORS)  # 1 and 4
    assert (samples.loss_mean(values).item(), samples.training_mean(values).item()) == (1 + 0.5 * 4, 1)
    assert samples.logged(values, "train")["train/loss_prior"].item() == 4


@pytest.mark.parametrize("outer", [True, False])
def test_masked_and_other_weightings_nest(make_model: Callable, outer: bool) -> None:
    snr = {"target": "ldm.models.diffusion.loss.MinSNR", "params": {"gamma": 5}}
    nested = {**snr, "params": {"gamma": 5, "weighting": config(outside=0.0)}}
    batch, mask = batch_of((2, 8, 8, 8)), torch.zeros(2, 1, 8, 8)
    mask[..., :4] = 1
    losses = []
    for chosen in (config(outside=0.0, weighting=snr) if outer else nested, snr):
        model = make_model(loss_config=chosen)
        torch.manual_seed(0)
        losses.append(model.shared_step({**batch, "loss_mask": mask})[0].item())
        assert model.weighting.entries == (("loss_mask",) if chosen is not snr else ())
    assert 0 < losses[0] < losses[1]


def test_white_masks_change_no_digit(make_model: Callable) -> None:
    found = []
    for chosen in (None, config(), config(by_area=True)):
        torch.manual_seed(0)
        batch = {**batch_of((2, 8, 8, 8)), "loss_mask": torch.ones(2, 1, 8, 8)}
        torch.manual_seed(0)
        found.append(make_model(loss_config=chosen).shared_step(batch)[0].item())
    assert len(set(found)) == 1


def test_wrong_values_and_batches_without_masks_are_refused(make_model: Callable) -> None:
    with pytest.raises(UserError, match="outside"):
        Masked(outside=1.5)
    with pytest.raises(UserError, match="reads the batch entry 'loss_mask'"):
        make_model(loss_config=config()).shared_step(batch_of((2, 8, 8, 8)))
