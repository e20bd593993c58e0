"""What cannot work together, refused before anything is started."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from omegaconf import DictConfig
from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.strategies import SingleDeviceStrategy
from pytorch_lightning.utilities import GradClipAlgorithmType
from torch import optim

from ldm.callbacks.faults import NumericalFaults
from ldm.config.load import plain
from ldm.models.diffusion.ddpm import DDPM
from ldm.optim import InBackward
from ldm.training.strategies import ShardedStrategy, unet_of
from ldm.translations import changes_training, instead_of_key, without_left_out
from ldm.util import UserError, get_obj_from_str, takes

log = logging.getLogger(__name__)


def check_trains_as_written(config: DictConfig) -> None:
    """Raise `UserError` for a key of `config.model` that the model is built without, though it changes a training."""
    section = plain(config.get("model") or {})
    params = section.get("params") or {}
    for key in without_left_out(section.get("target"), params)[1]:
        if changes_training(key, params[key], section.get("base_learning_rate")):
            raise UserError(
                f"model.params.{key} {params[key]!r:.100}: nothing here trains by it{instead_of_key(key)}; "
                f"to train without it, remove it or set model.params.{key}=null"
            )


def check_compatibility(model: LightningModule, trainer: Trainer) -> None:
    """Raise `UserError` for the first of what `model` and `trainer` are set to that cannot work together."""
    for check in (check_in_backward, check_sharded, check_cuda_graphs, check_clipping, check_rounding):
        check(model, trainer)


def check_cuda_graphs(model: LightningModule, trainer: Trainer) -> None:
    """Raise `UserError` if the UNet of `model` is compiled to CUDA graphs and `trainer` accumulates gradients.

    Gradients lie in the graphs' own memory, which the next batch's forward pass overwrites.
    """
    unet = unet_of(model)
    if unet is not None and unet.uses_cuda_graphs and trainer.accumulate_grad_batches > 1:
        raise UserError(
            f"accumulate_grad_batches={trainer.accumulate_grad_batches} adds up gradients that CUDA graphs overwrite; "
            "leave it out, or set model.params.unet_config.params.compile_mode=default"
        )


def check_clipping(model: LightningModule, trainer: Trainer) -> None:
    """Raise `UserError` if float16 gradients are to be clipped by value before a fused optimizer has unscaled them.

    Clipping by value makes finite numbers of those that overflowed, which the scaler must see.
    """
    config = getattr(model, "optimizer_config", None)
    fused = config is None or (config.get("params") or {}).get("fused")
    scales = getattr(trainer.precision_plugin, "scaler", None) is not None
    by_value = trainer.gradient_clip_algorithm == GradClipAlgorithmType.VALUE
    if isinstance(model, DDPM) and trainer.gradient_clip_val and by_value and scales and fused:
        raise UserError(
            f"gradient_clip_algorithm=value cannot clip what precision={trainer.precision} scales and "
            "a fused optimizer unscales; use --precision bf16-mixed, or --gradient_clip_algorithm norm"
        )


def check_in_backward(model: LightningModule, trainer: Trainer) -> None:
    """Raise `UserError` if the optimizer of `model` steps inside backward and `trainer` needs all gradients at once."""
    config = getattr(model, "optimizer_config", None)
    if not config or get_obj_from_str(config["target"]) is not InBackward:
        return
    if trainer.gradient_clip_val:
        raise UserError(
            f"gradient_clip_val={trainer.gradient_clip_val} clips all gradients together, and {config['target']} never "
            "has all of them; leave it out, and clip each parameter's gradient with optimizer_config.params.clip_each"
        )
    for faults in (callback for callback in trainer.callbacks if isinstance(callback, NumericalFaults)):
        if faults.skips or faults.grad_norm_factor is not None:
            given = "on_fault=skip" if faults.skips else f"grad_norm_factor={faults.grad_norm_factor}"
            raise UserError(
                f"lightning.callbacks.numerical_faults.params.{given} judges a step by its gradients, and "
                f"{config['target']} takes most of a step before all are there; leave it out: a loss that is not "
                "finite then stops the training"
            )
    if getattr(trainer.precision_plugin, "scaler", None) is not None:
        raise UserError(
            f"precision={trainer.precision} scales the loss, and checks all gradients before a step, which "
            f"{config['target']} takes before all are there; use --precision bf16-true or bf16-mixed"
        )
    if not isinstance(trainer.strategy, SingleDeviceStrategy):
        raise UserError(
            f"{config['target']} steps before gradients are averaged over {trainer.world_size} devices; train on one "
            "device, or name its inner optimizer as optimizer_config"
        )


# What an optimizer of these does to a number depends on no other number, and so not on how they are sharded.
_ELEMENT_BY_ELEMENT = (optim.Adam, optim.NAdam, optim.RAdam, optim.RMSprop, optim.SGD)
_SHARDED_PRECISIONS = ("32-true", "bf16-mixed", "bf16-true")


def check_sharded(model: LightningModule, trainer: Trainer) -> None:
    """Raise `UserError` if `trainer` is to shard the weights of `model`, and they or other settings forbid it."""
    if not isinstance(trainer.strategy, ShardedStrategy):
        return
    unet = unet_of(model)
    if unet is None:
        raise UserError(
            f"strategy fsdp shards a UNetModel, and this {type(model).__name__} has none; use --strategy ddp"
        )
    if model.use_ema:
        raise UserError("strategy fsdp shards the weights, and the EMA cannot follow: set model.params.use_ema=False")
    if unet.uses_cuda_graphs:
        raise UserError(
            f"compile_mode={unet.compile_mode} makes CUDA graphs, whose weights must stay in their place, and strategy "
            "fsdp gathers them anew each time; use compile_mode=default"
        )
    if {*model.trained_parameters()} - {*unet.parameters()}:
        raise UserError(
            "strategy fsdp trains the UNet alone; with cond_stage_trainable or learn_logvar use --strategy ddp"
        )
    target = (model.optimizer_config or {}).get("target", "torch.optim.AdamW")
    optimizer = get_obj_from_str(target)
    if not (isinstance(optimizer, type) and issubclass(optimizer, _ELEMENT_BY_ELEMENT)):
        raise UserError(
            f"optimizer_config: {target} cannot step weights that strategy fsdp has sharded; "
            "name torch.optim.AdamW, or use --strategy ddp"
        )
    if trainer.precision not in _SHARDED_PRECISIONS:
        raise UserError(
            f"precision={trainer.precision} does not go with strategy fsdp; use --precision bf16-mixed, or one of "
            f"{', '.join(_SHARDED_PRECISIONS)}"
        )


def check_rounding(model: LightningModule, trainer: Trainer) -> None:
    """Refuse float16 weights, and warn of bfloat16 weights whose optimizer rounds to the nearest.

    At the learning rates of fine-tuning most updates are smaller than half the distance to the next bfloat16 number,
    so that rounding to the nearest loses them. Float16 weights underflow and overflow.

    Raises:
        UserError: the weights would be float16.
    """
    if trainer.precision == "16-true":
        raise UserError(
            "precision=16-true trains float16 weights, which diverges; use --precision 16-mixed or bf16-mixed, or the "
            "lean tier: --base ... lean.yaml"
        )
    if trainer.precision == "bf16-true" and not _rounds_stochastically(getattr(model, "optimizer_config", None)):
        log.warning(
            "precision=bf16-true without stochastic rounding loses most updates at small learning rates; use the lean "
            "tier, --base ... lean.yaml, whose optimizer rounds stochastically, or --precision bf16-mixed"
        )


def _rounds_stochastically(config: Mapping[str, Any] | None) -> bool:
    """Return whether the optimizer that `config` describes, or the one inside it, rounds bfloat16 stochastically."""
    if not config:
        return False
    params = config.get("params") or {}
    target = get_obj_from_str(config["target"])
    if target is InBackward:
        return _rounds_stochastically(params.get("optimizer"))
    key = "bf16_stochastic_round"
    return takes(target, key) and params.get(key, target.__module__ == "ldm.optim.low_bit") is True
