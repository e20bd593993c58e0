"""The processes of a training: what torchrun or Slurm started, and how they work together. Imports no torch."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ldm.distributed.ranks import Ranks, is_srun_task
from ldm.training.trainer_2022 import is_single
from ldm.util import UserError


@dataclass(frozen=True)
class Launch:
    """What a launcher started: `processes` on each of `machines`."""

    launcher: str
    processes: int
    machines: int


def launched() -> Launch | None:
    """What started this process as one of several, by its environment; None if nothing did."""
    is_torchrun = "TORCHELASTIC_RUN_ID" in os.environ
    if not is_torchrun and not is_srun_task():
        return None
    ranks = Ranks.from_environment()
    return Launch("torchrun" if is_torchrun else "srun", ranks.local_world, ranks.world // ranks.local_world)


def is_first_process() -> bool:
    """Whether this process is the one that speaks for all."""
    names = {"torchrun": "RANK", "srun": "SLURM_PROCID"}
    launch = launched()
    return os.environ.get(names[launch.launcher] if launch else "LOCAL_RANK", "0") == "0"


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
        from ldm.training.strategies import ShardedStrategy

        return ShardedStrategy()
    if name not in ("auto", "ddp", "ddp_find_unused_parameters_true") or is_single(arguments):
        return given
    from pytorch_lightning.strategies import DDPStrategy

    # The buffers, an EMA among them, follow from the weights: to send them at each step would cost as much as these.
    return DDPStrategy(
        broadcast_buffers=False, gradient_as_bucket_view=True, find_unused_parameters=name not in ("auto", "ddp")
    )
