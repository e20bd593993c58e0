"""Refusal of settings that cannot work together, before a run starts."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch
from omegaconf import DictConfig
from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.strategies import SingleDeviceStrategy
from torch import optim

from ldm.callbacks.faults import NumericalFaults
from ldm.config.load import plain
from ldm.modules.diffusionmodules.streamed import StreamedUNetModel
from ldm.modules.lora import branches_of
from ldm.moved_targets import changes_training, hint_for_key, without_unused_keys
from ldm.optim import InBackward
from ldm.shards.sample import CAPTION
from ldm.training.strategies import PartitionedStrategy, unet_of
from ldm.util import UserError, get_obj_from_str, refuse_if, takes

log = logging.getLogger(__name__)


def check_trains_as_written(config: DictConfig) -> None:
    """Raise `UserError` for an unused key of `config.model` by which a fork would train differently."""
    section = plain(config.get("model") or {})
    params = section.get("params") or {}
    for key in without_unused_keys(section.get("target"), params)[1]:
        if changes_training(key, params[key], section.get("base_learning_rate")):
            raise UserError(
                f"model.params.{key} {params[key]!r:.100}: nothing here uses it in training{hint_for_key(key)}; "
                f"to train without it, remove it or set model.params.{key}=null"
            )


def check_compatibility(model: LightningModule, trainer: Trainer) -> None:
    """Raise `UserError` for the first combination of settings of `model` and `trainer` that cannot work."""
    for check in (check_in_backward, check_partitioned, check_cuda_graphs, check_streaming, check_rounding):
        check(model, trainer)
    check_caption_key(model)


def check_caption_key(model: LightningModule) -> None:
    """Raise `UserError` if `model` is to encode captions, but its cond stage takes stored encodings.

    Caption dropout would replace the captions, and not the encodings that the model reads.
    """
    stage = getattr(model, "cond_stage_model", None)
    key = getattr(stage, "key", None)
    refuse_if(
        getattr(model, "cond_stage_key", None) == CAPTION and key not in (None, CAPTION),
        f"model.params.cond_stage_key {CAPTION}: the cond stage, {type(stage).__name__}, reads {key} and encodes "
        "no captions; name the config of a release with a text encoder, such as stable_diffusion_v1.yaml",
    )


def check_cuda_graphs(model: LightningModule, trainer: Trainer) -> None:
    """Raise `UserError` if the UNet of `model` is compiled to CUDA graphs and `trainer` accumulates gradients.

    The gradients lie in the memory of the graphs. The forward pass of the next batch overwrites it.
    """
    unet = unet_of(model)
    refuse_if(
        unet is not None and unet.uses_cuda_graphs and trainer.accumulate_grad_batches > 1,
        f"accumulate_grad_batches={trainer.accumulate_grad_batches} accumulates gradients, but CUDA graphs "
        "overwrite them; "
        "leave it out, or set model.params.unet_config.params.compile_mode=default",
    )


def check_streaming(model: LightningModule, trainer: Trainer) -> None:
    """Raise `UserError` if a streamed UNet would compute in float16 with bfloat16 copies of its weights."""
    unet = unet_of(model)
    refuse_if(
        isinstance(unet, StreamedUNetModel) and unet.dtype == torch.bfloat16 and trainer.precision == "16-mixed",
        "precision=16-mixed computes in float16, and StreamedUNetModel with stream_dtype bf16 in bfloat16; "
        "use --precision bf16-mixed, or leave out the precision",
    )


def check_in_backward(model: LightningModule, trainer: Trainer) -> None:
    """Raise `UserError` if the optimizer of `model` steps inside backward and `trainer` needs all gradients at once."""
    config = getattr(model, "optimizer_config", None)
    if not config or get_obj_from_str(config["target"]) is not InBackward:
        return
    if trainer.gradient_clip_val:
        raise UserError(
            f"gradient_clip_val={trainer.gradient_clip_val} needs all gradients at once, and {config['target']} "
            "steps during backward; leave it out, and set optimizer_config.params.clip_each to clip each parameter"
        )
    for faults in (callback for callback in trainer.callbacks if isinstance(callback, NumericalFaults)):
        if faults.skips or faults.grad_norm_factor is not None:
            given = "on_fault=skip" if faults.skips else f"grad_norm_factor={faults.grad_norm_factor}"
            raise UserError(
                f"lightning.callbacks.numerical_faults.params.{given} needs all gradients before a step, and "
                f"{config['target']} steps during backward; leave it out: a loss that is not finite "
                "then stops the training"
            )
    if getattr(trainer.precision_plugin, "scaler", None) is not None:
        raise UserError(
            f"precision={trainer.precision} scales the loss and checks all gradients before a step, and "
            f"{config['target']} steps during backward; use --precision bf16-true or bf16-mixed"
        )
    if not isinstance(trainer.strategy, SingleDeviceStrategy):
        raise UserError(
            f"{config['target']} steps before the gradients are averaged over {trainer.world_size} devices; train on "
            "one device, or use its inner optimizer as optimizer_config"
        )


# Optimizers that update each element independently, so that partitioning does not change the result.
_ELEMENT_BY_ELEMENT = (optim.Adam, optim.NAdam, optim.RAdam, optim.RMSprop, optim.SGD)
_PARTITIONED_PRECISIONS = ("32-true", "bf16-mixed", "bf16-true")


def check_partitioned(model: LightningModule, trainer: Trainer) -> None:
    """Raise `UserError` if `trainer` shards the weights of `model` and the model or other settings do not allow it."""
    if not isinstance(trainer.strategy, PartitionedStrategy):
        return
    unet = unet_of(model)
    refuse_if(
        unet is None, f"strategy fsdp shards a UNetModel, but {type(model).__name__} has none; use --strategy ddp"
    )
    refuse_if(
        branches_of(unet), "strategy fsdp cannot shard the factors of a LoRA, which are small; use --strategy ddp"
    )
    refuse_if(model.use_ema, "strategy fsdp cannot shard the EMA; set model.params.use_ema=False")
    refuse_if(
        unet.uses_cuda_graphs,
        f"compile_mode={unet.compile_mode} makes CUDA graphs, whose weights must not move in memory, but strategy "
        "fsdp gathers them at each step; use compile_mode=default",
    )
    refuse_if(
        model.trained_parts.choose,
        "strategy fsdp trains the whole UNet at one learning rate, but trained_parts chooses parts of it; leave it "
        "out, or use --strategy ddp",
    )
    refuse_if(
        {*model.trained_parameters()} - {*unet.parameters()},
        "strategy fsdp trains the UNet only; with cond_stage_trainable or learn_logvar, use --strategy ddp",
    )
    target = (model.optimizer_config or {}).get("target", "torch.optim.AdamW")
    optimizer = get_obj_from_str(target)
    refuse_if(
        not (isinstance(optimizer, type) and issubclass(optimizer, _ELEMENT_BY_ELEMENT)),
        f"optimizer_config: {target} cannot update weights partitioned by strategy fsdp; "
        "use torch.optim.AdamW, or use --strategy ddp",
    )
    refuse_if(
        trainer.precision not in _PARTITIONED_PRECISIONS,
        f"precision={trainer.precision} does not work with strategy fsdp; "
        f"use one of {', '.join(_PARTITIONED_PRECISIONS)}",
    )


def check_rounding(model: LightningModule, trainer: Trainer) -> None:
    """Refuse float16 weights, and warn about bfloat16 weights whose optimizer rounds to the nearest.

    At the learning rates of fine-tuning, most updates are smaller than half the distance to the next bfloat16 number.
    Rounding to the nearest loses them. Float16 weights underflow and overflow.

    Raises:
        UserError: the weights would be float16.
    """
    refuse_if(
        trainer.precision == "16-true",
        "precision=16-true trains float16 weights, which diverges; use --precision 16-mixed or bf16-mixed, or the "
        "lean tier: --base ... lean.yaml",
    )
    is_rounded = trainer.precision == "bf16-true" and not branches_of(model)  # factors of a LoRA are float32
    if is_rounded and not _rounds_stochastically(getattr(model, "optimizer_config", None)):
        log.warning(
            "precision=bf16-true without stochastic rounding loses most updates at small learning rates; use the lean "
            "tier, --base ... lean.yaml, whose optimizer rounds stochastically, or --precision bf16-mixed"
        )


def _rounds_stochastically(config: Mapping[str, Any] | None) -> bool:
    """Return True if the optimizer of `config`, or the one inside it, rounds bfloat16 stochastically."""
    if not config:
        return False
    params = config.get("params") or {}
    target = get_obj_from_str(config["target"])
    if target is InBackward:
        return _rounds_stochastically(params.get("optimizer"))
    key = "bf16_stochastic_round"
    return takes(target, key) and params.get(key, target.__module__ == "ldm.optim.low_bit") is True
