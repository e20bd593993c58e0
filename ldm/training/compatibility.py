"""What cannot work together, refused before anything is started."""

from __future__ import annotations

from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.strategies import SingleDeviceStrategy

from ldm.callbacks.faults import NumericalFaults
from ldm.models.diffusion.ddpm import DDPM
from ldm.optim import InBackward
from ldm.util import UserError, get_obj_from_str


def check_cuda_graphs(model: LightningModule, trainer: Trainer) -> None:
    """Raise `UserError` if the UNet of `model` is compiled to CUDA graphs and `trainer` accumulates gradients.

    Gradients lie in the graphs' own memory, which the next batch's forward pass overwrites.
    """
    unet = getattr(getattr(model, "model", None), "diffusion_model", None)
    if getattr(unet, "uses_cuda_graphs", False) and trainer.accumulate_grad_batches > 1:
        raise UserError(
            f"accumulate_grad_batches={trainer.accumulate_grad_batches} adds up gradients that CUDA graphs overwrite; "
            "leave it out, or set model.params.unet_config.params.compile_mode=default"
        )


def check_clipping(model: LightningModule, trainer: Trainer) -> None:
    """Raise `UserError` if gradients are to be clipped that a fused optimizer has yet to unscale, as in float16."""
    config = getattr(model, "optimizer_config", None)
    fused = config is None or (config.get("params") or {}).get("fused")
    scales = getattr(trainer.precision_plugin, "scaler", None) is not None
    if isinstance(model, DDPM) and trainer.gradient_clip_val and scales and fused:
        raise UserError(
            f"gradient_clip_val={trainer.gradient_clip_val} cannot clip what precision={trainer.precision} scales and "
            "a fused optimizer unscales; use --precision bf16-mixed, or set "
            "model.params.optimizer_config={target: torch.optim.AdamW}"
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
