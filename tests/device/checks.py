"""What training and sampling do on a GPU, on one that is pretended: `python -m tests.device.checks` runs it all.

Prints a line of JSON for each check: its name, and what went wrong or null. `tests/device/test_device.py` reads them.
"""

from __future__ import annotations

import json
import traceback
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import torch
from omegaconf import OmegaConf
from pytorch_lightning import LightningModule
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from tests.device import pretended
from tests.device.pretended import Waits, pretending
from tests.training_runs import CONFIG, TEXT_TOWER

CHECKS: dict[str, Callable[[], None]] = {}
UNET, OPTIMIZER = "model.params.unet_config", "model.params.optimizer_config"
FUSED = "{target: torch.optim.AdamW, params: {fused: true}}"


def check(function: Callable[[], None]) -> Callable[[], None]:
    CHECKS[function.__name__] = function
    return function


def build(*overrides: str, cond_stage: dict[str, Any] | None = None) -> Any:
    """A tiny model in training mode; with a `cond_stage` it reads captions."""
    from ldm.training.config import build_model

    changed = OmegaConf.from_dotlist(["model.params.use_ema=false", *overrides])
    config = OmegaConf.merge(OmegaConf.create(CONFIG), changed)
    if cond_stage is not None:
        config.model.params.cond_stage_config = cond_stage
        config.model.params.cond_stage_key = "txt"
    model = build_model(config)
    model.learning_rate = 1e-3
    model.train()
    return model


def sent(*shape: int, dtype: torch.dtype = torch.float16) -> Tensor:
    """A tensor on the device, as Lightning sends one from pinned memory."""
    return torch.empty(shape, dtype=dtype).to(pretended.GPU, non_blocking=True)


def batch(**entries: Any) -> dict[str, Any]:
    names = ["a", "b", "c"]
    return {"f8": sent(3, 8, 4, 4), "t5": sent(3, 77, 8), "txt": names, "draw": names, "__key__": names, **entries}


def prior_batch() -> dict[str, Any]:
    latents = {key: sent(3, 4, 4, 4) for key in ("noise", "prediction")}
    return batch(is_prior=sent(3, dtype=torch.bool), t=sent(3, dtype=torch.long), **latents)


def step(model: Any, optimizer: Any, entries: dict[str, Any]) -> None:
    """What Lightning does at a step."""

    def closure() -> Tensor:
        loss, _ = model.shared_step(entries)
        optimizer.zero_grad()
        loss.backward()
        return loss

    model.on_train_batch_start(entries, 1)
    optimizer.step(closure)
    optimizer.zero_grad()
    if model.use_ema:
        model.model_ema(model.model)


def train(model: Any, entries: Callable[[], dict[str, Any]] = batch, waits_at: tuple[str, ...] = ()) -> None:
    """A step, which waits nowhere but in the files named."""
    with pretending() as waits:
        pretended.place(model)
        optimizer, given = model.configure_optimizers(), entries()
        model.on_train_batch_start(given, 0)  # the first stage leaves the device once
        waits.places.clear()
        step(model, optimizer, given)
        must_not_wait(waits, waits_at)


def must_not_wait(waits: Waits, but_at: tuple[str, ...] = ()) -> None:
    found = {place for place in waits.places if not place.startswith(but_at or ("nowhere",))}
    assert not found, f"waits for the device at {sorted(found)}"


@check
def what_a_device_refuses() -> None:
    def refused(function: Callable[[], Any]) -> bool:
        try:
            function()
        except (RuntimeError, AssertionError):
            return True
        return False

    with pretending() as waits:
        there, here = torch.ones(3, device=pretended.GPU), torch.ones(3)
        assert refused(lambda: there + here) and refused(lambda: nn.functional.linear(there, torch.ones(3, 3)))
        assert refused(there.numpy) and not refused(here.numpy)
        assert refused(lambda: torch.randn(3, device=pretended.GPU, generator=torch.Generator()))
        assert not waits.places
        there.cpu(), there.sum().item(), torch.tensor(1.0, device=pretended.GPU)
        assert len(waits.places) == 3


@check
def plain() -> None:
    train(build("model.params.use_ema=true"))


@check
def selective_checkpoints_channels_last() -> None:
    train(build(f"{UNET}.params.use_checkpoint=selective", f"{UNET}.params.channels_last=true"))


