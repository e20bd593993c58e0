"""Tests of the check of Trainer arguments."""

from __future__ import annotations

import pytest

from ldm.training.trainer_values import check_values
from ldm.util import UserError


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("val_check_interval", 0, "give 1 or more batches"),
        ("accelerator", ["gpu"], "give a name"),
        ("accumulate_grad_batches", 2.5, "give a whole number of at least 1"),
        ("profiler", 1, "give a name"),
        ("model_registry", 1, "in no registry"),
        ("num_nodes", 5000, "1 to 4096 machines"),
        ("max_steps", 1 << 63, "too large; give a number below 2.63"),
        ("accumulate_grad_batches", 10**20, "too large"),
        ("gpus", -5, "give device numbers"),
        ("gpus", float("inf"), "give device numbers"),
        ("gpus", {}, "give device numbers"),
        ("gpus", True, "give device numbers"),
        ("distributed_backend", ["ddp"], "give one of ddp"),
        ("weights_summary", 2.5, "give top, full or null"),
        ("max_nb_epochs", float("inf"), "give a whole number of at least -1"),
        ("train_percent_check", 1.5, "give a whole number of batches, or a fraction"),
        ("val_check_interval", 1.5, "give 1 or more batches"),
        ("check_val_every_n_epoch", 0, "give a whole number of at least 1"),
        ("max_time", 5, "give a time as DD:HH:MM:SS"),
        ("max_time", {"fortnights": 1}, "give a time as DD:HH:MM:SS"),
        ("max_time", {"hours": -1}, "give a time as DD:HH:MM:SS"),
        ("max_epochs", 2.5, "give a whole number of at least -1"),
        ("max_steps", -2, "give a whole number of at least -1"),
        ("gradient_clip_val", -1.0, "give a number of at least 0"),
        ("gradient_clip_val", float("nan"), "give a number of at least 0"),
        ("gradient_clip_val", True, "give a number of at least 0"),
        ("gradient_clip_algorithm", "nope", "give norm or value"),
        ("limit_train_batches", -3, "give a whole number of batches, or a fraction"),
        ("overfit_batches", 1.5, "give a whole number of batches, or a fraction"),
        ("num_nodes", 0, "1 to 4096 machines"),
        ("log_every_n_steps", "often", "give a whole number of at least 0"),
        ("enable_checkpointing", "maybe", "give true or false"),
        ("deterministic", 2, "give true, false or warn"),
        ("logger", "wandb", "lightning.logger"),
        ("strategy", {"target": "x"}, "lightning.strategy"),
        ("profiler", {"target": "x"}, "give simple, advanced or pytorch"),
        ("profiler", "xla", "give simple, advanced or pytorch"),
        ("accelerator", ["cpu"], "give auto, cpu, gpu"),
        ("callbacks", "mine", "lightning.callbacks"),
        ("plugins", "mine", "plugins cannot be given"),
        ("default_root_dir", "here", "--logdir"),
    ],
)
def test_check_values_refuses(name: str, value: object, message: str) -> None:
    with pytest.raises(UserError, match=f"^lightning.trainer.{name} .*{message}") as caught:
        check_values({name: value})
    assert "\n" not in str(caught.value)


def test_check_values_accepts_valid_values() -> None:
    check_values(
        {
            "val_check_interval": 0.5, "check_val_every_n_epoch": None, "max_time": "00:12:00:00", "max_epochs": -1,
            "limit_val_batches": 0, "gradient_clip_val": 1, "deterministic": "warn", "fast_dev_run": 2, "gpus": "0,",
            "logger": False, "strategy": "ddp", "precision": 16,
        }
    )  # fmt: skip
    check_values({"max_time": {"hours": 1.5}, "val_check_interval": "00:01:00:00"})


@pytest.mark.parametrize("devices", ["auto", "0,", "-1", [0, 1], 2, -1])
def test_check_values_accepts_devices(devices: object) -> None:
    check_values({"devices": devices})
