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
from ldm.distributed.dtensor import gather_on_first, is_sharded, shard_like
from ldm.distributed.ranks import Launch
from ldm.modules.diffusionmodules.openaimodel import UNetModel
from ldm.modules.diffusionmodules.util import StaysOnHost
from ldm.training.trainer_2022 import is_single
from ldm.util import UserError


class ShardedStrategy(DDPStrategy):
    """Each process holds a shard of every weight of the UNet, of its gradient and of its optimizer state (FSDP2).

    The weights of one unit after the other are gathered as forward and backward come to them, and resharded after it;
    gradients are reduced and scattered at once, those of accumulated batches as well. What is not trained stays whole
    in each process.

    Checkpoints are those of a training on one device: the first process gathers all in the host's memory, and writes.
    On resuming, each process takes its shards of the one file.
    """

    def setup(self, trainer: Trainer) -> None:
        assert self.accelerator is not None and self.model is not None
        self.accelerator.setup(trainer)
        if not is_sharded(self.model):  # a test after the training finds it so
            self.precision_plugin.convert_module(self.model)
            self._make_equal(self.model)
            unet = unet_of(self.model)
            assert unet is not None
            shard_unet(unet, self.root_device)
        self.model_to_device()
        if trainer.state.fn == TrainerFn.FITTING:
            self.setup_optimizers(trainer)  # of the shards
        self.setup_precision_plugin()

    def _make_equal(self, module: nn.Module) -> None:
        """Give all processes the first one's weights and buffers, as DistributedDataParallel does."""
        for tensor in chain(module.parameters(), module.buffers()):
            sent = tensor.detach().to(self.root_device).contiguous()
            distributed.broadcast(sent, 0)
            if not self.is_global_zero:
                tensor.detach().copy_(sent)

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """The full weights in the first process, nothing in the others; all must ask."""
        return self._gathered(super().lightning_module_state_dict())

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """The full state in the first process, nothing in the others; all must ask."""
        return self._gathered(super().optimizer_state(optimizer))

    def _gathered(self, state: Mapping[str, Any]) -> dict[str, Any]:
        gathered = gather_on_first(dict(state), self.is_global_zero)
        return gathered if self.is_global_zero else {}

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Take this process's shards of the full states."""
        states = checkpoint["optimizer_states"]  # none in a hacked checkpoint
        for optimizer, state in zip(self.optimizers, states, strict=False):
            numbers = [number for group in state["param_groups"] for number in group["params"]]
            own = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            parameters = dict(zip(numbers, own, strict=False))  # if they are not as many, the optimizer says so
            shards = {
                number: {key: _shard(value, parameters[number]) for key, value in kept.items()}
                for number, kept in state["state"].items()
                if number in parameters
            }
            optimizer.load_state_dict({**state, "state": shards})

    def teardown(self) -> None:
        # Without moving the weights to the host, as others do: a test may come, and shards stay where they are.
        assert self.accelerator is not None and self.cluster_environment is not None
        self.cluster_environment.teardown()
        self.precision_plugin.teardown()
        self.accelerator.teardown()
        self.checkpoint_io.teardown()


def unet_of(model: nn.Module) -> UNetModel | None:
    """The UNet of `model`; None if it has none."""
    unet = getattr(getattr(model, "model", None), "diffusion_model", None)
    return unet if isinstance(unet, UNetModel) else None


def shard_unet(unet: UNetModel, device: torch.device) -> None:
    """Leave in this process a shard of each weight of `unet`, on its `device`. All processes must call it."""
    mesh = init_device_mesh(device.type, (distributed.get_world_size(),))
    for unit in (*units(unet), unet):  # the last takes what is left
        # Also those of the last, and after a validation: between steps all of the weights are always sharded.
        fully_shard(unit, mesh=mesh, reshard_after_forward=True)


def _shard(value: Any, parameter: Tensor) -> Any:
    """What is kept of a `parameter`, sharded as that is; a number of steps is not."""
    is_like_it = isinstance(value, Tensor) and value.shape == parameter.shape
    return shard_like(value, parameter) if is_like_it else value