@check
def learned_variance_and_noised_conditioning() -> None:
    train(build(*(f"model.params.{key}" for key in ("learn_logvar=true", "min_snr_gamma=5", "num_timesteps_cond=3"))))


@check
def prior_with_a_teacher() -> None:
    train(build("model.params.prior_target=teacher"), prior_batch)


@check
def in_backward() -> None:
    train(build(f"{OPTIMIZER}={{target: ldm.optim.InBackward, params: {{optimizer: {FUSED}, clip_each: 1.0}}}}"))


@check
def low_bit_in_backward() -> None:
    from torchao.optim import subclass_8bit

    tables = (subclass_8bit.get_qmap_signed(), subclass_8bit.get_qmap_unsigned())  # of real numbers, which it keeps
    assert all(tables)
    inner = "{target: ldm.optim.low_bit.AdamW8bit}"
    model = build(f"{OPTIMIZER}={{target: ldm.optim.InBackward, params: {{optimizer: {inner}, bucket_mb: 0.1}}}}")
    train(model, waits_at=("ldm/optim/low_bit.py",))  # whose first step makes its state


@check
def streamed_weights() -> None:
    model = build("model.params.use_ema=true", f"{UNET}.target=ldm.modules.diffusionmodules.streamed.StreamedUNetModel")
    train(model, waits_at=("ldm/modules/streaming.py",))
    places = {parameter.device.type for parameter in (*model.model.parameters(), *model.model_ema.buffers())}
    assert places == {"cpu"}, places


@check
def pictures_and_captions() -> None:
    captions = build("model.params.cond_stage_trainable=true", cond_stage=TEXT_TOWER)
    train(captions, lambda: batch(f8=sent(3, 8, 8, 3, dtype=torch.float32)))


@check
def textual_inversion() -> None:
    stage = {"target": "ldm.modules.encoders.inversion.TextualInversionEmbedder"}
    stage["params"] = {**TEXT_TOWER["params"], "token": "sks", "initial_token": "person"}
    keys = ("cond_stage_trainable=true", "unet_trainable=false", "use_ema=false")
    model = build(*(f"model.params.{key}" for key in keys), cond_stage=stage)
    train(model)
    with pretending():
        model.cond_stage_model.begin_training()
        model.cond_stage_model.state_dict()  # puts the row into its table


@check
def resumed_optimizers() -> None:
    from lightning_fabric.utilities.optimizer import _optimizer_to_device

    model = build(f"{OPTIMIZER}={{target: ldm.optim.InBackward, params: {{optimizer: {FUSED}}}}}")
    with pretending() as waits:
        pretended.place(model)
        optimizer = model.configure_optimizers()
        step(model, optimizer, batch())
        saved = tree_map(lambda leaf: leaf.cpu() if isinstance(leaf, Tensor) else leaf, optimizer.state_dict())
        resumed = model.configure_optimizers()
        resumed.load_state_dict(saved)
        _optimizer_to_device(resumed, pretended.GPU)  # as Lightning does
        given = batch()
        waits.places.clear()
        step(model, resumed, given)
        must_not_wait(waits)


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
def pictures_for_the_log() -> None:
    model = build(cond_stage=TEXT_TOWER)
    with pretending(), torch.no_grad():
        pretended.place(model.eval())
        drawn = model.log_images(
            batch(), N=2, ddim_steps=2, ddim_eta=1.0, plot_diffusion_rows=True, unconditional_guidance_scale=3.0
        )
        assert len(drawn) == 6 and {value.device for value in drawn.values()} == {pretended.GPU}
        first_stage = next(model.first_stage_model.parameters())
        assert first_stage.device.type == "cpu", "the first stage was not put away"


@check
def samplers() -> None:
    from ldm.models.diffusion.ancestral import AncestralSampler
    from ldm.models.diffusion.ddim import DDIMSampler
    from ldm.models.diffusion.text_to_image import SAMPLERS, Request, draw_latents

    model = build(cond_stage=TEXT_TOWER)
    with pretending() as waits:
        pretended.place(model.eval())
        for name in SAMPLERS:
            assert list(draw_latents(model, [Request("a", 1)], (4, 4, 4), name, steps=3, batch_size=1, verbose=False))
        context = torch.empty(2, 77, 8, device=pretended.GPU)
        mask, x0 = torch.empty(2, 1, 4, 4, device=pretended.GPU), torch.empty(2, 4, 4, 4, device=pretended.GPU)
        DDIMSampler(model).sample(2, 2, (4, 4, 4), context, mask=mask, x0=x0, verbose=False)
        ready = lambda _: waits.places.clear()  # noqa: E731 - the schedule is made, the steps begin
        with mock.patch.object(AncestralSampler, "start", ready):
            model.sample(2, context, timesteps=2)
        must_not_wait(waits)


