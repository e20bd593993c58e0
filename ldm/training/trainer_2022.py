"""Translation of the Trainer arguments of Lightning 0 and 1 to those of today's Lightning. Imports no torch."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from typing import Any

from ldm.training.other_programs import instead_of
from ldm.util import UserError, nearest, refuse_if

log = logging.getLogger(__name__)

# Names of 2022 → of today.
RENAMED = {
    "checkpoint_callback": "enable_checkpointing",
    "gradient_clip": "gradient_clip_val",
    "max_nb_epochs": "max_epochs",
    "min_nb_epochs": "min_epochs",
    "nb_gpu_nodes": "num_nodes",
    "overfit_pct": "overfit_batches",
    "replace_sampler_ddp": "use_distributed_sampler",
    "row_log_interval": "log_every_n_steps",
    "terminate_on_nan": "detect_anomaly",
    "test_percent_check": "limit_test_batches",
    "train_percent_check": "limit_train_batches",
    "val_percent_check": "limit_val_batches",
}
# Arguments of 2022 that are translated → the arguments of today that they set.
_TRANSLATED = {
    "distributed_backend": "strategy",
    "gpus": "devices",
    "num_processes": "devices",
    "progress_bar_refresh_rate": "enable_progress_bar",
    "reload_dataloaders_every_epoch": "reload_dataloaders_every_n_epochs",
    "weights_summary": "enable_model_summary",
}
_IGNORED = {
    "amp_backend": "Lightning uses PyTorch's AMP",
    "amp_level": "it was an option of NVIDIA Apex",
    "auto_lr_find": "set model.base_learning_rate",
    "auto_scale_batch_size": "set data.params.batch_size",
    "auto_select_gpus": "name the devices with --gpus",
    "early_stop_callback": "add pytorch_lightning.callbacks.EarlyStopping to lightning.callbacks",
    "flush_logs_every_n_steps": "each logger flushes by itself",
    "ipus": "Lightning no longer runs on IPUs",
    "log_save_interval": "each logger flushes by itself",
    "log_gpu_memory": "CUDACallback reports the memory",
    "move_metrics_to_cpu": "the metrics need little memory",
    "multiple_trainloader_mode": "there is one train loader",
    "prepare_data_per_node": "the data module decides",
    "process_position": "there is one progress bar",
    "stochastic_weight_avg": "set model.params.use_ema",
    "tpu_cores": "use --accelerator tpu",
    "track_grad_norm": "log the norm from a callback",
    "truncated_bptt_steps": "the models are not recurrent",
    "weights_save_path": "checkpoints go to the run folder",
}
# Strategies of Lightning 0 and 1, also as values of `accelerator` → their names today.
STRATEGIES = {
    "ddp": "ddp",
    "ddp2": "ddp",
    "ddp_cpu": "ddp",
    "ddp_sharded": "ddp",
    "ddp_spawn": "ddp_spawn",
    "dp": "ddp",
    "horovod": "ddp",
}
_NOTHING = (None, "None", "none", "")  # YAML reads None as text


def move_old_keys(section: Any) -> None:
    """Move old keys of the section `lightning` to their present places, and warn about keys without effect."""
    trainer = section.get("trainer") or {}
    if "resume_from_checkpoint" in trainer:
        checkpoint = trainer.pop("resume_from_checkpoint")
        refuse_if(
            checkpoint not in _NOTHING,
            f"lightning.trainer.resume_from_checkpoint {checkpoint!r}: give --resume {checkpoint}",
        )
    if "find_unused_parameters" in trainer:
        section.setdefault("find_unused_parameters", trainer["find_unused_parameters"])
        del trainer["find_unused_parameters"]
    if section.get("metrics_over_trainsteps_checkpoint"):
        log.warning(
            "lightning.metrics_over_trainsteps_checkpoint is ignored: to keep every checkpoint, set "
            "lightning.modelcheckpoint.params to {monitor: null, save_top_k: -1, every_n_train_steps: N}"
        )


def merge_arguments(config: Mapping[str, Any], typed: Mapping[str, Any]) -> dict[str, Any]:
    """Return the Trainer arguments of the `config`, and over them those `typed` on the command line.

    An argument of 2022 and the one of today that it sets are the same one.

    Raises:
        UserError: two names of one argument are given in the same place.
    """
    today = RENAMED | _TRANSLATED
    for given, where in ((config, "lightning.trainer."), (typed, "--")):
        for old, new in RENAMED.items():
            refuse_if(
                given.get(old) is not None and given.get(new) is not None,
                f"{where}{old} and {where}{new} are two names of one argument; give one of them",
            )
    replaced = {today.get(name, name) for name in typed}
    return {name: value for name, value in config.items() if today.get(name, name) not in replaced} | dict(typed)


def check_names(names: Iterable[str], valid: set[str], what: str) -> None:
    """Raise `UserError` for the first of `names` that is no Trainer argument today (`valid`) or in 2022.

    `what` is the format of a name in the message, such as `"option --{}"`.
    """
    known = valid | {*RENAMED, *_TRANSLATED, *_IGNORED}
    for name in names:
        if name not in known:
            raise UserError(f"unknown {what.format(name)}{instead_of(name) or nearest(name, known)}")


def translate_arguments(given: Mapping[str, Any], *, has_cuda: bool, launched: int = 1) -> dict[str, Any]:
    """Translate the Trainer arguments `given` to today's; leave out obsolete ones with a warning.

    `launched` is the number of devices if `given` names none.

    Raises:
        UserError: the devices are not valid.
    """
    arguments = {name: value for name, value in given.items() if name not in _IGNORED}
    for name in given.keys() & _IGNORED:
        log.warning("Trainer argument %s is ignored: %s", name, _IGNORED[name])
    for old, new in RENAMED.items():
        if old in arguments:
            arguments.setdefault(new, arguments.pop(old))
    if arguments.pop("reload_dataloaders_every_epoch", False):
        arguments["reload_dataloaders_every_n_epochs"] = 1
    if "weights_summary" in arguments:
        arguments["enable_model_summary"] = arguments.pop("weights_summary") not in _NOTHING
    if arguments.pop("progress_bar_refresh_rate", None) == 0:
        arguments["enable_progress_bar"] = False
    return _translate_devices(arguments, has_cuda, launched)


def _translate_devices(arguments: dict[str, Any], has_cuda: bool, launched: int) -> dict[str, Any]:
    """Set `accelerator`, `devices` and `strategy` from `gpus`, `num_processes` and `distributed_backend`."""
    strategy = arguments.pop("distributed_backend", None)
    if arguments.get("accelerator") in STRATEGIES:
        strategy = arguments.pop("accelerator")
    if isinstance(arguments.get("strategy"), str):
        arguments["strategy"] = STRATEGIES.get(arguments["strategy"], arguments["strategy"])
    processes = arguments.pop("num_processes", None)
    if "gpus" in arguments:
        gpus = _parse_gpus(arguments.pop("gpus"))
        if not gpus and has_cuda:
            log.warning("--gpus 0 means no GPU, so training runs on the CPU; for GPU number 0, give '--gpus 0,'")
        if gpus and not has_cuda:
            log.warning("--gpus is ignored: this machine has no CUDA device, so training runs on the CPU")
            gpus = 0
        arguments["accelerator"] = "gpu" if gpus else "cpu"
        arguments["devices"] = gpus or processes or launched
    elif strategy == "ddp_cpu":
        arguments["accelerator"] = "cpu"
    arguments.setdefault("devices", processes or launched)
    if strategy is not None and not is_single(arguments):
        if strategy not in STRATEGIES:
            raise UserError(f"unknown distributed_backend {strategy!r}{nearest(str(strategy), set(STRATEGIES))}")
        arguments.setdefault("strategy", STRATEGIES[strategy])
    return arguments


def _parse_gpus(value: Any) -> int | list[int]:
    """Parse `gpus`: lists, `0,`, `0,1` and a quoted `0` are device numbers; a plain number is a count; -1 is all."""
    if isinstance(value, str) and ("," in value or value.strip() == "0"):
        value = [part for part in value.split(",") if part.strip()]
    try:
        return [int(part) for part in value] if isinstance(value, list) else int(value or 0)
    except (TypeError, ValueError, OverflowError) as error:
        raise UserError(f"--gpus {value!r}: give device numbers such as 0, or 0,1, or a count such as 2") from error


def is_single(arguments: Mapping[str, Any]) -> bool:
    """Return True if the Trainer's arguments `devices` and `num_nodes` mean one device."""
    devices = arguments["devices"]
    is_one = devices in (1, "1") or (isinstance(devices, list) and len(devices) == 1)
    return is_one and arguments.get("num_nodes") in (None, 1, "1")