def units(unet: UNetModel) -> list[nn.Module]:
    """What is gathered at one time: each residual block, each transformer; a whole block where blocks are compiled."""
    blocks = (*unet.input_blocks, unet.middle_block, *unet.output_blocks)
    return list(blocks) if unet.is_compiled else [layer for block in blocks for layer in block]


class HostStateStrategy(SingleDeviceStrategy):
    """One device, where a resume leaves the optimizer's state beside the parameters instead of moving it there."""

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        # A hacked checkpoint has no states.
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=False):
            # Copied from the file's memory map, which otherwise would stay as long as the training.
            optimizer.load_state_dict(tree_map_only(Tensor, in_memory, state))


def choose_strategy(arguments: Mapping[str, Any], model: LightningModule, described: Any, has_cuda: bool) -> Any:
    """Return the Trainer's argument `strategy` for the built `model`.

    `arguments` are the Trainer's; `described` is the strategy of the section `lightning`, for several devices.

    Raises:
        UserError: the strategy does not exist here, or does not go with the model.
    """
    if streams_weights(model):
        return host_state_strategy(arguments, has_cuda)
    return strategy({"strategy": described, **arguments})


def streams_weights(model: nn.Module) -> bool:
    """Return whether the weights of the UNet of `model` stay on the host."""
    return isinstance(unet_of(model), StaysOnHost)


def trains_on_gpu(arguments: Mapping[str, Any], has_cuda: bool) -> bool:
    """Return whether the Trainer's `arguments` mean a CUDA device."""
    return has_cuda and arguments.get("accelerator", "auto") in ("auto", "gpu", "cuda")


def host_state_strategy(arguments: Mapping[str, Any], has_cuda: bool) -> HostStateStrategy:
    """The strategy of a model whose weights stay on the host, under the Trainer's `arguments`.

    Raises:
        UserError: there are several devices or machines, or a strategy is asked for.
    """
    devices = arguments["devices"]
    if not is_single(arguments) or arguments.get("strategy", "auto") != "auto":
        raise UserError(
            f"weights that stay on the host train on one device, without a strategy; given: devices={devices!r}, "
            f"num_nodes={arguments.get('num_nodes', 1)!r}, strategy={arguments.get('strategy')!r}"
        )
    number = devices[0] if isinstance(devices, list) else 0
    on_gpu = trains_on_gpu(arguments, has_cuda)
    return HostStateStrategy(torch.device("cuda", number) if on_gpu else torch.device("cpu"))


def check_launch(arguments: Mapping[str, Any], launch: Launch) -> None:
    """Raise `UserError` unless the Trainer `arguments` ask for the devices and machines that were launched."""
    devices, machines = arguments["devices"], arguments["num_nodes"]
    count = len(devices) if isinstance(devices, list) else int(devices) if str(devices).isdecimal() else devices
    if (count, int(machines)) != (launch.processes, launch.machines) and count not in (-1, "-1", "auto"):
        raise UserError(
            f"{launch.launcher} started {launch.processes} processes on each of {launch.machines} machines, but "
            f"--devices (or --gpus) and --num_nodes ask for {count} on {machines}; "
            "leave them out, and each process takes a device"
        )


def strategy(arguments: Mapping[str, Any]) -> Any:
    """The Trainer's argument `strategy`: what is given, else DistributedDataParallel where there are several processes.

    `fsdp` is our own, which is not Lightning's; a single process has nothing to shard, and does without.

    Raises:
        UserError: another FSDP.
    """
    given = arguments.get("strategy", "auto")
    name = given if isinstance(given, str) else type(given).__name__
    if "fsdp" in name.lower():
        if name != "fsdp":
            raise UserError(
                f"strategy {name}: its checkpoints would not be ours; give --strategy fsdp, without settings"
            )
        if is_single(arguments):
            return "auto"
        return ShardedStrategy()
    if name not in ("auto", "ddp", "ddp_find_unused_parameters_true") or is_single(arguments):
        return given
    # The buffers, an EMA among them, follow from the weights: to send them at each step would cost as much as these.
    return DDPStrategy(
        broadcast_buffers=False, gradient_as_bucket_view=True, find_unused_parameters=name not in ("auto", "ddp")
    )
