"""Arguments of Lightning's Trainer: those of 2022 put into today's words. Imports no torch."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from typing import Any

from ldm.util import UserError, check_number, nearest

log = logging.getLogger(__name__)

_RENAMED = {
    "checkpoint_callback": "enable_checkpointing",
    "replace_sampler_ddp": "use_distributed_sampler",
    "terminate_on_nan": "detect_anomaly",
}
_TRANSLATED = {
    "distributed_backend",
    "gpus",
    "num_processes",
    "progress_bar_refresh_rate",
    "reload_dataloaders_every_epoch",
    "weights_summary",
}
_IGNORED = {
    "amp_backend": "Lightning uses PyTorch's own",
    "amp_level": "it belonged to NVIDIA Apex",
    "auto_lr_find": "set model.base_learning_rate",
    "auto_scale_batch_size": "set data.params.batch_size",
    "auto_select_gpus": "name the devices with --gpus",
    "flush_logs_every_n_steps": "each logger flushes by itself",
    "ipus": "Lightning no longer runs on IPUs",
    "log_gpu_memory": "CUDACallback reports the memory",
    "move_metrics_to_cpu": "metrics are small",
    "multiple_trainloader_mode": "there is one train loader",
    "prepare_data_per_node": "the data module decides",
    "process_position": "there is one progress bar",
    "stochastic_weight_avg": "set model.params.use_ema",
    "tpu_cores": "use --accelerator tpu",
    "track_grad_norm": "log it from a callback",
    "truncated_bptt_steps": "there is nothing recurrent here",
    "weights_save_path": "checkpoints go to the run folder",
}
# Values that `accelerator` had when it named a strategy.
_STRATEGIES = {
    "ddp": "ddp",
    "ddp2": "ddp",
    "ddp_cpu": "ddp",
    "ddp_sharded": "ddp",
    "ddp_spawn": "ddp_spawn",
    "dp": "ddp",
    "horovod": "ddp",
}


def take_old_keys(section: Any) -> None:
    """Bring keys that public configs have elsewhere in the section `lightning` to their place; name what has no use."""
    trainer = section.get("trainer") or {}
    if "find_unused_parameters" in trainer:
        section.setdefault("find_unused_parameters", trainer["find_unused_parameters"])
        del trainer["find_unused_parameters"]
    if section.get("metrics_over_trainsteps_checkpoint"):
        log.warning(
            "lightning.metrics_over_trainsteps_checkpoint is ignored: to keep every checkpoint, set "
            "lightning.modelcheckpoint.params to {monitor: null, save_top_k: -1, every_n_train_steps: N}"
        )


def check_names(names: Iterable[str], valid: set[str], what: str) -> None:
    """Raise `UserError` for the first of `names` that the Trainer takes neither today (`valid`) nor took in 2022.

    `what` tells where the name stands: `"option --{}"`.
    """
    known = valid | {*_RENAMED, *_TRANSLATED, *_IGNORED}
    for name in names:
        if name not in known:
            raise UserError(f"unknown {what.format(name)}{nearest(name, known)}")


def modernise(given: Mapping[str, Any], *, has_cuda: bool, launched: int = 1) -> dict[str, Any]:
    """The Trainer arguments of today that mean what `given` means; what no longer exists is left out with a warning.

    `launched` is how many devices are meant where none are named.

    Raises:
        UserError: numbers of devices or of accumulated batches that are none.
    """
    arguments = {name: value for name, value in given.items() if name not in _IGNORED}
    for name in given.keys() & _IGNORED:
        log.warning("--%s is ignored: %s", name, _IGNORED[name])
    for old, new in _RENAMED.items():
        if old in arguments:
            arguments.setdefault(new, arguments.pop(old))
    if arguments.pop("reload_dataloaders_every_epoch", False):
        arguments["reload_dataloaders_every_n_epochs"] = 1
    if "weights_summary" in arguments:
        arguments["enable_model_summary"] = arguments.pop("weights_summary") is not None
    if arguments.pop("progress_bar_refresh_rate", None) == 0:
        arguments["enable_progress_bar"] = False
    check_number("accumulate_grad_batches", arguments.get("accumulate_grad_batches"), least=1, optional=True)
    return _devices(arguments, has_cuda, launched)


def _devices(arguments: dict[str, Any], has_cuda: bool, launched: int) -> dict[str, Any]:
    """Settle `accelerator`, `devices` and `strategy`, from `gpus` and the like."""
    strategy = arguments.pop("distributed_backend", None)
    if arguments.get("accelerator") in _STRATEGIES:
        strategy = arguments.pop("accelerator")
    processes = arguments.pop("num_processes", None)
    if "gpus" in arguments:
        gpus = _parse_gpus(arguments.pop("gpus"))
        if not gpus and has_cuda:
            log.warning("--gpus 0 asks for no GPU, so training runs on the CPU; --gpus 0, names the GPU number 0")
        if gpus and not has_cuda:
            log.warning("--gpus is ignored: there is no CUDA device here, so training runs on the CPU")
            gpus = 0
        arguments["accelerator"] = "gpu" if gpus else "cpu"
        arguments["devices"] = gpus or processes or launched
    elif strategy == "ddp_cpu":
        arguments["accelerator"] = "cpu"
    arguments.setdefault("devices", processes or launched)
    if strategy is not None and not is_single(arguments):
        if strategy not in _STRATEGIES:
            raise UserError(f"unknown distributed_backend {strategy!r}{nearest(str(strategy), set(_STRATEGIES))}")
        arguments.setdefault("strategy", _STRATEGIES[strategy])
    return arguments


def _parse_gpus(value: Any) -> int | list[int]:
    """`0,` and `0,1`, lists and a quoted `0` are device numbers; a plain number is how many, -1 all, nothing 0."""
    if isinstance(value, str) and ("," in value or value.strip() == "0"):
        value = [part for part in value.split(",") if part.strip()]
    try:
        return [int(part) for part in value] if isinstance(value, list) else int(value or 0)
    except (TypeError, ValueError) as error:
        raise UserError(f"--gpus {value!r}: expected device numbers such as 0, or 0,1 or how many to use") from error


def is_single(arguments: Mapping[str, Any]) -> bool:
    """Whether the Trainer's arguments `devices` and `num_nodes` mean one device."""
    devices = arguments["devices"]
    is_one = devices in (1, "1") or (isinstance(devices, list) and len(devices) == 1)
    return is_one and arguments.get("num_nodes") in (None, 1, "1")
