"""Tests of the search for the largest batch that fits a card."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest

from ldm.config.load import load_config
from ldm.planning import card
from ldm.planning.card import GIB, Fit, fits, largest_batch, needed_bytes, needed_host_bytes
from tests.step_of_peak import SimulationOfPeaks, StepOfPeak

# Bytes as functions of the batch size, of the shape of a real step: the maximum of functions that are linear in it.
STEPS: list[Callable[[int], int]] = [
    lambda n: 100 + 7 * n,
    lambda n: max(1000, 300 + 13 * n),
    lambda n: max(500 + n, 400 + 9 * n, 17 * n),
]


@pytest.mark.parametrize("takes", STEPS)
@pytest.mark.parametrize("limit", [50, 110, 999, 1000, 1001, 1313, 5000, 100_000])
def test_the_largest_batch_is_found_in_few_tries(takes: Callable[[int], int], limit: int) -> None:
    tried = []
    found = largest_batch(lambda n: tried.append(n) or takes(n), limit)
    assert found == max((n for n in range(1, 20_000) if takes(n) <= limit), default=0)
    assert len(tried) <= 11 and len(tried) == len(set(tried))


def test_needed_bytes_adds_fragmentation_and_context() -> None:
    assert needed_bytes(10 * GIB) == int(10.3 * GIB) + int(0.6 * GIB)
    assert needed_host_bytes(10 * GIB) == int(11.5 * GIB)


@pytest.mark.parametrize("extends", [True, False])
def test_fits_predicts_each_tier_with_its_config(monkeypatch: pytest.MonkeyPatch, extends: bool) -> None:
    simulated = []

    def peak_of_step(config, images, size):
        lean = config.model.params.get("optimizer_config", {}).get("target") == "ldm.optim.InBackward"
        streamed = config.model.params.unet_config.target.endswith("StreamedUNetModel")
        fixed = 0 if streamed else 3 * GIB if lean else 13 * GIB
        host = (3 if lean else 15) * GIB if streamed else 0
        return {"weights": fixed, "activations": images * GIB // 4 * (size // 512) ** 2, "host": host}

    def step(*given):
        simulated.append(given[1])
        return StepOfPeak(peak_of_step(*given), extends)

    monkeypatch.setattr(card, "Simulation", partial(SimulationOfPeaks, step))
    found = {fit.tier: fit for fit in fits(load_config(["finetune_stable_diffusion.yaml"]), 8 * GIB, 512)}
    assert found["as given"] == Fit(
        "as given", 0, 13 * GIB + GIB // 4, parts={"weights": 13 * GIB, "activations": GIB // 4}
    )
    assert found["fast.yaml"].images == 0
    assert found["lean.yaml"] == Fit("lean.yaml", 16, 7 * GIB, parts={"weights": 3 * GIB, "activations": 4 * GIB})
    assert (found["minimal.yaml"].images, found["minimal.yaml"].host) == (28, 15 * GIB)
    assert (found["smallest.yaml"].images, found["smallest.yaml"].host) == (28, 3 * GIB)
    if extends:  # the largest batch is found with one further simulation
        assert simulated == [2, 1, 2, 1, 2, 3, 16, 2, 3, 28, 2, 3, 28]
    decaying = load_config(["finetune_stable_diffusion.yaml", "decay_to_start.yaml"])
    assert {fit.tier: fit for fit in fits(decaying, 8 * GIB, 512)} == found
