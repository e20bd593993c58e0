"""Checks of the training step on a device, for each way to train."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from pytorch_lightning import LightningModule
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from tests.device import pretended
from tests.device.pretended import pretending
from tests.device.steps import (
    FUSED,
    OPTIMIZER,
    UNET,
    batch,
    build,
    check,
    must_not_wait,
    prior_batch,
    sent,
    step,
    train,
)
from tests.training_runs import CONFIG, TEXT_TOWER


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


SDXL = {
    "target": "ldm.modules.encoders.modules.GeneralConditioner",
    "params": {
        "emb_models": [
            *({"target": "ldm.modules.encoders.modules.IdentityEncoder", "input_key": key} for key in ("t5", "pooled")),
            {
                "target": "ldm.modules.encoders.modules.ConcatTimestepEmbedderND",
                "params": {"outdim": 4},
                "input_key": "original_size",
            },
        ]
    },
}
# Two transformer blocks in a row, which are streamed one by one, and a vector beside the caption.
DEEP = (
    "model.params.conditioning_key=crossattn-adm",
    *(f"{UNET}.params.{key}" for key in ("transformer_depth=2", "num_classes=sequential", "adm_in_channels=14")),
    f"{UNET}.target=ldm.modules.diffusionmodules.streamed.StreamedUNetModel",
)


def sdxl_batch() -> dict[str, Any]:
    return batch(pooled=sent(3, 6), original_size=sent(3, 2, dtype=torch.float32))


@check
def streamed_transformer_blocks() -> None:
    train(build(*DEEP, cond_stage=SDXL), sdxl_batch, waits_at=("ldm/modules/streaming.py",))


@check
def smallest() -> None:
    """Steps in backward on the host, in bfloat16 and 8 bits: the device holds neither weights nor moments."""
    from ldm.optim.quantised import Quantised

    for signed in (True, False):  # the tables of real numbers are kept
        Quantised(torch.zeros(256, dtype=torch.uint8), torch.zeros(1), signed, 8)
    inner = "{target: ldm.optim.low_bit.AdamW8bit, params: {keyed_rounding: true}}"
    optimizer = f"{OPTIMIZER}={{target: ldm.optim.InBackward, params: {{optimizer: {inner}, bucket_mb: 0.1}}}}"
    model = build("model.params.use_ema=true", optimizer, *DEEP, cond_stage=SDXL).bfloat16()
    made: list[Any] = []
    configure = model.configure_optimizers
    model.configure_optimizers = lambda: made.append(configure()) or made[-1]
    train(model, sdxl_batch, waits_at=("ldm/modules/streaming.py",))
    weights = {(parameter.device.type, parameter.dtype) for parameter in model.model.parameters()}
    assert weights == {("cpu", torch.bfloat16)}, weights
    moments = [state[name] for state in made[0].state.values() for name in ("exp_avg", "exp_avg_sq")]
    assert len(moments) == 2 * len(list(model.model.parameters())), "a parameter was not stepped"
    assert {moment.device.type for moment in moments} == {"cpu"}
    assert all(parameter.grad is None for parameter in model.model.parameters())


@check
def streamed_weights() -> None:
    model = build("model.params.use_ema=true", f"{UNET}.target=ldm.modules.diffusionmodules.streamed.StreamedUNetModel")
    train(model, waits_at=("ldm/modules/streaming.py",))
    places = {parameter.device.type for parameter in (*model.model.parameters(), *model.model_ema.buffers())}
    assert places == {"cpu"}, places


@check
def images_and_captions() -> None:
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
    loss = {"target": "ldm.modules.losses.LPIPSWithDiscriminator", "params": {"disc_start": 0, "perceptual_weight": 0}}
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
            images = {"image": sent(2, 32, 32, 3, dtype=torch.float32)}
            waits.places.clear()
            model.training_step(images, 0)
        must_not_wait(waits)
        assert set(model.log_images(images)) == {"inputs", "reconstructions", "samples"}
