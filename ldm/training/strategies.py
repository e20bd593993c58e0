"""Strategies of the Trainer: one device with state on the host, DistributedDataParallel, or FSDP (arXiv:2304.11277)."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import chain
from typing import Any

import torch
from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.strategies import DDPStrategy, SingleDeviceStrategy
from pytorch_lightning.trainer.states import TrainerFn
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.optim import Optimizer
from torch.utils._pytree import tree_map_only

from ldm.checkpoint import in_memory
from ldm.distributed.dtensor import gather_on_first, is_partitioned, partition_like
from ldm.distributed.ranks import Launch
from ldm.modules.attention import SpatialTransformer
from ldm.modules.diffusionmodules.layers import StaysOnHost
from ldm.modules.diffusionmodules.openaimodel import UNetModel
from ldm.training.trainer_2022 import is_single
from ldm.util import UserError, refuse_if


class PartitionedStrategy(DDPStrategy):
    """FSDP2: each process holds a part of every weight of the UNet, of its gradient and of its optimizer state.

    Forward and backward gather the weights of one unit at a time, and reshard them afterwards. Gradients are reduced
    and scattered at once, also those of accumulated batches. Frozen modules stay whole in each process.

    Checkpoints are the same as those of training on one device. The first process gathers the state in host memory and
    writes it. On resuming, each process takes its shards from the one file.
    """

    def setup(self, trainer: Trainer) -> None:
        assert self.accelerator is not None and self.model is not None
        self.accelerator.setup(trainer)
        if not is_partitioned(self.model):  # already partitioned in a test after training
            self.precision_plugin.convert_module(self.model)
            self._broadcast_state(self.model)
            unet = unet_of(self.model)
            assert unet is not None
            partition_unet(unet, self.root_device)
        self.model_to_device()
        if trainer.state.fn == TrainerFn.FITTING:
            self.setup_optimizers(trainer)  # for the shards
        self.setup_precision_plugin()

    def _broadcast_state(self, module: nn.Module) -> None:
        """Broadcast the weights and buffers of the first process, as DistributedDataParallel does."""
        for tensor in chain(module.parameters(), module.buffers()):
            sent = tensor.detach().to(self.root_device).contiguous()
            distributed.broadcast(sent, 0)
            if not self.is_global_zero:
                tensor.detach().copy_(sent)

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Return the full weights in the first process and {} in the others. All processes must call this."""
        return self._gathered(super().lightning_module_state_dict())

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """Return the full state in the first process and {} in the others. All processes must call this."""
        return self._gathered(super().optimizer_state(optimizer))

    def _gathered(self, state: Mapping[str, Any]) -> dict[str, Any]:
        gathered = gather_on_first(dict(state), self.is_global_zero)
        return gathered if self.is_global_zero else {}

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Load this process's shards of the full states."""
        states = checkpoint["optimizer_states"]  # empty in a hacked checkpoint
        for optimizer, state in zip(self.optimizers, states, strict=False):
            numbers = [number for group in state["param_groups"] for number in group["params"]]
            own = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            parameters = dict(zip(numbers, own, strict=False))  # the optimizer refuses another number
            shards = {
                number: {key: _partition(value, parameters[number]) for key, value in kept.items()}
                for number, kept in state["state"].items()
                if number in parameters
            }
            optimizer.load_state_dict({**state, "state": shards})

    def teardown(self) -> None:
        # Does not move the weights to the host, as other strategies do: a test may follow, and shards cannot be moved.
        assert self.accelerator is not None and self.cluster_environment is not None
        self.cluster_environment.teardown()
        self.precision_plugin.teardown()
        self.accelerator.teardown()
        self.checkpoint_io.teardown()


def unet_of(model: nn.Module) -> UNetModel | None:
    """Return the UNet of `model`; None if it has none."""
    unet = getattr(getattr(model, "model", None), "diffusion_model", None)
    return unet if isinstance(unet, UNetModel) else None


def partition_unet(unet: UNetModel, device: torch.device) -> None:
    """Replace each weight of `unet` by this process's part on `device`. All processes must call this."""
    mesh = init_device_mesh(device.type, (distributed.get_world_size(),))
    for unit in (*units(unet), unet):  # the last call shards the remaining weights
        # Also after the last unit and in validation: between steps, weights are partitioned.
        fully_shard(unit, mesh=mesh, reshard_after_forward=True)


def _partition(value: Any, parameter: Tensor) -> Any:
    """Partition optimizer state `value` like `parameter`; return a value of another shape, such as a step count."""
    is_like_it = isinstance(value, Tensor) and value.shape == parameter.shape
    return partition_like(value, parameter) if is_like_it else value


def units(unet: UNetModel) -> list[nn.Module]:
    """Return the modules that are gathered one at a time, inner modules before the outer one.

    The units are the residual blocks and the transformers. A transformer with several blocks is split into its blocks
    and its remaining layers. If the blocks of the UNet are compiled, each of them is one unit.
    """
    blocks = (*unet.input_blocks, unet.middle_block, *unet.output_blocks)
    if unet.is_compiled:
        return list(blocks)
    return [unit for block in blocks for layer in block for unit in _units_of(layer)]


