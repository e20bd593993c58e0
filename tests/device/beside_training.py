"""Checks of validation, sampling and evaluation on a device."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import numpy as np
import torch
from pytorch_lightning import LightningModule
from torch import Tensor

from tests.device import pretended
from tests.device.pretended import pretending
from tests.device.steps import (
    batch,
    build,
    check,
    must_not_wait,
    must_wait_once,
)
from tests.training_runs import TEXT_TOWER

SAMPLING = "ldm/models/diffusion/sampling.py"  # looks once, after the last step, for values that are not finite


@check
def validation() -> None:
    model = build("model.params.use_ema=true")
    with pretending() as waits, mock.patch.object(LightningModule, "device", pretended.GPU):
        pretended.place(model.eval())
        logged: dict[str, Tensor] = {}
        model.log_dict = lambda values, **_: logged.update(values)
        given = batch()
        waits.places.clear()
        with torch.no_grad():
            model.validation_step(given, 0)
        must_not_wait(waits)
        assert {value.device for value in logged.values()} == {pretended.GPU}


@check
def logged_images() -> None:
    model = build(cond_stage=TEXT_TOWER)
    with pretending(), torch.no_grad():
        pretended.place(model.eval())
        drawn = model.log_images(
            batch(), N=2, ddim_steps=2, ddim_eta=1.0, plot_diffusion_rows=True, unconditional_guidance_scale=3.0
        )
        assert len(drawn) == 6 and {value.device for value in drawn.values()} == {pretended.GPU}
        first_stage = next(model.first_stage_model.parameters())
        assert first_stage.device.type == "cpu", "the first stage was not put away"


@contextmanager
def begun(kind: type, call: Callable[[], None]) -> Iterator[None]:
    """Call `call` each time that a sampler of the class `kind` has its schedule, and its steps begin."""
    start = kind.start

    def started(self: Any) -> None:
        start(self)
        call()

    with mock.patch.object(kind, "start", started):
        yield


@check
def samplers() -> None:
    from ldm.models.diffusion.ancestral import AncestralSampler
    from ldm.models.diffusion.ddim import DDIMSampler
    from ldm.models.diffusion.samplers import SAMPLERS, sampler_class
    from ldm.models.diffusion.text_to_image import Request, sample_latents

    model = build(cond_stage=TEXT_TOWER)
    with pretending() as waits:
        pretended.place(model.eval())
        for name in SAMPLERS:
            with begun(sampler_class(name), waits.places.clear):
                assert list(sample_latents(model, [Request("a", 1)], (4, 4, 4), name, 3, batch_size=1, verbose=False))
            must_wait_once(waits, SAMPLING)
        context = torch.empty(2, 77, 8, device=pretended.GPU)
        mask, x0 = torch.empty(2, 1, 4, 4, device=pretended.GPU), torch.empty(2, 4, 4, 4, device=pretended.GPU)
        DDIMSampler(model).sample(2, 2, (4, 4, 4), context, mask=mask, x0=x0, verbose=False)
        with begun(AncestralSampler, waits.places.clear):
            model.sample(2, context, timesteps=2)
        must_wait_once(waits, SAMPLING)


@check
def evaluation_beside_training() -> None:
    from ldm.callbacks.rng import undisturbed
    from ldm.evaluation.denoising import compare, record

    sample = {"f8": np.zeros((8, 4, 4), np.float16), "t5": np.zeros((77, 8), np.float16), "txt": "a"}
    image_set = mock.MagicMock()
    image_set.__len__.return_value = 3
    image_set.__getitem__.side_effect = lambda position: {**sample, "__key__": str(position)}
    image_set.batches.side_effect = lambda size: [[0, 1], [2]]
    model = build("model.params.use_ema=true")
    with pretending(), mock.patch.object(LightningModule, "device", pretended.GPU):
        pretended.place(model)
        with undisturbed(model):
            compare(record(model, image_set, [1, 7], 2), model, image_set, [1, 7], 2)


@check
def encoder_and_teacher() -> None:
    from ldm.encoding.encoder import SampleEncoder
    from ldm.encoding.teacher import Teacher

    for dtype in (torch.float32, torch.bfloat16):
        model = build(cond_stage=TEXT_TOWER)
        with pretending(), mock.patch("ldm.encoding.encoder.encoder_digests", return_value={}):
            encoder = SampleEncoder(model, pretended.GPU, dtype)
            encoded = encoder.images(torch.empty(2, 3, 8, 8, dtype=torch.uint8))
            assert (encoded.device, encoded.shape) == (pretended.GPU, (2, 8, 4, 4))
            assert len(encoder.captions(["a", "b", "a"])) == 3
    model = build()
    with pretending():
        pretended.place(model.eval())
        latents, contexts = np.zeros((2, 4, 4, 4), np.float16), np.zeros((2, 77, 8), np.float16)
        assert len(Teacher(model, 2, seed=0).answers([0, 1], latents, {"t5": contexts})) == 2
