"""Tests of images from prompts: seeds, batches, sizes and samplers."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from ldm.config.load import load_config
from ldm.models.diffusion.latent import LatentDiffusion, check_reads_captions
from ldm.models.diffusion.samplers import SAMPLERS
from ldm.models.diffusion.text_to_image import Request, latent_shape, text_to_image
from ldm.release.load import load_release
from ldm.util import UserError
from tests.conftest import RELEASE_CONFIG

REQUESTS = [Request("red apple", 1), Request("red apple", 2), Request("a dog", 1)]


@pytest.fixture(scope="module")
def model(tiny_release: Path) -> LatentDiffusion:
    return load_release(tiny_release, RELEASE_CONFIG)


def images(model: LatentDiffusion, requests: list[Request], **settings: object) -> list[torch.Tensor]:
    settings = {"steps": 4, "scale": 3.0, "verbose": False} | settings
    return list(text_to_image(model, requests, latent_shape(model, 32, 32), **settings))


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_seed_is_an_image_in_each_batch(model: LatentDiffusion, sampler: str) -> None:
    together = images(model, REQUESTS, sampler=sampler, batch_size=3)
    alone = [images(model, [request], sampler=sampler)[0] for request in REQUESTS]
    for one, other in zip(together, alone, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(together[0], together[1], atol=0.01)
    assert not torch.allclose(together[0], together[2], atol=0.01)


def test_noise_added_in_steps_is_of_the_seed_too(model: LatentDiffusion) -> None:
    together = images(model, REQUESTS, eta=1.0, batch_size=3)
    alone = images(model, REQUESTS[2:], eta=1.0)
    torch.testing.assert_close(together[2], alone[0], rtol=1e-4, atol=1e-4)


def test_guidance_of_one_is_the_plain_prediction(model: LatentDiffusion) -> None:
    plain, guided = images(model, REQUESTS[:1], scale=1.0)[0], images(model, REQUESTS[:1], scale=1.001)[0]
    torch.testing.assert_close(plain, guided, rtol=0.05, atol=0.05)


def test_the_steps_that_run_are_told(model: LatentDiffusion, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    assert model.num_timesteps == 1000
    for sampler, steps in (("ddim", 4), ("dpm_solver", 7)):
        images(model, REQUESTS[:1], sampler=sampler, steps=steps)
    assert not caplog.records
    images(model, REQUESTS[:1], sampler="plms", steps=7, verbose=True)
    assert "plms runs 8 steps, because 7 does not divide the model's 1000" in caplog.text


def test_size_in_pixels(model: LatentDiffusion) -> None:
    assert latent_shape(model, None, None) == (16, 8, 8)
    assert latent_shape(model, 32, 80) == (16, 4, 10)
    [image] = text_to_image(model, REQUESTS[:1], latent_shape(model, 32, 80), steps=1, verbose=False)
    assert image.shape == (3, 32, 80)


def test_half_precision_networks(tiny_release: Path) -> None:
    model = load_release(tiny_release, RELEASE_CONFIG, dtype=torch.bfloat16)
    assert model.alphas_cumprod.dtype == torch.float32
    [image] = images(model, REQUESTS[:1])
    assert image.dtype == torch.float32
    assert image.isfinite().all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda model: latent_shape(model, 30, 32), "--H 30: must be a multiple of 16"),
        (lambda model: latent_shape(model, 32, 0), "--W 0"),
        (lambda model: images(model, REQUESTS, sampler="euler"), "euler"),
        (lambda model: images(model, REQUESTS, steps=0), "sampling steps 0"),
        (lambda model: images(model, REQUESTS, sampler="plms", eta=0.5), "PLMS is deterministic"),
        (lambda model: images(model, REQUESTS, sampler="dpm_solver", eta=0.5), "deterministic"),
    ],
)
def test_what_cannot_be_drawn(model: LatentDiffusion, call, message: str) -> None:
    with pytest.raises(UserError, match=message):
        call(model)


def test_what_reads_no_captions_is_named(make_model: Callable) -> None:
    model = make_model()
    for stage, named in (
        (model.cond_stage_model, "DummyEncoder"),
        (model.first_stage_model, "AutoencoderKL"),  # as of __is_first_stage__
        (None, "none"),  # as of __is_unconditional__
    ):
        model.cond_stage_model = stage
        with pytest.raises(UserError, match=f"cond_stage_config, {named}, reads no captions"):
            check_reads_captions(model)


def test_an_average_that_the_release_lacks_starts_at_its_weights(tiny_release: Path, model: LatentDiffusion) -> None:
    config = load_config([RELEASE_CONFIG], ["model.params.use_ema=true"])
    averaging = load_release(tiny_release, config)
    torch.testing.assert_close(images(averaging, REQUESTS[:1])[0], images(model, REQUESTS[:1])[0])


def test_negative_prompt_is_of_each_request(model: LatentDiffusion) -> None:
    """Mixed in a batch, each is as alone; the empty one is as none; guidance of 1 does not read it."""
    requests = [Request("red apple", 1, "a dog"), Request("red apple", 1), Request("red apple", 1, "a bee")]
    together = images(model, requests, batch_size=3)
    for one, request in zip(together, requests, strict=True):
        torch.testing.assert_close(one, images(model, [request])[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(together[1], images(model, REQUESTS[:1])[0], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(together[0], together[1], atol=0.01)
    assert not torch.allclose(together[0], together[2], atol=0.01)
    plain = images(model, [requests[0]], scale=1.0)[0]
    torch.testing.assert_close(plain, images(model, [requests[1]], scale=1.0)[0])


@pytest.mark.parametrize("sampler", ["ddim", "plms", "dpm_solver"])
def test_negative_prompt_equal_to_the_prompt_leaves_no_guidance(model: LatentDiffusion, sampler: str) -> None:
    request, long = Request("red apple", 1), Request("red apple", 1, "a dog " * 60)  # cut at 77 ids
    same = images(model, [request._replace(negative_prompt="red apple")], sampler=sampler)[0]
    plain = images(model, [request], scale=1.0, sampler=sampler)[0]
    torch.testing.assert_close(same, plain, rtol=1e-3, atol=1e-3)
    assert not torch.allclose(images(model, [long], sampler=sampler)[0], same, atol=0.01)


def test_not_finite_samples_are_named_by_prompt_and_seed(
    model: LatentDiffusion, monkeypatch: pytest.MonkeyPatch
) -> None:
    predict = model.apply_model

    def broken(x: torch.Tensor, t: torch.Tensor, cond: object) -> torch.Tensor:
        output = predict(x, t, cond).clone()
        output[2] = float("inf")
        return output

    monkeypatch.setattr(model, "apply_model", broken)
    with pytest.raises(UserError, match=r"^'a dog', seed 1: DDIMSampler: .* NaN or infinities from step 1 of 4"):
        images(model, REQUESTS, batch_size=3, scale=1.0)


def test_not_finite_images_are_told(model: LatentDiffusion, monkeypatch: pytest.MonkeyPatch) -> None:
    decode = model.decode_first_stage
    monkeypatch.setattr(model, "decode_first_stage", lambda z: decode(z) * float("inf"))
    with pytest.raises(UserError, match=r"the autoencoder decodes a finite latent to NaN.*--precision fp32 or bf16"):
        images(model, REQUESTS[:1])
