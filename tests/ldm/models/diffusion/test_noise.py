"""Noise of training, by hand."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.models.diffusion.noise import TrainingNoise
from ldm.models.diffusion.random_streams import RandomStreams
from ldm.util import UserError
from tests.ldm.models.diffusion.conftest import batch_of

STREAMS = RandomStreams(["a", "b"])
X = torch.zeros(2, 4, 8, 8)
TARGET = "ldm.models.diffusion.noise.TrainingNoise"


def test_default_noise_is_that_of_the_stream() -> None:
    noise, added = TrainingNoise().sample(X, STREAMS)
    assert noise.equal(STREAMS.normal("noise", X)) and added is None


def test_offset_is_one_number_per_sample_and_channel() -> None:
    plain, shifted = STREAMS.normal("noise", X), TrainingNoise(offset=0.1).sample(X, STREAMS)[0]
    offset = 0.1 * STREAMS.normal("noise offset", torch.zeros(2, 4, 1, 1))
    torch.testing.assert_close(shifted, plain + offset.expand(2, 4, 8, 8))
    assert len(offset.unique()) == 8


def test_pyramid_by_hand() -> None:
    """Levels of 4 × 4, 2 × 2 and 1 × 1, with the factors 1/2, 1/4 and 1/8; there is no fourth."""
    total = STREAMS.normal("noise", X)
    for level, side in ((1, 4), (2, 2), (3, 1)):
        coarse = STREAMS.normal(f"noise level {level}", torch.zeros(2, 4, side, side))
        total = total + 0.5**level * F.interpolate(coarse, size=(8, 8), mode="bilinear")
    noise, _ = TrainingNoise(pyramid=0.5, levels=9).sample(X, STREAMS)
    torch.testing.assert_close(noise, total / total.flatten(1).std(1)[:, None, None, None])
    assert noise.flatten(1).std(1).tolist() == pytest.approx([1, 1], rel=1e-5)


@pytest.mark.parametrize("teacher", [False, True])
def test_perturbation_is_in_the_input_and_not_in_the_target(
    make_model: Callable[..., LatentDiffusion], monkeypatch: pytest.MonkeyPatch, teacher: bool
) -> None:
    """A row with a teacher's prediction keeps the teacher's input."""
    config = {"target": TARGET, "params": {"perturbation": 0.1}}
    model = make_model(noise_config=config, prior_target="teacher" if teacher else "data").train()
    batch = {**batch_of((2, 4, 8, 8)), "stream": STREAMS.names}
    if teacher:
        stored = {"t": torch.tensor([5, 5]), "noise": X.half() + 1, "prediction": X.half() + 3}
        batch |= {"is_prior": torch.tensor([False, True]), **stored}
    seen = {}
    monkeypatch.setattr(model, "apply_model", lambda x, t, cond: seen.update(x=x, t=t) or torch.zeros_like(x))
    monkeypatch.setattr(
        model, "training_loss", lambda output, target, t, samples: seen.update(target=target) or (0, {})
    )
    model.shared_step(batch)
    x, noise = model.scale_factor * batch["f8"].float(), STREAMS.normal("noise", X)
    moved = noise + 0.1 * STREAMS.normal("perturbation", X)
    if teacher:
        noise[1], moved[1] = 3, 1
    assert seen["target"].equal(noise)
    torch.testing.assert_close(seen["x"], model.q_sample(x, seen["t"], moved))


def test_noise_is_plain_in_validation(make_model: Callable[..., LatentDiffusion]) -> None:
    losses = []
    for config in (None, {"target": TARGET, "params": {"offset": 1, "perturbation": 1, "pyramid": 0.5}}):
        torch.manual_seed(0)
        losses.append(make_model(noise_config=config).eval().shared_step(batch_of((2, 4, 8, 8)))[0])
    assert losses[0].equal(losses[1])


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"target": TARGET, "params": {"pyramid": 1.5}}, "pyramid 1.5: give a number from 0 to 1"),
        ({"target": TARGET, "params": {"offset": -1}}, "offset -1: give a number of at least 0"),
        ({"target": "torch.nn.Identity"}, "noise_config: torch.nn.Identity is not a kind of noise"),
    ],
)
def test_noise_config_that_cannot_be(make_model: Callable[..., LatentDiffusion], config: dict, said: str) -> None:
    with pytest.raises(UserError, match=said):
        make_model(noise_config=config)