def _units_of(layer: nn.Module) -> list[nn.Module]:
    """Return the units of a layer. A deep transformer, as in SDXL, is too large to be gathered at once."""
    is_deep = isinstance(layer, SpatialTransformer) and len(layer.transformer_blocks) > 1
    return [*layer.transformer_blocks, layer] if is_deep else [layer]


class HostStateStrategy(SingleDeviceStrategy):
    """Strategy for one device that, on resuming, keeps optimizer state in host memory with its parameters."""

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        # A hacked checkpoint has no states.
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=False):
            # Copied from the file's memory map, which otherwise would stay as long as the training.
            optimizer.load_state_dict(tree_map_only(Tensor, in_memory, state))


def choose_strategy(arguments: Mapping[str, Any], model: LightningModule, described: Any, has_cuda: bool) -> Any:
    """Return the Trainer's argument `strategy` for the built `model`.

    A strategy in the Trainer's `arguments` takes precedence over `described`, that of the section `lightning`.

    Raises:
        UserError: the strategy is not supported, or does not work with the model.
    """
    if streams_weights(model):
        return host_state_strategy(arguments, has_cuda)
    return device_strategy({"strategy": described, **arguments}, _may_lack_gradients(model))


def _may_lack_gradients(model: nn.Module) -> bool:
    """Return True if some trained parameters may have no gradient in a step.

    A text encoder computes all its layers, and the model may use the states before the last ones.
    """
    parts = getattr(model, "trained_parts", None)
    return bool(getattr(model, "cond_stage_trainable", False) or (parts and parts.change_by_step))


def streams_weights(model: nn.Module) -> bool:
    """Return True if the weights of the UNet of `model` stay on the host."""
    return isinstance(unet_of(model), StaysOnHost)


def trains_on_gpu(arguments: Mapping[str, Any], has_cuda: bool) -> bool:
    """Return True if the Trainer's `arguments` select a CUDA device."""
    return has_cuda and arguments.get("accelerator", "auto") in ("auto", "gpu", "cuda")


def host_state_strategy(arguments: Mapping[str, Any], has_cuda: bool) -> HostStateStrategy:
    """Return the strategy of a model whose weights stay on the host, for the Trainer's `arguments`.

    Raises:
        UserError: the arguments ask for several devices or machines, or for a strategy.
    """
    devices = arguments["devices"]
    if not is_single(arguments) or arguments.get("strategy", "auto") != "auto":
        raise UserError(
            f"weights that stay on the host need one device and no strategy; given: devices={devices!r}, "
            f"num_nodes={arguments.get('num_nodes', 1)!r}, strategy={arguments.get('strategy')!r}; name one device, "
            "and leave out --num_nodes and --strategy"
        )
    number = devices[0] if isinstance(devices, list) else 0
    on_gpu = trains_on_gpu(arguments, has_cuda)
    return HostStateStrategy(torch.device("cuda", number) if on_gpu else torch.device("cpu"))


def check_launch(arguments: Mapping[str, Any], launch: Launch) -> None:
    """Raise `UserError` unless the Trainer's `arguments` match the devices and machines of `launch`."""
    devices, machines = arguments["devices"], arguments["num_nodes"]
    count = len(devices) if isinstance(devices, list) else int(devices) if str(devices).isdecimal() else devices
    refuse_if(
        (count, int(machines)) != (launch.processes, launch.machines) and count not in (-1, "-1", "auto"),
        f"{launch.launcher.name} started {launch.processes} processes on each of {launch.machines} machines, but "
        f"--devices (or --gpus) and --num_nodes ask for {count} devices on {machines} machines; "
        "leave these options out, and each process takes one device",
    )


def device_strategy(arguments: Mapping[str, Any], may_lack_gradients: bool = False) -> Any:
    """Return the Trainer's argument `strategy`: the given one, or DistributedDataParallel for several processes.

    With `may_lack_gradients`, the processes agree in each step on the parameters that have a gradient.

    `fsdp` is `PartitionedStrategy`, not Lightning's. A single process has nothing to partition and gets `auto`.

    Raises:
        UserError: another FSDP strategy is given.
    """
    given = arguments.get("strategy", "auto")
    name = given if isinstance(given, str) else type(given).__name__
    if "fsdp" in name.lower():
        refuse_if(
            name != "fsdp",
            f"strategy {name}: writes checkpoints of another format; give --strategy fsdp without settings",
        )
        if is_single(arguments):
            return "auto"
        return PartitionedStrategy()
    if name not in ("auto", "ddp", "ddp_find_unused_parameters_true") or is_single(arguments):
        return given
    # Buffers, such as the EMA, follow from the weights. Sending them at each step would cost as much as the gradients.
    return DDPStrategy(
        broadcast_buffers=False,
        gradient_as_bucket_view=True,
        find_unused_parameters=may_lack_gradients or name not in ("auto", "ddp"),
    )