@check
def evaluation_beside_training() -> None:
    from ldm.callbacks.aside import aside
    from ldm.evaluation.denoising import compare, record

    sample = {"f8": np.zeros((8, 4, 4), np.float16), "t5": np.zeros((77, 8), np.float16), "txt": "a"}
    pictures = mock.MagicMock()
    pictures.__len__.return_value = 3
    pictures.__getitem__.side_effect = lambda position: {**sample, "__key__": str(position)}
    pictures.batches.side_effect = lambda size: [[0, 1], [2]]
    model = build("model.params.use_ema=true")
    with pretending(), mock.patch.object(LightningModule, "device", pretended.GPU):
        pretended.place(model)
        with aside(model):
            compare(record(model, pictures, [1, 7], 2), model, pictures, [1, 7], 2)


@check
def encoder_and_teacher() -> None:
    from ldm.training.encoder import Encoder
    from ldm.training.teacher import Teacher

    for dtype in (torch.float32, torch.bfloat16):
        model = build(cond_stage=TEXT_TOWER)
        with pretending(), mock.patch("ldm.training.encoder.encoder_digests", return_value={}):
            encoder = Encoder(model, pretended.GPU, dtype)
            encoded = encoder.pictures(torch.empty(2, 3, 8, 8, dtype=torch.uint8))
            assert (encoded.device, encoded.shape) == (pretended.GPU, (2, 8, 4, 4))
            assert len(encoder.captions(["a", "b", "a"])) == 3
    model = build()
    with pretending():
        pretended.place(model.eval())
        latents, contexts = np.zeros((2, 4, 4, 4), np.float16), np.zeros((2, 77, 8), np.float16)
        assert len(Teacher(model, 2, seed=0).members([0, 1], latents, contexts)) == 2


@check
def faults_are_looked_for_every_few_batches() -> None:
    from ldm.callbacks.faults import NumericalFaults

    model, callback = build(), NumericalFaults(every_n_batches=2)
    trainer: Any = SimpleNamespace(global_step=1, world_size=1, accumulate_grad_batches=1, precision_plugin=None)
    with pretending() as waits:
        pretended.place(model)
        optimizer, seen = model.configure_optimizers(), []
        for number in range(2):
            given = batch()
            waits.places.clear()
            callback.on_train_batch_start(trainer, model, given, number)
            loss, _ = model.shared_step(given)
            callback.on_before_backward(trainer, model, loss)
            loss.backward()
            callback.on_before_optimizer_step(trainer, model, optimizer)
            callback.on_train_batch_end(trainer, model, None, given, number)
            seen.append(bool(waits.places))
        assert seen == [False, True], seen


@check
def autoencoder() -> None:
    from ldm.models.autoencoder import AutoencoderKL

    coder = CONFIG["model"]["params"]["first_stage_config"]["params"]
    loss = {"target": "ldm.modules.losses.LPIPSWithDiscriminator", "params": {"disc_start": 0}}
    model = AutoencoderKL(**{**coder, "lossconfig": loss})
    properties = {"device": pretended.GPU, "dtype": torch.float32, "global_step": 4}
    with pretending() as waits, mock.patch.multiple(LightningModule, **properties):
        pretended.place(model)
        model.learning_rate = 1e-3
        optimizers = model.configure_optimizers()
        model.optimizers = lambda: optimizers
        model.log = lambda *_, **__: None
        model.manual_backward = lambda total: total.backward()
        model.toggle_optimizer = model.untoggle_optimizer = lambda _: None
        for _ in range(2):
            pictures = {"image": sent(2, 32, 32, 3, dtype=torch.float32)}
            waits.places.clear()
            model.training_step(pictures, 0)
        must_not_wait(waits)
        assert set(model.log_images(pictures)) == {"inputs", "reconstructions", "samples"}


def main() -> None:
    pretended.install()
    for name, function in CHECKS.items():
        try:
            function()
            problem = None
        except Exception:
            problem = traceback.format_exc()
        print(json.dumps({"check": name, "problem": problem}), flush=True)


if __name__ == "__main__":
    main()
